// panel_gemm: the tiles of panel_tile.h, one after the other.
#include "cpu/kernels/panel_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

REGISTER_KERNEL(panel_gemm_f32_table, panel_gemm<float>);
REGISTER_KERNEL(panel_gemm_bf16_table, panel_gemm<bf16>);
REGISTER_KERNEL(panel_gemm_int8_table, panel_gemm<int8_t>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
