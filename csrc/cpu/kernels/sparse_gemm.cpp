// sparse_gemm on the vector vocabulary.
//
// The sums of one group of channels stay in registers while its blocks pass: a block loads its input's columns once for
// all channels that share it. With blocks of one channel that is a load for each multiply-add, all that two load ports
// of 256 bits can do; so four weights come with one load, and a shuffle gives each to all lanes.
#include "cpu/kernels/sparse_gemm.h"

#include "cpu/tuning/sparse_gemm.h"
#include "cpu/vec/activate.h"
#include "cpu/vec/four.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kLanes = F32::lanes;
// Registers of columns: for one channel the columns are operands in memory; for more they are registers too.
constexpr int kWidest1 = kSparseColumns / kLanes < 8 ? kSparseColumns / kLanes : 8;
constexpr int kWidest2 = 4;
constexpr int kWidest4 = F32::registers >= 32 ? 4 : 2;
// bfloat16 values become floats in pieces of so many blocks.
constexpr int kPiece = 64;

SparseColumns sparse_columns(int rows) {
  return {kLanes, (rows == 1 ? kWidest1 : rows == 2 ? kWidest2 : kWidest4) * kLanes};
}

// -- panels

template <class T>
void sparse_panel(const SparsePanelArgs<T>& a) {
  for (int m = 0; m < a.columns; m += kLanes) {
    const int rows = a.count - m < kLanes ? a.count - m : kLanes;
    for (int64_t k = 0; k < a.k; k += kLanes) {
      const int inputs = a.k - k < kLanes ? int(a.k - k) : kLanes;
      F32 tile[kLanes];
      if (rows == kLanes && inputs == kLanes) {
        LAMINA_UNROLL
        for (int i = 0; i < kLanes; ++i) tile[i] = load(a.rows[m + i] + k);
      } else {
        LAMINA_UNROLL
        for (int i = 0; i < kLanes; ++i) tile[i] = i < rows ? load_up_to(a.rows[m + i] + k, inputs) : zero();
      }
      transpose(tile);
      float* to = a.panel + k * a.columns + m;
      if (inputs == kLanes) {
        LAMINA_UNROLL
        for (int i = 0; i < kLanes; ++i) store(to + i * a.columns, tile[i]);
      } else {
        for (int i = 0; i < inputs; ++i) store(to + i * a.columns, tile[i]);
      }
    }
  }
}

// -- sums of a group

LAMINA_INLINE void fetch_ahead(const float* values) {
  __builtin_prefetch(reinterpret_cast<const char*>(values) + tuning::kSparseAhead, 0, 2);
}

// Calls body(values as floats, first block, blocks) for a group's blocks of R values, bfloat16 ones in pieces.
template <int R, class V, class Body>
LAMINA_INLINE void in_pieces(const V* values, int count, const Body& body) {
  if constexpr (sizeof(V) == sizeof(float)) {
    body(values, 0, count);
  } else {
    float buffer[kPiece * R + kLanes];
    for (int b = 0; b < count; b += kPiece) {
      const int blocks = count - b < kPiece ? count - b : kPiece;
      for (int i = 0; i < blocks * R; i += kLanes) store(buffer + i, load(values + b * R + i));
      body(buffer, b, blocks);
    }
  }
}

// Blocks that are summed apart, so that as many multiply-adds are under way as their latency takes.
template <int R, int Z>
constexpr int kChains = R * Z >= 8   ? 1
                        : R * Z >= 4 ? 2
                                     : 4;

template <int R, int Z>
struct Sums {
  F32 r[kChains<R, Z>][R][Z];
};

template <int R, int Z, int Chain>
LAMINA_INLINE void add_block(Sums<R, Z>& sums, const float* x, F32 (&w)[R]) {
  LAMINA_UNROLL
  for (int z = 0; z < Z; ++z) {
    const F32 columns = load(x + z * kLanes);
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) sums.r[Chain][r][z] = fmadd(w[r], columns, sums.r[Chain][r][z]);
  }
}

