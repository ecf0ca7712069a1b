#include "ops/sparse_multiply.h"

namespace lamina {

constinit const KernelTable<SparseColumns(int)> sparse_columns_table;
constinit const KernelTable<void(const SparsePanelArgs<float>&)> sparse_panel_f32_table;
constinit const KernelTable<void(const SparsePanelArgs<bf16>&)> sparse_panel_bf16_table;
constinit const KernelTable<void(const SparseGemmArgs<float>&)> sparse_gemm_f32_table;
constinit const KernelTable<void(const SparseGemmArgs<bf16>&)> sparse_gemm_bf16_table;
constinit const KernelTable<void(const SparseFinishArgs<float>&)> sparse_finish_f32_table;
constinit const KernelTable<void(const SparseFinishArgs<bf16>&)> sparse_finish_bf16_table;
constinit const KernelTable<void(const SparseFewArgs<float>&)> sparse_few_f32_table;
constinit const KernelTable<void(const SparseFewArgs<bf16>&)> sparse_few_bf16_table;
constinit const KernelTable<void(const SparseFewFinishArgs<float>&)> sparse_few_finish_f32_table;
constinit const KernelTable<void(const SparseFewFinishArgs<bf16>&)> sparse_few_finish_bf16_table;

SparseCut sparse_float_cut(const char* op, const std::string& pattern, int64_t channels) {
  const SparsePattern shape = parse_sparse_pattern(op, pattern, kSparseFloatPatterns);
  const int64_t inputs = shape.rows == 1   ? tuning::kSparseInputs1
                         : shape.rows == 2 ? tuning::kSparseInputs2
                                           : tuning::kSparseInputs4;
  const int64_t slabs = (channels + tuning::kSparseSlab - 1) / tuning::kSparseSlab;
  const int64_t each = (slabs + tuning::kSparseSlabs - 1) / tuning::kSparseSlabs;
  return {pattern, shape, inputs,
          std::clamp<int64_t>(each, 1, tuning::kSparseMostSlab / tuning::kSparseSlab) * tuning::kSparseSlab};
}

SparseForm open_sparse_float(const char* op, const TensorView& data) {
  return open_sparse(op, data, kSparseFloatPatterns, kSparseFloatDTypes);
}

}  // namespace lamina
