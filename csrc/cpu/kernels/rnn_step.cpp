// rnn_step: the tiles of rnn_tile.h, one after the other.
#include "cpu/kernels/rnn_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

REGISTER_KERNEL(rnn_step_f32_table, rnn_step<float>);
REGISTER_KERNEL(rnn_step_bf16_table, rnn_step<bf16>);
REGISTER_KERNEL(rnn_step_int8_table, rnn_step<int8_t>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
