// sparse_int8: the tiles of sparse_int8_tile.h.
#include "cpu/kernels/sparse_int8_tile.h"

namespace lamina::LAMINA_ISA {
namespace {

REGISTER_KERNEL(sparse_int8_panel_table, sparse_int8_panel);
REGISTER_KERNEL(sparse_int8_table, sparse_int8);
REGISTER_KERNEL(sparse_int8_rows_table, sparse_int8_rows);
REGISTER_KERNEL(sparse_int8_to_panel_table, sparse_int8_to_panel);

}  // namespace
}  // namespace lamina::LAMINA_ISA
