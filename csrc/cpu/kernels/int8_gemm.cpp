// int8_gemm in plain C++: the variant that exists everywhere, and the one the others are compared with bit by bit.
#include "cpu/kernels/int8_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

void int8_gemm(const Int8GemmArgs& a) {
  int32_t sums[tuning::kInt8PanelChannels];
  for_each_panel(a, 0, [&](const int8_t* panel, int64_t first, int channels, int width) {
    for (int64_t row = 0; row < a.rows; ++row) {
      for (int n = 0; n < width; ++n) sums[n] = 0;
      for (int64_t k = 0; k < a.k_padded; k += 4) {
        const uint8_t* x = a.codes + row * a.ld_codes + k;
        const int8_t* w = panel + k * width;
        for (int n = 0; n < width; ++n) {
          const int32_t four = x[0] * w[4 * n] + x[1] * w[4 * n + 1] + x[2] * w[4 * n + 2] + x[3] * w[4 * n + 3];
          sums[n] = int32_t(uint32_t(sums[n]) + uint32_t(four));  // wraps around, see [NOTE] s8s8 compensation
        }
      }
      finish_tile(a, sums, {row, first, 1, channels, width});
    }
  });
}

REGISTER_KERNEL(int8_gemm_table, int8_gemm);

}  // namespace
}  // namespace lamina::LAMINA_ISA
