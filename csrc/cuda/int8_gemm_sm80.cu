// int8_gemm with mma.sync: A and B stream through shared memory by cp.async, several stages ahead; the epilogue takes
// the sums through shared memory, so that each thread ends up with eight channels of a row and whole sectors are
// written. That epilogue is one visitor of CUTLASS, which also stores: formats stay run-time values, and one kernel of
// each tile size does everything.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

// Does not include all that it needs, so it comes after the others.
#include <cutlass/epilogue/threadblock/fusion/visitor_2x.hpp>

#include "cuda/int8_gemm.h"
#include "cuda/tile_sizes.h"

namespace lamina::cuda {
namespace {

using cutlass::gemm::GemmShape;

constexpr int kVector = 8;  // channels that a thread finishes at once

// Finishes kVector sums at a time and writes them.
template <class ThreadMap>
struct Finish {
  using Arguments = Int8Epilogue;
  using Params = Int8Epilogue;
  struct SharedStorage {};

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(const ProblemShape&, const Arguments& args, void*) {
    return args;
  }
  template <class ProblemShape>
  static size_t get_workspace_size(const ProblemShape&, const Arguments&) {
    return 0;
  }

  Finish() = default;
  CUTLASS_HOST_DEVICE Finish(const Params& params, const SharedStorage&) : params(&params) {}

  const Params* params = nullptr;

  static constexpr int kColumns = ThreadMap::Iterations::kColumn;

  template <class Coordinates, class ProblemShape>
  struct Callbacks : cutlass::epilogue::threadblock::detail::EmptyCallbacks {
    CUTLASS_DEVICE Callbacks(Coordinates coordinates, ProblemShape shape, const Params& params)
        : coordinates(coordinates), shape(shape), params(params) {}

    Coordinates coordinates;  // (column, row, step) -> (m, n, batch) of the first of kVector sums
    ProblemShape shape;
    const Params& params;
    // A thread stays in its columns.
    float w_scale[kColumns][kVector], bias[kColumns][kVector], inverse;

    CUTLASS_DEVICE void begin_epilogue() {
      inverse = params.out.format == Format::int8 ? inverse_of(*params.out_scale) : 0.0f;
      CUTLASS_PRAGMA_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        const int n = cute::get<1>(coordinates(c, 0, 0));
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kVector; ++i) bias[c][i] = 0.0f;
        if (n >= cute::get<1>(shape)) continue;
        const int64_t at[1] = {n};
        load_floats<kVector>(params.w_scale, Format::f32, at, loads_whole(params.w_scale, 0, Format::f32, kVector),
                             w_scale[c]);
        if (!params.bias) continue;
        load_floats<kVector>(params.bias, params.bias_format, at,
                             loads_whole(params.bias, 0, params.bias_format, kVector), bias[c]);
      }
    }

    template <class Accumulator, int kCount>
    CUTLASS_DEVICE auto visit(int step, int row, int column, int, const cutlass::Array<Accumulator, kCount>& totals) {
      static_assert(kCount == kVector);
      const auto at = coordinates(column, row, step);
      const int m = cute::get<0>(at), n = cute::get<1>(at);
      if (m < cute::get<0>(shape) && n < cute::get<1>(shape)) finish(m, n, column, totals);
      return totals;
    }

