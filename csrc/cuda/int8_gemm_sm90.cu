// int8_gemm for Hopper: the copy engine fills shared memory several stages ahead, warp groups multiply from there by
// wgmma, and while one finishes its tile the other multiplies. The epilogue is one visitor of CUTLASS: it finishes the
// sums where they lie, in registers, and the copy engine stores whole tiles.
//
// Outputs of 16 bits are carried as such, whatever they mean: one kernel for each tile size and width of an output.
#include <cutlass/cutlass.h>

#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cuda/int8_gemm.h"
#include "cuda/tile_sizes.h"

namespace lamina::cuda {
namespace {

namespace fusion = cutlass::epilogue::fusion;

// Finishes a fragment of sums and returns the outputs, Out: float, uint16_t or int8_t.
template <class Out>
struct Finish : fusion::Sm90VisitorImpl<> {
  using Arguments = Int8Epilogue;
  using Params = Int8Epilogue;
  struct SharedStorage {};

  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& args, void*) {
    return args;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  Finish() = default;
  CUTLASS_HOST_DEVICE Finish(const Params& params, const SharedStorage&) : params(&params) {}

  const Params* params = nullptr;

  template <class Coordinates>
  struct Callbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE Callbacks(Coordinates coordinates, int row, int column, int rows, int columns, const Params& params)
        : coordinates(coordinates), row(row), column(column), rows(rows), columns(columns), params(params) {}

    Coordinates coordinates;  // (element, m, n, m of the part, n of the part) -> (row, column) from the first on
    int row, column;          // of the thread's first element
    int rows, columns;        // of the whole output
    const Params& params;

    template <class Accumulator, int kCount>
    CUTLASS_DEVICE cutlass::Array<Out, kCount> visit(const cutlass::Array<Accumulator, kCount>& totals, int part,
                                                     int part_m, int part_n) {
      using cute::_;
      const auto here = coordinates(_, _, _, part_m, part_n);
      constexpr int kPairs = kCount / 2;
      // Sums come in pairs of neighbours of one row. What lies outside the output is computed from its edge, and the
      // copy engine drops it.
      int64_t rows_of[kPairs], columns_of[kPairs];  // of the first of each pair
      float x_scale[kPairs], w_scale[kCount], y[kCount];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kPairs; ++i) {
        const auto at = here(part * kCount + 2 * i);
        rows_of[i] = min(row + int(cute::get<0>(at)), rows - 1);
        columns_of[i] = min(column + int(cute::get<1>(at)), columns - 2);
        x_scale[i] = params.x_scale[rows_of[i] * params.x_scale_step];
      }
      load_floats<2>(params.w_scale, Format::f32, columns_of, loads_whole(params.w_scale, 0, Format::f32, 2), w_scale);
      float added[kCount] = {};
      if (params.bias) {
        load_floats<2>(params.bias, params.bias_format, columns_of, loads_whole(params.bias, 0, params.bias_format, 2),
                       added);
      }
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kCount; ++i) y[i] = scaled(totals[i], w_scale[i], x_scale[i / 2], added[i]);
      if (params.residual.data) {
        const EpilogueMatrix& from = params.residual;
        int64_t at[kPairs];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kPairs; ++i) at[i] = rows_of[i] * from.ld + columns_of[i];
        load_floats<2>(from.data, from.format, at, loads_whole(from.data, from.ld, from.format, 2), added);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kCount; ++i) y[i] = sum(y[i], added[i]);
      }
      activate_all(params.activation, y);
      return converted(y);
    }

    template <int kCount>
    CUTLASS_DEVICE cutlass::Array<Out, kCount> converted(const float (&y)[kCount]) const {
      cutlass::Array<Out, kCount> out;
      if constexpr (sizeof(Out) == 4) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kCount; ++i) out[i] = y[i];
      } else if constexpr (sizeof(Out) == 2) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kCount; i += 2) {
          const uint32_t pair = packed(y[i], y[i + 1], params.out.format);
          out[i] = uint16_t(pair);
          out[i + 1] = uint16_t(pair >> 16);
        }
      } else {
        const float inverse = inverse_of(*params.out_scale);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kCount; ++i) out[i] = code_of(y[i], inverse);
      }
      return out;
    }
  };

  template <bool kReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::ConsumerStoreArgs<Args...>& args) {
    const int rows = cute::get<0>(args.problem_shape_mnkl), columns = cute::get<1>(args.problem_shape_mnkl);
    // The residue is the way from the thread's first element to the corner.
    return Callbacks(args.tCcD, rows - int(cute::get<0>(args.residue_tCcD)),
                     columns - int(cute::get<1>(args.residue_tCcD)), rows, columns, *params);
  }
};

