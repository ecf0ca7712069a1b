// The packed form of a sparse weight [n, k], which all sparse ops share: its blocks that hold a value other than zero.
//
// A block is `rows` output channels x `columns` inputs ("4x1", "1x4", ...; "unstructured" is 1 x 1); channels and
// inputs beyond the weight's edge count as zeros, so that any pattern fits any shape. The form is one tensor of bytes,
// little endian, each section on a multiple of 64:
//
//   SparseHeader
//   uint32 [slabs + 1]               blocks before each slab of channels: threads share the work by them
//   uint32 [inputs / k_block, slabs] + 1   blocks before each chunk: the blocks of one slab in one range of inputs
//   uint32 [inputs / k_block, slabs] + 1   groups before each chunk
//   SparseGroup [groups]             the channels of a chunk that share blocks, those with most blocks first, so that
//                                    a loop over a group's blocks ends as the one before it did
//   uint16 [blocks]                  inputs of a block, counted in `columns` from the start of the chunk's range
//   values [blocks, rows, columns]
//
// Where kernels take several blocks at a time, those of a group are filled up with blocks of zeros, which lie where its
// last block does.
//
// The first range of inputs lists all groups of a slab, the others only those with blocks.
#pragma once

#include <initializer_list>
#include <string>

#include "cpu/kernels/sparse_group.h"
#include "ops/tensor.h"

namespace lamina {

struct SparseHeader {
  static constexpr char kMagic[8] = {'l', 'a', 'm', 's', 'p', 'a', 'r', 's'};
  static constexpr uint32_t kVersion = 1;

  char magic[8];
  uint32_t version;
  uint32_t k_block;  // inputs of a chunk, a multiple of columns; the last range may have fewer
  uint32_t slab;     // channels of a chunk, a multiple of rows; the last slab may have fewer
  uint32_t step;     // the blocks of a group are filled up to a multiple of this with blocks of zeros
  char pattern[16];  // "unstructured", "2x1", ..., padded with zero bytes
  char dtype[16];    // of the values, as dtype_name() says it
  int64_t n, k;
  int64_t blocks, groups;
  int64_t bytes;  // of everything
  int64_t nonzeros;
};

struct SparsePattern {
  int rows = 1, columns = 1;
};

// By name, if it is one of `allowed`.
SparsePattern parse_sparse_pattern(const char* op, const std::string& name, std::initializer_list<const char*> allowed);

// How a weight is to be cut.
struct SparseCut {
  std::string pattern;
  SparsePattern shape;
  int64_t k_block, slab;
  int64_t step = 1;
};

// A packed weight in memory; valid as long as the tensor it lies in.
struct SparseForm {
  SparseHeader header;
  SparsePattern pattern;
  DType dtype = DType::other;
  int64_t slabs = 0, k_blocks = 0;
  const uint32_t* slab_first = nullptr;
  const uint32_t* chunk_first = nullptr;
  const uint32_t* group_first = nullptr;
  const SparseGroup* groups = nullptr;
  const uint16_t* index = nullptr;
  const uint8_t* values = nullptr;

  int64_t n() const { return header.n; }
  int64_t k() const { return header.k; }
  int64_t value_bytes() const;  // of a block
  int64_t channels(int64_t slab) const;
  int64_t inputs(int64_t k_block) const;
  // The first slab of share `part` of `parts` with about as many blocks each; `slabs` for part == parts.
  int64_t slab_at(int64_t part, int64_t parts) const;
};

// Bytes of the packed form of weight [n, k], float32, bfloat16 or int8, any strides.
int64_t sparse_packed_size(const char* op, const TensorView& weight, const SparseCut& cut);

// weight -> data uint8 [sparse_packed_size]. A block is kept if any of its values is not zero.
void sparse_pack(const char* op, const TensorView& weight, const SparseCut& cut, const TensorView& data);

// A packed weight as it lies in `data`, whose header is checked, but not what the sections hold. FormatError says
// what is wrong: a foreign or truncated tensor, another version, pattern or dtype.
SparseForm open_sparse(const char* op, const TensorView& data, std::initializer_list<const char*> patterns,
                       std::initializer_list<DType> dtypes);

// Checks all that open_sparse does not: with damaged sections a kernel would read and write where it must not.
void check_sparse_sections(const char* op, const SparseForm& form);

// The inverse of sparse_pack: weight [n, k] of the values' dtype, contiguous.
void sparse_unpack(const char* op, const SparseForm& form, const TensorView& weight);

}  // namespace lamina
