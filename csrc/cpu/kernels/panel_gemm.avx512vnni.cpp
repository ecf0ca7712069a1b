// panel_gemm of int8 weights on vpdpbusd: the portable tiles, with the instruction that vec/dot.h has for them.
#include "cpu/kernels/panel_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

REGISTER_KERNEL(panel_gemm_int8_table, panel_gemm<int8_t>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