// The next block, with a broadcast of each of its values.
template <int R, int Z, int Chain>
LAMINA_INLINE void add_chain(Sums<R, Z>& sums, const float*& values, const uint16_t*& index, const float* x) {
  F32 w[R];
  fetch_ahead(values);
  LAMINA_UNROLL
  for (int r = 0; r < R; ++r) w[r] = set1(values[r]);
  add_block<R, Z, Chain>(sums, x + *index * (Z * kLanes), w);
  values += R;
  ++index;
}

template <int R, int Z, int Chain = 0>
LAMINA_INLINE void add_chains(Sums<R, Z>& sums, const float*& values, const uint16_t*& index, const float* x) {
  add_chain<R, Z, Chain>(sums, values, index, x);
  if constexpr (Chain + 1 < kChains<R, Z>) add_chains<R, Z, Chain + 1>(sums, values, index, x);
}

template <int R, int Z>
LAMINA_INLINE void add_blocks(Sums<R, Z>& sums, const float* values, const uint16_t* index, int count, const float* x) {
  constexpr int kColumns = Z * kLanes, kLast = kChains<R, Z> - 1;
  int b = 0;
  if constexpr (R == 1) {
    // Four indices by one load too: the ports for loads are what is short.
    for (; b + 4 <= count; b += 4, values += 4, index += 4) {
      uint64_t at;
      memcpy(&at, index, 8);
      const Repeated four = repeat_four(values);
      fetch_ahead(values);
      F32 w[1] = {one<0>(four)};
      add_block<1, Z, 0>(sums, x + (at & 0xffff) * kColumns, w);
      w[0] = one<1>(four);
      add_block<1, Z, 1 & kLast>(sums, x + (at >> 16 & 0xffff) * kColumns, w);
      w[0] = one<2>(four);
      add_block<1, Z, 2 & kLast>(sums, x + (at >> 32 & 0xffff) * kColumns, w);
      w[0] = one<3>(four);
      add_block<1, Z, 3 & kLast>(sums, x + (at >> 48) * kColumns, w);
    }
  } else {
    for (; b + kChains<R, Z> <= count; b += kChains<R, Z>) add_chains<R, Z>(sums, values, index, x);
  }
  // What is left of a step, each in a chain of its own; groups of equal length leave equally many.
  const int rest = count - b;
  if (rest > 0) add_chain<R, Z, 0>(sums, values, index, x);
  if (rest > 1) add_chain<R, Z, 1 & kLast>(sums, values, index, x);
  if (rest > 2) add_chain<R, Z, 2 & kLast>(sums, values, index, x);
}

template <int R, int Z, class V>
void gemm(const SparseGemmArgs<V>& a) {
  constexpr int kColumns = Z * kLanes;
  const SparseChunk<V>& chunk = a.chunk;
  const uint16_t* index = chunk.index;
  const V* values = chunk.values;
  for (int64_t g = 0; g < chunk.group_count; ++g) {
    const SparseGroup group = chunk.groups[g];
    float* y = a.y + int64_t(group.group) * R * kColumns;
    Sums<R, Z> sums;
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) {
      LAMINA_UNROLL
      for (int z = 0; z < Z; ++z) {
        sums.r[0][r][z] = chunk.add ? load(y + r * kColumns + z * kLanes) : zero();
        LAMINA_UNROLL
        for (int c = 1; c < kChains<R, Z>; ++c) sums.r[c][r][z] = zero();
      }
    }
    in_pieces<R>(values, group.count, [&](const float* floats, int first, int count) __attribute__((always_inline)) {
      add_blocks<R, Z>(sums, floats, index + first, count, a.x);
    });
    values += group.count * R;
    index += group.count;
    LAMINA_UNROLL
    for (int r = 0; r < R; ++r) {
      LAMINA_UNROLL
      for (int z = 0; z < Z; ++z) {
        F32 sum = sums.r[0][r][z];
        LAMINA_UNROLL
        for (int c = 1; c < kChains<R, Z>; ++c) sum = sum + sums.r[c][r][z];
        store(y + r * kColumns + z * kLanes, sum);
      }
    }
  }
}

