// int8_winograd on vpdpwssd: 32 multiply-adds an instruction, one instruction a cycle.
#include "cpu/kernels/int8_winograd_block.h"

namespace lamina::LAMINA_ISA {
namespace {

REGISTER_KERNEL(int8_winograd_inputs_table, int8_winograd_inputs);
REGISTER_KERNEL(int8_winograd_weights_table, int8_winograd_weights);
REGISTER_KERNEL(int8_winograd_outputs_table, int8_winograd_outputs);

}  // namespace
}  // namespace lamina::LAMINA_ISA