template <class Tile, class Out>
cudaError_t run(const Int8GemmArgs& args) {
  using cute::Int;
  using Block = cute::Shape<Int<Tile::kRows>, Int<Tile::kChannels>, Int<Tile::kK>>;
  using Cluster = cute::Shape<Int<Tile::kClusterRows>, Int<Tile::kClusterChannels>, cute::_1>;
  constexpr bool kCooperative = Tile::kCooperative;
  using MainSchedule = std::conditional_t<kCooperative, cutlass::gemm::KernelTmaWarpSpecializedCooperative,
                                          cutlass::gemm::KernelTmaWarpSpecializedPingpong>;
  using EndSchedule = std::conditional_t<kCooperative, cutlass::epilogue::TmaWarpSpecializedCooperative,
                                         cutlass::epilogue::TmaWarpSpecialized>;
  using End = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Block, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float, void, cutlass::layout::RowMajor,
      kInt8GemmAlignment / sizeof(Out), Out, cutlass::layout::RowMajor, kInt8GemmAlignment / sizeof(Out), EndSchedule,
      Finish<Out>>::CollectiveOp;
  using Main = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, kInt8GemmAlignment,
      int8_t, cutlass::layout::ColumnMajor, kInt8GemmAlignment, int32_t, Block, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename End::SharedStorage))>,
      MainSchedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Main, End,
                                                      cutlass::gemm::PersistentScheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  const auto rows_of = [](int64_t ld) { return cute::make_stride(ld, cute::_1{}, int64_t{0}); };
  typename Gemm::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {args.rows, args.channels, args.k, 1},
      {args.codes, rows_of(args.ld_codes), args.weight, rows_of(args.ld_weight)},
      {args.epilogue, nullptr, {}, static_cast<Out*>(args.epilogue.out.data), rows_of(args.epilogue.out.ld)},
      {}};
  arguments.hw_info.sm_count = args.multiprocessors;
  Gemm gemm;
  if (gemm.initialize(arguments, nullptr, args.stream) != cutlass::Status::kSuccess ||
      gemm.run(args.stream) != cutlass::Status::kSuccess) {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? cudaErrorInvalidValue : error;
  }
  return cudaSuccess;
}

template <class Tile>
cudaError_t run_for_output(const Int8GemmArgs& args) {
  switch (bytes_of(args.epilogue.out.format)) {
    case 4: return run<Tile, float>(args);
    case 2: return run<Tile, uint16_t>(args);
    default: return run<Tile, int8_t>(args);
  }
}

}  // namespace

cudaError_t int8_gemm_sm90(const Int8GemmArgs& args) {
  if (args.rows <= tuning::Int8FewRowsSm90::kRows) return run_for_output<tuning::Int8FewRowsSm90>(args);
  using Large = tuning::Int8LargeSm90;
  if (args.rows >= Large::kLeastRows && tuning::fills<Large>(args.rows, args.channels, args.multiprocessors))
    return run_for_output<Large>(args);
  return run_for_output<tuning::Int8MediumSm90>(args);
}

}  // namespace lamina::cuda