template <int R, int Z, class V>
void gemm_of_width(const SparseGemmArgs<V>& a) {
  if constexpr (Z > 1) {
    if (a.columns < Z * kLanes) return gemm_of_width<R, Z - 1>(a);
  }
  gemm<R, Z>(a);
}

template <class V>
void sparse_gemm(const SparseGemmArgs<V>& a) {
  switch (a.chunk.rows) {
    case 1: return gemm_of_width<1, kWidest1>(a);
    case 2: return gemm_of_width<2, kWidest2>(a);
    default: return gemm_of_width<4, kWidest4>(a);
  }
}

template <class Out>
void sparse_finish(const SparseFinishArgs<Out>& a) {
  with_activation(a.activation, [&]<Activation A>() {
    for (int n = 0; n < a.channels; n += kLanes) {
      const int channels = a.channels - n < kLanes ? a.channels - n : kLanes;
      const F32 bias = a.bias ? load_up_to(a.bias + n, channels) : zero();
      for (int m = 0; m < a.count; m += kLanes) {
        const int rows = a.count - m < kLanes ? a.count - m : kLanes;
        F32 tile[kLanes];
        LAMINA_UNROLL
        for (int i = 0; i < kLanes; ++i) tile[i] = load(a.y + (n + i) * a.columns + m);
        transpose(tile);
        Out* out = a.out + m * a.ldo + n;
        if (rows == kLanes && channels == kLanes) {
          LAMINA_UNROLL
          for (int i = 0; i < kLanes; ++i) store(out + i * a.ldo, activate<A>(tile[i] + bias));
        } else {
          for (int i = 0; i < rows; ++i) store_up_to(out + i * a.ldo, activate<A>(tile[i] + bias), channels);
        }
      }
    }
  });
}

// -- few rows of x

// Chains of sums: a load of x and one of values for each block leave time for four.
constexpr int kFewChains = 4;

template <int R, int M>
LAMINA_INLINE void few_blocks(F4 (&sums)[kFewChains][M], const float* values, const uint16_t* index, int count,
                              const float* const* x) {
  // Four values a step, of 4 / R blocks.
  constexpr int kBlocks = 4 / R;
  const auto inputs = [&](const float* row, const uint16_t* at) {
    if constexpr (R == 1) return set_four(row[at[0]], row[at[1]], row[at[2]], row[at[3]]);
    if constexpr (R == 2) return set_four(row[at[0]], row[at[0]], row[at[1]], row[at[1]]);
    if constexpr (R == 4) return set1_four(row[at[0]]);
  };
  int b = 0;
  for (; b + kFewChains * kBlocks <= count; b += kFewChains * kBlocks) {
    fetch_ahead(values + b * R);
    LAMINA_UNROLL
    for (int c = 0; c < kFewChains; ++c) {
      const F4 w = load_four(values + (b + c * kBlocks) * R);
      LAMINA_UNROLL
      for (int m = 0; m < M; ++m) sums[c][m] = fmadd(w, inputs(x[m], index + b + c * kBlocks), sums[c][m]);
    }
  }
  for (; b + kBlocks <= count; b += kBlocks) {
    const F4 w = load_four(values + b * R);
    LAMINA_UNROLL
    for (int m = 0; m < M; ++m) sums[0][m] = fmadd(w, inputs(x[m], index + b), sums[0][m]);
  }
  // Fewer blocks than a step has: zeros in the lanes of the others, whatever x holds.
  for (; b < count; ++b) {
    LAMINA_UNROLL
    for (int m = 0; m < M; ++m) {
      const float v = x[m][index[b]];
      const F4 w = R == 1 ? set_four(values[b], 0, 0, 0) : set_four(values[b * R], values[b * R + 1], 0, 0);
      const F4 only = R == 1 ? set_four(v, 0, 0, 0) : set_four(v, v, 0, 0);
      sums[0][m] = fmadd(w, only, sums[0][m]);
    }
  }
}