    template <class Totals>
    CUTLASS_DEVICE void finish(int64_t m, int n, int column, const Totals& totals) {
      const float x_scale = params.x_scale[m * params.x_scale_step];
      float y[kVector];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kVector; ++i) y[i] = scaled(totals[i], w_scale[column][i], x_scale, bias[column][i]);
      if (params.residual.data) {
        const EpilogueMatrix& from = params.residual;
        const int64_t at[1] = {m * from.ld + n};
        float residual[kVector];
        load_floats<kVector>(from.data, from.format, at, loads_whole(from.data, from.ld, from.format, kVector),
                             residual);
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kVector; ++i) y[i] = sum(y[i], residual[i]);
      }
      activate_all(params.activation, y);
      const int64_t to = m * params.out.ld + n;
      if (params.out.format == Format::f32) {
        float4* out = reinterpret_cast<float4*>(static_cast<float*>(params.out.data) + to);
        out[0] = make_float4(y[0], y[1], y[2], y[3]);
        out[1] = make_float4(y[4], y[5], y[6], y[7]);
      } else if (params.out.format == Format::int8) {
        uint2 codes = {0, 0};
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) {
          codes.x |= uint32_t(uint8_t(code_of(y[i], inverse))) << (8 * i);
          codes.y |= uint32_t(uint8_t(code_of(y[i + 4], inverse))) << (8 * i);
        }
        *reinterpret_cast<uint2*>(static_cast<int8_t*>(params.out.data) + to) = codes;
      } else {
        const Format format = params.out.format;
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(params.out.data) + to) =
            make_uint4(packed(y[0], y[1], format), packed(y[2], y[3], format), packed(y[4], y[5], format),
                       packed(y[6], y[7], format));
      }
    }
  };

  template <class ProblemShape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
    const auto all = cute::make_identity_tensor(shape);
    // (column, row, (step in rows, groups and clusters)), the first element of each vector
    const auto coordinates = cute::group_modes<2, 5>(
        ThreadMap::partition(all, thread, tile)(cute::_0{}, cute::_, cute::_, cute::_, cute::_, cute::_));
    return Callbacks<std::remove_const_t<decltype(coordinates)>, ProblemShape>(coordinates, shape, *params);
  }
};

template <class Tile>
struct GemmOf {
  using Block = GemmShape<Tile::kRows, Tile::kChannels, Tile::kK>;
  using Warp = GemmShape<Tile::kWarpRows, Tile::kWarpChannels, Tile::kWarpK>;
  // Its element is that of no operand: 16 bits say how sums travel through shared memory, kVector of them to a thread.
  using Carrier = cutlass::bfloat16_t;
  using ThreadMap = cutlass::epilogue::threadblock::OutputTileThreadLayout<Block, Warp, Carrier, kVector, 1>;
  using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
      int8_t, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, kInt8GemmAlignment,     //
      int8_t, cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, kInt8GemmAlignment,  //
      Carrier, cutlass::layout::RowMajor, kVector, int32_t, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
      Block, Warp, GemmShape<16, 8, 32>, Finish<ThreadMap>,
      cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, Tile::kStages,
      cutlass::arch::OpMultiplyAddSaturate, 1>::GemmKernel;
};

template <class Tile>
cudaError_t run(const Int8GemmArgs& args) {
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<typename GemmOf<Tile>::Kernel>;
  const typename Gemm::Arguments arguments(cutlass::gemm::GemmUniversalMode::kGemm, {args.rows, args.channels, args.k},
                                           1, args.epilogue, args.codes, args.weight, nullptr, nullptr, 0, 0, 0, 0,
                                           args.ld_codes, args.ld_weight, args.channels, args.channels);
  Gemm gemm;
  if (gemm.initialize(arguments, nullptr, args.stream) != cutlass::Status::kSuccess ||
      gemm.run(args.stream) != cutlass::Status::kSuccess) {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? cudaErrorInvalidValue : error;
  }
  return cudaSuccess;
}

}  // namespace

bool int8_gemm_sm80_runs_here() {
  cudaFuncAttributes attributes;
  const auto kernel = cutlass::Kernel2<typename GemmOf<tuning::Int8MediumSm80>::Kernel>;
  const bool runs = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
  if (!runs) cudaGetLastError();  // it is an answer and no error
  return runs;
}

cudaError_t int8_gemm_sm80(const Int8GemmArgs& args) {
  if (args.rows <= tuning::Int8FewRowsSm80::kRows) return run<tuning::Int8FewRowsSm80>(args);
  using Large = tuning::Int8LargeSm80;
  if (tuning::fills<Large>(args.rows, args.channels, args.multiprocessors)) return run<Large>(args);
  return run<tuning::Int8MediumSm80>(args);
}

}  // namespace lamina::cuda
