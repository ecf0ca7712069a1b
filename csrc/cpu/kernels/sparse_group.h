// The unit of a packed sparse weight that kernels see; ops/sparse_format.h has the whole.
#pragma once

#include <stdint.h>

namespace lamina {

// Channels group * rows ... of a slab and how many blocks they have in a chunk.
struct SparseGroup {
  uint16_t group;
  uint16_t count;
};

}  // namespace lamina
