#include "ops/copy.h"

#include <algorithm>

#include "cpu/kernels/copy.h"
#include "cpu/tuning/copy.h"
#include "ops/checks.h"
#include "ops/parallel.h"
#include "ops/strided.h"

namespace lamina {

constinit const KernelTable<void(const CopyArgs&)> copy_table;

namespace {

constexpr const char* kOp = "copy";
static_assert(kMostDims == kCopyDims);

int size_of(const char* what, const TensorView& t) {
  check(t.dtype != DType::other, kOp, what, " is of ", dtype_name(t.dtype),
        "; use floating-point numbers of 2 to 8 bytes, signed integers, uint8 or bool");
  return dtype_bytes(t.dtype);
}

CopyFormat format_of(DType dtype) {
  switch (dtype) {
    case DType::float32: return CopyFormat::f32;
    case DType::bfloat16: return CopyFormat::b16;
    case DType::float16: return CopyFormat::f16;
    case DType::boolean: return CopyFormat::boolean;
    case DType::int8: return CopyFormat::int8;
    case DType::int32: return CopyFormat::int32;
    case DType::int64: return CopyFormat::int64;
    default: return CopyFormat::bytes8;
  }
}

CopyFormat bytes(int size) {
  return size == 1   ? CopyFormat::bytes1
         : size == 2 ? CopyFormat::bytes2
         : size == 4 ? CopyFormat::bytes4
                     : CopyFormat::bytes8;
}

// Pieces begin at whole cache lines of a run and whole squares of a transposition.
int64_t unit_of(const CopyArgs& a, int dim) { return dim == 0 || dim == a.x_inner ? 64 : 1; }

int64_t units_of(const CopyArgs& a, int dim) { return (a.sizes[dim] + unit_of(a, dim) - 1) / unit_of(a, dim); }

}  // namespace

void copy(const TensorView& x, const TensorView& out) {
  check(x.ndim == out.ndim && std::equal(x.shape, x.shape + x.ndim, out.shape), kOp, "out is ", describe(out),
        ", but must have the shape of x, ", describe(x));
  check(x.ndim <= kMostDims, kOp, "x has ", x.ndim, " dimensions, but at most ", kMostDims, " are taken");
  const int x_size = size_of("x", x), out_size = size_of("out", out);
  CopyArgs all = {};
  all.x_format = all.out_format = bytes(x_size);
  if (x.dtype != out.dtype) {
    all.x_format = format_of(x.dtype);
    all.out_format = format_of(out.dtype);
    check(copies_from(all.x_format, all.out_format), kOp, "x is ", dtype_name(x.dtype), " and out ",
          dtype_name(out.dtype), "; conversions go between float32, int32, int64 and bool, between float32, ",
          "bfloat16, float16 and bool, and from int8 to these four");
  }
  if (out.numel() == 0) return;
  check(!repeats_memory(out), kOp, "out is expanded; use memory of its own for each element");

  int64_t strides[2][kMostDims], walked[2][kMostDims];
  std::copy_n(out.strides, out.ndim, strides[0]);
  std::copy_n(x.strides, x.ndim, strides[1]);
  all.dims = collapse_dims(out.ndim, out.shape, 2, strides, all.sizes, walked);
  std::copy_n(walked[0], all.dims, all.out_strides);
  std::copy_n(walked[1], all.dims, all.x_strides);
  if (all.dims == 1) {
    all.dims = 2;
    all.sizes[1] = 1;
  }
  if (all.x_strides[0] != 1) {
    for (int d = 1; d < all.dims; ++d) {
      if (all.x_strides[d] == 1 && all.sizes[d] > 1) all.x_inner = d;
    }
  }
  all.x = x.data;
  all.out = out.data;

  const auto kernel = copy_table.get();
  // Threads share the dimension of most pieces.
  int dim = 0;
  for (int d = 1; d < all.dims; ++d) {
    if (units_of(all, d) >= units_of(all, dim)) dim = d;
  }
  const int64_t unit = unit_of(all, dim), units = units_of(all, dim);
  const int64_t work = out.numel() * (x_size + out_size) / units;
  parallel_ranges(units, std::max<int64_t>(1, tuning::kCopyBytesPerThread / std::max<int64_t>(1, work)),
                  [&](int64_t begin, int64_t end) {
                    const int64_t first = begin * unit;
                    CopyArgs share = all;
                    share.sizes[dim] = std::min(all.sizes[dim], end * unit) - first;
                    share.x = static_cast<const char*>(all.x) + first * all.x_strides[dim] * x_size;
                    share.out = static_cast<char*>(all.out) + first * all.out_strides[dim] * out_size;
                    kernel(share);
                  });
}

}  // namespace lamina
