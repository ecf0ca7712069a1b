// rnn_step of int8 weights on vpdpbusd: the portable tiles, with the instruction that vec/dot.h has for them.
#include "cpu/kernels/rnn_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

REGISTER_KERNEL(rnn_step_int8_table, rnn_step<int8_t>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
