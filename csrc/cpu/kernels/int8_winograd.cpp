// int8_winograd wherever there is no instruction that adds products of words to a sum.
#include "cpu/kernels/int8_winograd_block.h"

namespace lamina::LAMINA_ISA {
namespace {

REGISTER_KERNEL(int8_winograd_inputs_table, int8_winograd_inputs);
REGISTER_KERNEL(int8_winograd_weights_table, int8_winograd_weights);
REGISTER_KERNEL(int8_winograd_outputs_table, int8_winograd_outputs);

}  // namespace
}  // namespace lamina::LAMINA_ISA