template <int R, int M, class V>
void few(const SparseFewArgs<V>& a) {
  const SparseChunk<V>& chunk = a.chunk;
  const uint16_t* index = chunk.index;
  const V* values = chunk.values;
  for (int64_t g = 0; g < chunk.group_count; ++g) {
    const SparseGroup group = chunk.groups[g];
    float* to = a.sums + 4 * int64_t(group.group);
    F4 sums[kFewChains][M];
    LAMINA_UNROLL
    for (int c = 0; c < kFewChains; ++c) {
      LAMINA_UNROLL
      for (int m = 0; m < M; ++m) sums[c][m] = c == 0 && chunk.add ? load_four(to + m * a.sums_row) : set1_four(0);
    }
    in_pieces<R>(values, group.count, [&](const float* floats, int first, int count) __attribute__((always_inline)) {
      few_blocks<R, M>(sums, floats, index + first, count, a.x);
    });
    values += group.count * R;
    index += group.count;
    LAMINA_UNROLL
    for (int m = 0; m < M; ++m) {
      store_four(to + m * a.sums_row, (sums[0][m] + sums[1][m]) + (sums[2][m] + sums[3][m]));
    }
  }
}

template <int R, class V>
void few_of(const SparseFewArgs<V>& a) {
  switch (a.count) {
    case 1: return few<R, 1>(a);
    case 2: return few<R, 2>(a);
    case 3: return few<R, 3>(a);
    default: return few<R, 4>(a);
  }
}

template <class V>
void sparse_few(const SparseFewArgs<V>& a) {
  switch (a.chunk.rows) {
    case 1: return few_of<1>(a);
    case 2: return few_of<2>(a);
    default: return few_of<4>(a);
  }
}

template <class Out>
void sparse_few_finish(const SparseFewFinishArgs<Out>& a) {
  const float* y = a.sums;
  if (a.rows != 4) {
    for (int n = 0; n < a.channels; ++n) {
      const float* of_group = a.sums + n / a.rows * 4;
      a.scratch[n] = a.rows == 1 ? (of_group[0] + of_group[1]) + (of_group[2] + of_group[3])
                                 : of_group[n % 2] + of_group[2 + n % 2];
    }
    y = a.scratch;
  }
  with_activation(a.activation, [&]<Activation A>() {
    for (int n = 0; n < a.channels; n += kLanes) {
      const int count = a.channels - n < kLanes ? a.channels - n : kLanes;
      const F32 bias = a.bias ? load_up_to(a.bias + n, count) : zero();
      store_up_to(a.out + n, activate<A>(load_up_to(y + n, count) + bias), count);
    }
  });
}

REGISTER_KERNEL(sparse_columns_table, sparse_columns);
REGISTER_KERNEL(sparse_panel_f32_table, sparse_panel<float>);
REGISTER_KERNEL(sparse_panel_bf16_table, sparse_panel<bf16>);
REGISTER_KERNEL(sparse_gemm_f32_table, sparse_gemm<float>);
REGISTER_KERNEL(sparse_gemm_bf16_table, sparse_gemm<bf16>);
REGISTER_KERNEL(sparse_finish_f32_table, sparse_finish<float>);
REGISTER_KERNEL(sparse_finish_bf16_table, sparse_finish<bf16>);
REGISTER_KERNEL(sparse_few_f32_table, sparse_few<float>);
REGISTER_KERNEL(sparse_few_bf16_table, sparse_few<bf16>);
REGISTER_KERNEL(sparse_few_finish_f32_table, sparse_few_finish<float>);
REGISTER_KERNEL(sparse_few_finish_bf16_table, sparse_few_finish<bf16>);

}  // namespace
}  // namespace lamina::LAMINA_ISA
