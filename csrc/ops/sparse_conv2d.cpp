#include "ops/sparse_conv2d.h"

#include "ops/checks.h"
#include "ops/epilogue.h"
#include "ops/sparse_multiply.h"

namespace lamina {
namespace {

constexpr const char* kOp = "sparse_conv2d";

struct Window {
  int64_t kernel_y, kernel_x, stride_y, stride_x, dilation_y, dilation_x, top, bottom, left, right;
};

int64_t out_size(int64_t size, int64_t padding, int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t room = size + padding - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

// The windows of output pixels as rows. A window is read tap by tap: nothing is unfolded in memory but the panel.
template <class T>
struct WindowRows {
  const TensorView& x;
  const Window& window;
  int64_t height, width;  // of the output
  const T* zeros;         // [C]

  int64_t rows() const { return x.size(0) * height * width; }

  void fill(int64_t first, int count, int columns, int64_t k, int64_t inputs, float* panel) const {
    const T* images[kSparseColumns];
    int64_t y[kSparseColumns], x0[kSparseColumns];
    for (int m = 0; m < count; ++m) {
      const int64_t pixel = (first + m) % (height * width);
      images[m] = x.as<T>() + (first + m) / (height * width) * x.stride(0);
      y[m] = pixel / width * window.stride_y - window.top;
      x0[m] = pixel % width * window.stride_x - window.left;
    }
    const int64_t channels = x.size(1), end = k + inputs;
    const T* pointers[kSparseColumns];
    while (k < end) {
      const int64_t tap = k / channels, channel = k % channels;
      const int64_t some = std::min(channels - channel, end - k);
      const int64_t down = tap / window.kernel_x * window.dilation_y, right = tap % window.kernel_x * window.dilation_x;
      for (int m = 0; m < count; ++m) {
        const int64_t iy = y[m] + down, ix = x0[m] + right;
        const bool inside = iy >= 0 && iy < x.size(2) && ix >= 0 && ix < x.size(3);
        pointers[m] = (inside ? images[m] + iy * x.stride(2) + ix * x.stride(3) : zeros) + channel;
      }
      SparseTables<T>::panel()({pointers, count, columns, some, panel});
      panel += some * columns;
      k += some;
    }
  }

  // Neighbouring windows read the same pixels, which are near already.
  void fetch(int64_t, int, int64_t, int64_t, int64_t, int64_t) const {}
};

template <class T>
void run(const SparseForm& form, const TensorView& x, const Window& window, const float* bias, Activation activation,
         const TensorView& out) {
  WorkspaceFrame frame;
  T* zeros = frame.take<T>(x.size(1));
  std::fill_n(zeros, x.size(1), T{});
  const WindowRows<T> source{x, window, out.size(2), out.size(3), zeros};
  const SparseOutput<T> to{bias, activation, out.as<T>(), form.n()};
  if (form.k_blocks == 0) return finish_sparse_without_inputs<T>(form, source.rows(), to);
  form.dtype == DType::bfloat16 ? multiply_sparse<T, bf16>(form, source, to)
                                : multiply_sparse<T, float>(form, source, to);
}

}  // namespace

void sparse_conv2d(const TensorView& x, const TensorView& data, const std::optional<TensorView>& bias,
                   const std::vector<int64_t>& geometry, const std::string& activation, const TensorView& out) {
  check_dtype(kOp, "x", x, {DType::float32, DType::bfloat16});
  check_shape(kOp, "x", x, {-1, -1, -1, -1});
  check(geometry.size() == 10, kOp, "geometry has ", geometry.size(), " numbers, but must have 10");
  const Window w{geometry[0], geometry[1], geometry[2], geometry[3], geometry[4],
                 geometry[5], geometry[6], geometry[7], geometry[8], geometry[9]};
  check(w.kernel_y > 0 && w.kernel_x > 0 && w.stride_y > 0 && w.stride_x > 0 && w.dilation_y > 0 && w.dilation_x > 0,
        kOp, "kernel, stride and dilation must be positive");
  check(w.top >= 0 && w.bottom >= 0 && w.left >= 0 && w.right >= 0, kOp, "padding must not be negative");
  const SparseForm form = open_sparse_float(kOp, data);
  const int64_t channels = x.size(1);
  check(channels * w.kernel_y * w.kernel_x == form.k(), kOp, "x has ", channels, " channels and the kernel is ",
        w.kernel_y, " x ", w.kernel_x, ", but packed_weight was packed for ", form.k(), " inputs of a window");
  check(channels <= 1 || x.stride(1) == 1, kOp, "the channels of x must be adjacent");
  const int64_t height = out_size(x.size(2), w.top + w.bottom, w.kernel_y, w.stride_y, w.dilation_y);
  const int64_t width = out_size(x.size(3), w.left + w.right, w.kernel_x, w.stride_x, w.dilation_x);
  check(height > 0 && width > 0, kOp, "the kernel does not fit into images of ", x.size(2), " x ", x.size(3),
        " pixels");
  check_dtype(kOp, "out", out, {x.dtype});
  check_shape(kOp, "out", out, {x.size(0), form.n(), height, width});
  const bool last = (form.n() <= 1 || out.stride(1) == 1) && (width <= 1 || out.stride(3) == form.n()) &&
                    (height <= 1 || out.stride(2) == form.n() * width) &&
                    (x.size(0) <= 1 || out.stride(0) == form.n() * width * height);
  check(last, kOp, "out must be channels_last");
  WorkspaceFrame frame;
  const float* bias_data = bias ? float_bias(kOp, *bias, form.n(), frame) : nullptr;
  const Activation act = parse_activation(kOp, activation);
  if (x.size(0) == 0 || form.n() == 0) return;
  x.dtype == DType::bfloat16 ? run<bf16>(form, x, w, bias_data, act, out) : run<float>(form, x, w, bias_data, act, out);
}

}  // namespace lamina
