// csrc/cuda/int8_epilogue.h for a test without a GPU: rows of sums to outputs, one by one.
#include "cuda/int8_epilogue.h"

using namespace lamina;

// sums [rows, channels]; bias [channels], residual [rows, channels] or null. codes [rows, channels] with an out_scale,
// else out.
extern "C" void finish(const int32_t* sums, int rows, int channels, const float* x_scale, const float* w_scale,
                       const float* bias, const float* residual, int activation, const float* out_scale, float* out,
                       int8_t* codes) {
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < channels; ++n) {
      const int at = m * channels + n;
      float y[1] = {cuda::scaled(sums[at], w_scale[n], x_scale[m], bias ? bias[n] : 0.0f)};
      if (residual) y[0] = cuda::sum(y[0], residual[at]);
      cuda::activate_all(Activation(activation), y);
      if (out_scale) {
        codes[at] = cuda::code_of(y[0], cuda::inverse_of(*out_scale));
      } else {
        out[at] = y[0];
      }
    }
  }
}
