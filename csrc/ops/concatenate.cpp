#include "ops/concatenate.h"

#include <algorithm>

#include "cpu/tuning/copy.h"
#include "ops/checks.h"
#include "ops/copy.h"
#include "ops/parallel.h"
#include "ops/strided.h"
#include "ops/workspace.h"

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
  WorkspaceFrame frame;
  CopyArgs* boxes = frame.take<CopyArgs>(tensors.size());
  int count = 0;
  int64_t at = 0;
  for (const TensorView& t : tensors) {
    TensorView slice = t;
    slice.data = out.as<char>() + at * out.strides[along] * dtype_bytes(out.dtype);
    slice.strides = out.strides;
    const CopyArgs box = copy_args(t, slice);
    if (box.dims > 0) boxes[count++] = box;
    at += t.shape[along];
  }
  if (count == 0) return;
  bool side_by_side = boxes[0].sizes[1] > 1;
  for (int i = 0; i < count; ++i) {
    const CopyArgs& box = boxes[i];
    side_by_side = side_by_side && box.dims == 2 && box.x_strides[0] == 1 && box.out_strides[0] == 1 &&
                   box.sizes[1] == boxes[0].sizes[1] && box.out_strides[1] == boxes[0].out_strides[1];
  }
  if (!side_by_side) {
    for (int i = 0; i < count; ++i) copy_box(boxes[i]);
    return;
  }
  const auto kernel = copy_rows_table.get();
  const int64_t rows = boxes[0].sizes[1], row = std::max<int64_t>(1, out.numel() / rows * dtype_bytes(out.dtype));
  parallel_ranges(rows, std::max<int64_t>(1, tuning::kCopyBytesPerThread / (2 * row)),
                  [&](int64_t begin, int64_t end) { kernel({boxes, count, begin, end}); });
}

}  // namespace lamina
