#include "ops/cuda/int8_linear.h"

#include <array>
#include <atomic>
#include <cstdint>

#include "cuda/int8_gemm.h"
#include "cuda/launch.h"
#include "ops/checks.h"
#include "ops/epilogue.h"
#include "ops/int8_operands.h"

namespace lamina {
namespace {

constexpr const char* kOp = "int8_linear_cuda";
constexpr int64_t kAlignment = cuda::kInt8GemmAlignment;

using Gemm = cudaError_t (*)(const cuda::Int8GemmArgs&);

// The kernel for the current device, or null. What this build has code for, only the build knows; that of 8.0 serves
// newer devices as well.
Gemm kernel_of(int device) {
  const auto find = [device]() -> Gemm {
    [[maybe_unused]] int major = 0;
    cuda::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), kOp);
#ifdef LAMINA_WITH_CUTLASS_SM90
    if (major == 9) return cuda::int8_gemm_sm90;
#endif
#ifdef LAMINA_WITH_CUTLASS_SM80
    if (cuda::int8_gemm_sm80_runs_here()) return cuda::int8_gemm_sm80;
#endif
    return nullptr;
  };
  struct Known {
    std::atomic<bool> asked = false;
    std::atomic<Gemm> kernel = nullptr;
  };
  static std::array<Known, 64> devices;
  if (size_t(device) >= devices.size()) return find();
  Known& known = devices[size_t(device)];
  if (!known.asked) {
    known.kernel = find();
    known.asked = true;
  }
  return known.kernel;
}

bool rows_aligned(const TensorView& t) {
  const int64_t bytes = dtype_bytes(t.dtype);
  return reinterpret_cast<uintptr_t>(t.data) % kAlignment == 0 && (t.size(1) <= 1 || t.stride(1) == 1) &&
         (t.size(0) <= 1 || t.stride(0) * bytes % kAlignment == 0);
}

bool is_matrix(const TensorView& t) { return t.ndim == 2 && t.size(0) <= INT32_MAX && t.size(1) <= INT32_MAX; }

// Of one row, which has no next one, any stride would do; the copy engine wants a valid one.
int64_t row_stride(const TensorView& t) { return t.size(0) > 1 ? t.stride(0) : t.size(1); }

cuda::Format format_of(DType dtype) {
  switch (dtype) {
    case DType::bfloat16: return cuda::Format::b16;
    case DType::float16: return cuda::Format::f16;
    case DType::int8: return cuda::Format::int8;
    default: return cuda::Format::f32;
  }
}

void check_device(const char* what, const CudaTensorView& t, int device) {
  check(t.device == device, kOp, what, " is on cuda:", t.device, ", but codes are on cuda:", device);
}

void check_scalar(const char* what, const CudaTensorView& t) {
  check_dtype(kOp, what, t, {DType::float32});
  check_shape(kOp, what, t, {});
}

}  // namespace

bool int8_linear_fits_cuda(const CudaTensorView& codes, const CudaTensorView& weight_codes, const CudaTensorView& out) {
  for (const CudaTensorView* t : {&codes, &weight_codes, &out}) {
    if (!is_matrix(*t) || !rows_aligned(*t)) return false;
  }
  const int64_t k = codes.size(1), n = weight_codes.size(0);
  if (k == 0 || k % kAlignment != 0 || n % kAlignment != 0) return false;
  const cuda::DeviceGuard guard(codes.device);
  return kernel_of(codes.device) != nullptr;
}

void int8_linear_cuda(const CudaTensorView& codes, const CudaTensorView& weight_codes, const CudaTensorView& x_scale,
                      const CudaTensorView& w_scale, const std::optional<CudaTensorView>& bias,
                      const std::optional<CudaTensorView>& residual, const std::string& activation,
                      const std::optional<CudaTensorView>& out_scale, const CudaTensorView& out) {
  check_dtype(kOp, "codes", codes, {DType::int8});
  check_shape(kOp, "codes", codes, {-1, -1});
  const int64_t m = codes.size(0), k = codes.size(1);
  check_dtype(kOp, "weight_codes", weight_codes, {DType::int8});
  check_shape(kOp, "weight_codes", weight_codes, {-1, k});
  const int64_t n = weight_codes.size(0);
  check(k <= kInt8MaxKOfCodes, kOp, "codes have ", k, " features, but int32 sums of int8 codes are exact only up to ",
        kInt8MaxKOfCodes);
  check_dtype(kOp, "x_scale", x_scale, {DType::float32});
  if (x_scale.ndim) check_shape(kOp, "x_scale", x_scale, {m});
  check_dtype(kOp, "w_scale", w_scale, {DType::float32});
  check_shape(kOp, "w_scale", w_scale, {n});
  check_contiguous(kOp, "w_scale", w_scale);
  if (out_scale) {
    check_scalar("out_scale", *out_scale);
    check_dtype(kOp, "out", out, {DType::int8});
  } else {
    check_dtype(kOp, "out", out, {DType::float32, DType::bfloat16, DType::float16});
  }
  check_shape(kOp, "out", out, {m, n});
  check_device("weight_codes", weight_codes, codes.device);
  check_device("x_scale", x_scale, codes.device);
  check_device("w_scale", w_scale, codes.device);
  check_device("out", out, codes.device);

  cuda::Int8GemmArgs args{};
  cuda::Int8Epilogue& epilogue = args.epilogue;
  epilogue.activation = parse_activation(kOp, activation);
  if (bias) {
    check_dtype(kOp, "bias", *bias, {DType::float32, DType::bfloat16, DType::float16});
    check_shape(kOp, "bias", *bias, {n});
    check_contiguous(kOp, "bias", *bias);
    check_device("bias", *bias, codes.device);
    epilogue.bias = bias->data;
    epilogue.bias_format = format_of(bias->dtype);
  }
  if (residual) {
    check_dtype(kOp, "residual", *residual, {DType::float32, DType::bfloat16, DType::float16});
    check_shape(kOp, "residual", *residual, {m, n});
    check(n <= 1 || residual->stride(1) == 1, kOp, "the rows of residual must be contiguous");
    check_device("residual", *residual, codes.device);
    epilogue.residual = {residual->data, residual->stride(0), format_of(residual->dtype)};
  }
  if (out_scale) {
    check_device("out_scale", *out_scale, codes.device);
    epilogue.out_scale = out_scale->as<float>();
  }
  if (m == 0 || n == 0) return;
  check(int8_linear_fits_cuda(codes, weight_codes, out), kOp, "no kernel for codes ", describe(codes),
        " and weight_codes ", describe(weight_codes),
        " here; features and channels must be multiples of 16, rows start at multiples of 16 bytes, and the build "
        "have CUTLASS and code for this device");

  epilogue.x_scale = x_scale.as<float>();
  epilogue.x_scale_step = x_scale.ndim ? x_scale.stride(0) : 0;
  epilogue.w_scale = w_scale.as<float>();
  epilogue.out = {out.data, row_stride(out), format_of(out.dtype)};
  args.codes = codes.as<int8_t>();
  args.ld_codes = row_stride(codes);
  args.weight = weight_codes.as<int8_t>();
  args.ld_weight = row_stride(weight_codes);
  args.rows = int(m);
  args.channels = int(n);
  args.k = int(k);
  args.stream = static_cast<cudaStream_t>(codes.stream);
  const cuda::DeviceGuard guard(codes.device);
  cuda::check(cudaDeviceGetAttribute(&args.multiprocessors, cudaDevAttrMultiProcessorCount, codes.device), kOp);
  cuda::check(kernel_of(codes.device)(args), kOp);
}

}  // namespace lamina
