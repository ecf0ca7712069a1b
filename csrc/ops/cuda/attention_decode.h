// attention_decode on CUDA devices: see ops/attention_decode.h for the operands. Nothing waits for the device, so what
// is in cache_seqlens and block_table is not checked: a length beyond the cache counts as the cache's, an entry that is
// no block as the nearest block, and of a sequence that new keys do not fit into nothing is written.
#pragma once

#include <optional>

#include "ops/tensor.h"

namespace lamina {

// Elements of the float32 workspace of attention_decode_cuda: the sums of each part of the keys, where one block does
// not take them all. From shapes alone.
int64_t attention_decode_workspace_cuda(const CudaTensorView& q, const CudaTensorView& k_cache,
                                        const CudaTensorView& v_cache,
                                        const std::optional<CudaTensorView>& block_table);

void attention_decode_cuda(const CudaTensorView& q, const CudaTensorView& k_cache, const CudaTensorView& v_cache,
                           const CudaTensorView& cache_seqlens, const std::optional<CudaTensorView>& block_table,
                           double scale, std::optional<int64_t> window, std::optional<double> softcap,
                           const std::optional<CudaTensorView>& alibi_slopes,
                           const std::optional<CudaTensorView>& sinks, const std::optional<CudaTensorView>& k_scale,
                           const std::optional<CudaTensorView>& v_scale, const CudaTensorView& out,
                           const std::optional<CudaTensorView>& lse, const CudaTensorView& workspace);

void attention_decode_append_cuda(const CudaTensorView& k_cache, const CudaTensorView& v_cache,
                                  const CudaTensorView& cache_seqlens, const CudaTensorView& k, const CudaTensorView& v,
                                  const std::optional<CudaTensorView>& block_table,
                                  const std::optional<CudaTensorView>& k_scale,
                                  const std::optional<CudaTensorView>& v_scale);

}  // namespace lamina
