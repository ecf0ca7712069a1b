#include "ops/copy.h"

#include <algorithm>

#include "cpu/kernels/copy.h"
#include "cpu/tuning/copy.h"
#include "ops/checks.h"
#include "ops/parallel.h"
#include "ops/strided.h"

namespace lamina {

constinit const KernelTable<void(const CopyArgs&)> copy_table;
constinit const KernelTable<void(const CopyRowsArgs&)> copy_rows_table;

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

// The part [begin, end) of a box in one of its dimensions.
CopyArgs copy_part(const CopyArgs& box, int dim, int64_t begin, int64_t end) {
  CopyArgs part = box;
  part.sizes[dim] = end - begin;
  part.x = static_cast<const char*>(box.x) + begin * box.x_strides[dim] * box.x_bytes;
  part.out = static_cast<char*>(box.out) + begin * box.out_strides[dim] * box.out_bytes;
  return part;
}

}  // namespace

CopyArgs copy_args(const TensorView& x, const TensorView& out) {
  check(x.ndim == out.ndim && std::equal(x.shape, x.shape + x.ndim, out.shape), kOp, "out is ", describe(out),
        ", but must have the shape of x, ", describe(x));
  check(x.ndim <= kMostDims, kOp, "x has ", x.ndim, " dimensions, but at most ", kMostDims, " are taken");
  CopyArgs box = {};
  box.x_bytes = size_of("x", x);
  box.out_bytes = size_of("out", out);
  box.x_format = box.out_format = bytes(box.x_bytes);
  if (x.dtype != out.dtype) {
    box.x_format = format_of(x.dtype);
    box.out_format = format_of(out.dtype);
    check(copies_from(box.x_format, box.out_format), kOp, "x is ", dtype_name(x.dtype), " and out ",
          dtype_name(out.dtype), "; conversions go between float32, int32, int64 and bool, between float32, ",
          "bfloat16, float16 and bool, and from int8 to these four");
  }
  if (out.numel() == 0) return box;
  check(!repeats_memory(out), kOp, "out is expanded; use memory of its own for each element");

  int64_t strides[2][kMostDims], walked[2][kMostDims];
  std::copy_n(out.strides, out.ndim, strides[0]);
  std::copy_n(x.strides, x.ndim, strides[1]);
  box.dims = collapse_dims(out.ndim, out.shape, 2, strides, box.sizes, walked);
  std::copy_n(walked[0], box.dims, box.out_strides);
  std::copy_n(walked[1], box.dims, box.x_strides);
  if (box.dims == 1) {
    box.dims = 2;
    box.sizes[1] = 1;
  }
  if (box.x_strides[0] != 1) {
    for (int d = 1; d < box.dims; ++d) {
      if (box.x_strides[d] == 1 && box.sizes[d] > 1) box.x_inner = d;
    }
  }
  box.x = x.data;
  box.out = out.data;
  return box;
}

void copy_box(const CopyArgs& box) {
  if (box.dims == 0) return;
  const auto kernel = copy_table.get();
  // Threads share the dimension of most pieces.
  int dim = 0;
  int64_t elements = box.sizes[0];
  for (int d = 1; d < box.dims; ++d) {
    elements *= box.sizes[d];
    if (units_of(box, d) >= units_of(box, dim)) dim = d;
  }
  const int64_t unit = unit_of(box, dim), units = units_of(box, dim);
  const int64_t work = std::max<int64_t>(1, elements * (box.x_bytes + box.out_bytes) / units);
  parallel_ranges(units, std::max<int64_t>(1, tuning::kCopyBytesPerThread / work), [&](int64_t begin, int64_t end) {
    kernel(copy_part(box, dim, begin * unit, std::min(box.sizes[dim], end * unit)));
  });
}

void copy(const TensorView& x, const TensorView& out) { copy_box(copy_args(x, out)); }

}  // namespace lamina
