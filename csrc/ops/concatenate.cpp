#include "ops/concatenate.h"

#include "ops/checks.h"
#include "ops/copy.h"
#include "ops/strided.h"

namespace lamina {
namespace {

constexpr const char* kOp = "concatenate";

}  // namespace

void concatenate(const std::vector<TensorView>& tensors, int64_t dim, const TensorView& out) {
  check(!tensors.empty(), kOp, "tensors is empty, but must hold at least one");
  check(out.ndim > 0 && out.ndim <= kMostDims, kOp, "out has ", out.ndim, " dimensions, but must have 1 to ",
        kMostDims);
  check(dim >= -out.ndim && dim < out.ndim, kOp, "dim is ", dim, ", but tensors have ", out.ndim, " dimensions");
  const int along = int(dim < 0 ? dim + out.ndim : dim);
  int64_t total = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorView& t = tensors[i];
    bool fits = t.dtype == out.dtype && t.ndim == out.ndim;
    for (int d = 0; fits && d < t.ndim; ++d) fits = d == along || t.shape[d] == out.shape[d];
    check(fits, kOp, "tensors[", i, "] is ", describe(t), ", but must be ", describe(out), " except in dimension ",
          along);
    total += t.shape[along];
  }
  check(total == out.shape[along], kOp, "out has ", out.shape[along], " in dimension ", along, ", but tensors have ",
        total);
  int64_t at = 0;
  for (const TensorView& t : tensors) {
    TensorView slice = t;
    slice.data = out.as<char>() + at * out.strides[along] * dtype_bytes(out.dtype);
    slice.strides = out.strides;
    copy(t, slice);
    at += t.shape[along];
  }
}

}  // namespace lamina
