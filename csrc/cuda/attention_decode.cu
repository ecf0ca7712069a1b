// A few new queries over a cache of keys and values: what bounds it is reading the cache, so each byte of it is read
// once, by whoever serves all the rows (queries times heads) that share it.
//
// A block has 8, 16 or 32 rows, one head of keys and values and a part ("split") of the keys. Each of its warps walks
// its own tiles of 16 keys through a ring of stages in shared memory, filled by asynchronous copies some tiles ahead,
// and waits for no other warp before the end. The products are those of tensor cores with the keys as the long side:
//
//   scores^T [16 keys, 8 rows] = K [16, D] q^T [D, 8]        sums^T [Dv, 8 rows] += V^T [Dv, 16 keys] weights^T [16, 8]
//
// A group of four heads then fills half of a product instead of a quarter, and a warp needs half the registers for its
// sums. Without tensor cores 8 rows would be 8 multiply-adds for each element, or 38 TFLOP/s at 4.8 TB/s of bfloat16,
// beside conversions and reductions more than the 60 an H200 has to give. float32 has no such product that is exact
// enough: FloatMath computes the same tiles by multiply-adds, which 4 bytes an element leave the time for.
//
// int8 codes are bfloat16 numbers exactly. They meet the query and the weights as sums of bfloat16 parts.
#include "cuda/attention_decode.h"

#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/ptx.h"

#ifdef LAMINA_CUDA_EMULATOR
#define LAMINA_DYNAMIC_SHARED(name) char* name = emulator::shared_memory
#else
#define LAMINA_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#endif

namespace lamina::cuda {
namespace {

constexpr const char* kOp = "attention_decode";
constexpr unsigned kAll = 0xffffffffu;
constexpr int kKeys = tuning::kDecodeKeys;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }
template <class T>
__device__ __forceinline__ T read(const char* p) {
  return *reinterpret_cast<const T*>(p);
}

// 2^(x - maximum), where a maximum of -inf is that of no keys: the weight of a part, or of the sink.
__device__ __forceinline__ float weight_of(float x, float maximum) {
  return exp2_approx(x - (maximum == -infinity() ? 0.0f : maximum));
}

__device__ __forceinline__ float load_as_float(DecodeType type, const char* p) {
  switch (type) {
    case DecodeType::float32: return read<float>(p);
    case DecodeType::bfloat16: return bf16_to_float(read<uint16_t>(p));
    case DecodeType::float16: return f16_to_float(read<uint16_t>(p));
    default: return float(read<int8_t>(p));
  }
}
__device__ __forceinline__ void store_from_float(DecodeType type, char* row, int column, float x) {
  switch (type) {
    case DecodeType::float32: reinterpret_cast<float*>(row)[column] = x; break;
    case DecodeType::bfloat16: reinterpret_cast<uint16_t*>(row)[column] = uint16_t(float_to_bf16(x)); break;
    default: reinterpret_cast<uint16_t*>(row)[column] = uint16_t(float_to_f16(x)); break;
  }
}

// -- where a token lies

__device__ __forceinline__ int length_of(const DecodeSequences& s, int b) {
  const char* at = static_cast<const char*>(s.lengths) + b * s.lengths_stride;
  const int64_t n = s.lengths_are_64_bits ? read<int64_t>(at) : read<int32_t>(at);
  return n < 0 ? 0 : n > s.capacity ? s.capacity : int(n);
}

// -- the mathematics of one tile
//
// Lane l is g = l / 4, t = l % 4. Of scores and weights it holds, for each 8 rows, [0] and [1]: key g of rows 2t and
// 2t + 1, [2] and [3]: key g + 8. Of sums, for each 16 columns, [0] and [1]: column(i, g, 0) of rows 2t and 2t + 1, [2]
// and [3]: column(i, g, 1).

// sums += weights * values by multiply-adds. kMasked: a negative weight stands for a key that the row does not take,
// whatever is in its value.
template <class Element, bool kMasked, int kColumns, int kGroups>
__device__ __forceinline__ void accumulate_by_element(float (&sums)[kColumns / 16][kGroups][4],
                                                      const float (&weights)[kGroups][4], const char* v, int v_pitch,
                                                      int value_size, int lane) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll 1
    for (int key = 0; key < 8; ++key) {
      float w[kGroups][2];
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) w[n][j] = __shfl_sync(kAll, weights[n][2 * half + j], 4 * key + t);
      }
      const char* row = v + (8 * half + key) * v_pitch;
#pragma unroll
      for (int i = 0; i < kColumns / 16; ++i) {
        if (16 * i >= value_size) break;
        const float x0 = Element::load(row, 16 * i + g), x1 = Element::load(row, 16 * i + g + 8);
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            if (kMasked && w[n][j] < 0.0f) continue;
            sums[i][n][j] += w[n][j] * x0;
            sums[i][n][2 + j] += w[n][j] * x1;
          }
        }
      }
    }
  }
}

struct Float {
  static __device__ __forceinline__ float load(const char* row, int i) { return read<float>(row + 4 * i); }
};
struct Bfloat16 {
  static __device__ __forceinline__ float load(const char* row, int i) {
    return bf16_to_float(read<uint16_t>(row + 2 * i));
  }
  static __device__ __forceinline__ uint32_t pack(float a, float b) { return pack_bf16(a, b); }
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_bf16(c, a, b0, b1);
  }
};
struct Float16 {
  static __device__ __forceinline__ float load(const char* row, int i) {
    return f16_to_float(read<uint16_t>(row + 2 * i));
  }
  static __device__ __forceinline__ uint32_t pack(float a, float b) { return pack_f16(a, b); }
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    multiply_f16(c, a, b0, b1);
  }
};

struct FloatMath {
  static constexpr int kBytes = 4;
  static constexpr bool kCodes = false;
  static __device__ __forceinline__ int column(int i, int g, int half) { return 16 * i + g + 8 * half; }

  static __device__ __forceinline__ void store_query(const DecodeArgs&, const char* from, char* row, int i) {
    reinterpret_cast<float*>(row)[i] = from ? read<float>(from) : 0.0f;
  }

  template <int kGroups>
  static __device__ __forceinline__ void scores(float (&s)[kGroups][4], const DecodeArgs& a, const char* k,
                                                const char* q, int lane) {
    const DecodeRoom& room = a.room;
    const int g = lane / 4, t = lane % 4;
    const char *k0 = k + g * room.k_pitch, *k1 = k0 + 8 * room.k_pitch, *q0 = q + 2 * t * room.q_pitch;
#pragma unroll 2
    for (int d = 0; d < a.k.size; d += 4) {
      const float4 x = read<float4>(k0 + 4 * d), y = read<float4>(k1 + 4 * d);
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float4 z = read<float4>(q0 + (8 * n + j) * room.q_pitch + 4 * d);
          s[n][j] += x.x * z.x;
          s[n][j] += x.y * z.y;
          s[n][j] += x.z * z.z;
          s[n][j] += x.w * z.w;
          s[n][2 + j] += y.x * z.x;
          s[n][2 + j] += y.y * z.y;
          s[n][2 + j] += y.z * z.z;
          s[n][2 + j] += y.w * z.w;
        }
      }
    }
  }

  template <int kColumns, int kGroups>
  static __device__ __forceinline__ void accumulate(float (&sums)[kColumns / 16][kGroups][4],
                                                    const float (&weights)[kGroups][4], const DecodeArgs& a,
                                                    const char* v, int lane) {
    accumulate_by_element<Float, false, kColumns>(sums, weights, v, a.room.v_pitch, a.v.size, lane);
  }
  template <int kColumns, int kGroups>
  static __device__ __forceinline__ void accumulate_taken(float (&sums)[kColumns / 16][kGroups][4],
                                                          const float (&weights)[kGroups][4], const DecodeArgs& a,
                                                          const char* v, int lane) {
    accumulate_by_element<Float, true, kColumns>(sums, weights, v, a.room.v_pitch, a.v.size, lane);
  }
  static __device__ __forceinline__ bool finite(const char* row, int i) {
    return (read<uint32_t>(row + 4 * i) & 0x7f800000u) != 0x7f800000u;
  }
};

template <class Element>
struct HalfMath {
  static constexpr int kBytes = 2;
  static constexpr bool kCodes = false;
  static __device__ __forceinline__ int column(int i, int g, int half) { return 16 * i + g + 8 * half; }

  static __device__ __forceinline__ void store_query(const DecodeArgs&, const char* from, char* row, int i) {
    reinterpret_cast<uint16_t*>(row)[i] = from ? read<uint16_t>(from) : uint16_t(0);
  }

  template <int kGroups>
  static __device__ __forceinline__ void scores(float (&s)[kGroups][4], const DecodeArgs& a, const char* k,
                                                const char* q, int lane) {
    const DecodeRoom& room = a.room;
    const char* k_row = k + lane % 16 * room.k_pitch + lane / 16 * 16;
    const char* q_row = q + lane % 8 * room.q_pitch + lane / 8 * 16;
#pragma unroll 4
    for (int d = 0; d < a.k.size; d += 32) {
      uint32_t x[4], y[4];
      load_matrices(x, k_row + 2 * d);
      load_matrices(y, k_row + 2 * d + 32);
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        uint32_t z[4];
        load_matrices(z, q_row + 8 * n * room.q_pitch + 2 * d);
        Element::multiply(s[n], x, z[0], z[1]);
        Element::multiply(s[n], y, z[2], z[3]);
      }
    }
  }

  template <int kColumns, int kGroups>
  static __device__ __forceinline__ void accumulate(float (&sums)[kColumns / 16][kGroups][4],
                                                    const float (&weights)[kGroups][4], const DecodeArgs& a,
                                                    const char* v, int lane) {
    uint32_t w[kGroups][2];
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        w[n][half] = transpose_matrix(Element::pack(weights[n][2 * half], weights[n][2 * half + 1]));
      }
    }
    const char* row = v + (lane / 16 * 8 + lane % 8) * a.room.v_pitch + lane / 8 % 2 * 16;
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
      if (16 * i >= a.v.size) break;
      uint32_t x[4];
      load_matrices_transposed(x, row + 32 * i);
#pragma unroll
      for (int n = 0; n < kGroups; ++n) Element::multiply(sums[i][n], x, w[n][0], w[n][1]);
    }
  }
  template <int kColumns, int kGroups>
  static __device__ __forceinline__ void accumulate_taken(float (&sums)[kColumns / 16][kGroups][4],
                                                          const float (&weights)[kGroups][4], const DecodeArgs& a,
                                                          const char* v, int lane) {
    accumulate_by_element<Element, true, kColumns>(sums, weights, v, a.room.v_pitch, a.v.size, lane);
  }
  static __device__ __forceinline__ bool finite(const char* row, int i) {
    const float x = Element::load(row, i);
    return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
  }
};

// Four codes of a word as bfloat16, two pairs (low half first). In the order of the word, or its first and third and
// its second and fourth.
template <bool kInterleaved>
__device__ __forceinline__ void expand_codes(uint32_t word, uint32_t& first, uint32_t& second) {
  // 2^23 + (code + 128), as a float, is a matter of bytes; the difference to 2^23 + 128 is exact, and so are its upper
  // 16 bits.
  word ^= 0x80808080u;
  uint32_t x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = __float_as_uint(__uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440u | unsigned(i))) - 8388736.0f);
  }
  first = __byte_perm(x[0], x[kInterleaved ? 2 : 1], 0x7632u);
  second = __byte_perm(x[kInterleaved ? 1 : 2], x[3], 0x7632u);
}

struct Int8Math {
  static constexpr int kBytes = 1;
  static constexpr bool kCodes = true;
  static __device__ __forceinline__ int column(int i, int g, int half) { return 16 * i + 2 * g + half; }

  // Parts whose sum is the query: each is what the ones before have left, rounded to bfloat16.
  static __device__ __forceinline__ void store_query(const DecodeArgs& a, const char* from, char* row, int i) {
    float rest = from ? load_as_float(a.q_type, from) : 0.0f;
    for (int part = 0; part < a.room.query_parts; ++part) {
      const uint32_t x = float_to_bf16(rest);
      reinterpret_cast<uint16_t*>(row + part * a.block_rows * a.room.q_pitch)[i] = uint16_t(x);
      rest -= bf16_to_float(x);
    }
  }

  // Lane t has elements 8t to 8t + 7 of 32: which of them meet in which product does not matter to the sum.
  template <int kGroups>
  static __device__ __forceinline__ void scores(float (&s)[kGroups][4], const DecodeArgs& a, const char* k,
                                                const char* q, int lane) {
    const DecodeRoom& room = a.room;
    const int g = lane / 4, t = lane % 4;
    const char *k0 = k + g * room.k_pitch + 8 * t, *k1 = k0 + 8 * room.k_pitch, *q0 = q + g * room.q_pitch + 16 * t;
#pragma unroll 2
    for (int d = 0; d < a.k.size; d += 32) {
      const uint2 upper = read<uint2>(k0 + d), lower = read<uint2>(k1 + d);
      uint32_t x[4], y[4];
      expand_codes<false>(upper.x, x[0], x[2]);
      expand_codes<false>(lower.x, x[1], x[3]);
      expand_codes<false>(upper.y, y[0], y[2]);
      expand_codes<false>(lower.y, y[1], y[3]);
#pragma unroll 1
      for (int part = 0; part < a.room.query_parts; ++part) {
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
          const uint4 z = read<uint4>(q0 + (part * 8 * kGroups + 8 * n) * room.q_pitch + 2 * d);
          multiply_bf16(s[n], x, z.x, z.y);
          multiply_bf16(s[n], y, z.z, z.w);
        }
      }
    }
  }

  template <int kColumns, int kGroups>
  static __device__ __forceinline__ void accumulate(float (&sums)[kColumns / 16][kGroups][4],
                                                    const float (&weights)[kGroups][4], const DecodeArgs& a,
                                                    const char* v, int lane) {
    constexpr int kParts = 3;
    const bool fine = a.q_type == DecodeType::float32;
    uint32_t w[kGroups][2][kParts];
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x = weights[n][2 * half], y = weights[n][2 * half + 1];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const uint32_t pair = pack_bf16(x, y);
          x -= bf16_to_float(pair & 0xffff);
          y -= bf16_to_float(pair >> 16);
          w[n][half][part] = transpose_matrix(pair);
        }
      }
    }
    // Bytes go through the transposing load in pairs, two columns of one key.
    const char* row = v + (lane / 8 % 2 * 8 + lane % 8) * a.room.v_pitch + lane / 16 * 16;
#pragma unroll
    for (int i = 0; i < kColumns / 16; i += 2) {
      if (16 * i >= a.v.size) break;
      uint32_t codes[4];
      load_matrices_transposed(codes, row + 16 * i);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t x[4];
        expand_codes<true>(codes[2 * j], x[0], x[1]);
        expand_codes<true>(codes[2 * j + 1], x[2], x[3]);
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
          multiply_bf16(sums[i + j][n], x, w[n][0][0], w[n][1][0]);
          multiply_bf16(sums[i + j][n], x, w[n][0][1], w[n][1][1]);
          if (fine) multiply_bf16(sums[i + j][n], x, w[n][0][2], w[n][1][2]);
        }
      }
    }
  }
};

// -- the tiles of a warp

// Eight lanes to a row, 8 * kWidth adjacent bytes at a time. Each lane has its part of four of the sixteen rows.
template <int kWidth>
__device__ __forceinline__ void copy_parts(char* to, int pitch, const char* const (&rows)[4], int bytes, int valid,
                                           int lane) {
  to += lane / 8 * pitch;
#pragma unroll 1
  for (int at = lane % 8 * kWidth; at < bytes; at += 8 * kWidth) {
#pragma unroll
    for (int i = 0; i < 4; ++i) copy_async<kWidth>(to + 4 * i * pitch + at, rows[i] + at, 4 * i + lane / 8 < valid);
  }
}

// Keys (or values) `offset` of each lane's key l % 16 lies at; `valid` of them are there, the others become zeros.
template <int kBytes>
__device__ __forceinline__ void copy_rows(char* to, int pitch, const DecodeCache& cache, const char* head,
                                          int64_t offset, int valid, int lane) {
  const char* from = head + offset;
  if (cache.copy == 0) {
#pragma unroll 1
    for (int row = 0; row < kKeys; ++row) {
      const char* p = reinterpret_cast<const char*>(__shfl_sync(kAll, reinterpret_cast<long long>(from), row));
      for (int i = lane; i < cache.size; i += 32) {
        char* place = to + row * pitch + i * kBytes;
        const char* element = p + i * cache.element;
        if constexpr (kBytes == 4) {
          *reinterpret_cast<uint32_t*>(place) = row < valid ? read<uint32_t>(element) : 0u;
        } else if constexpr (kBytes == 2) {
          *reinterpret_cast<uint16_t*>(place) = row < valid ? read<uint16_t>(element) : uint16_t(0);
        } else {
          *place = row < valid ? *element : char(0);
        }
      }
    }
    return;
  }
  const char* rows[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = 4 * i + lane / 8;
    const char* p = reinterpret_cast<const char*>(__shfl_sync(kAll, reinterpret_cast<long long>(from), row));
    rows[i] = row < valid ? p : head;
  }
  const int bytes = cache.size * kBytes;
  if (cache.copy == 16) {
    copy_parts<16>(to, pitch, rows, bytes, valid, lane);
  } else if (cache.copy == 8) {
    copy_parts<8>(to, pitch, rows, bytes, valid, lane);
  } else {
    copy_parts<4>(to, pitch, rows, bytes, valid, lane);
  }
}

template <class Math, int kColumns, int kGroups>
__global__ void __launch_bounds__(32 * tuning::kDecodeWarps, 2)
    attention_decode_kernel(const __grid_constant__ DecodeArgs a) {
  LAMINA_DYNAMIC_SHARED(shared);
  constexpr int kRows = 8 * kGroups;
  const DecodeRoom& room = a.room;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int warps = room.warps, threads = 32 * warps;

  // Blocks of one part of a sequence follow each other: rows that share keys meet in the L2 cache, and heads are
  // adjacent in memory.
  int rest = int(blockIdx.x);
  const int row_block = rest % a.row_blocks;
  rest /= a.row_blocks;
  const int head = rest % a.kv_heads;
  rest /= a.kv_heads;
  const int split = rest % a.splits, b = rest / a.splits;

  const int first_row = row_block * kRows, some_rows = smaller(kRows, a.rows - first_row);
  const int length = length_of(a.sequences, b), position = length - a.queries;
  const int first_position = position + first_row / a.group;
  const int last_position = position + (first_row + some_rows - 1) / a.group;
  // The keys that some of these rows take, and those that all of them do.
  const int end = larger(last_position + 1, 0);
  const int begin = a.window ? smaller(larger(first_position - a.window + 1, 0), end) : 0;
  const int common_end = first_position + 1, common_begin = a.window ? last_position - a.window + 1 : 0;
  const int all_tiles = (end - begin + kKeys - 1) / kKeys;
  const int share = larger((all_tiles + a.splits - 1) / a.splits, a.splits > 1 ? tuning::kDecodeSplitTiles : 0);
  const int tiles = (share + warps - 1) / warps * warps;
  const int first_tile = smaller(all_tiles, split * tiles), end_tile = smaller(all_tiles, first_tile + tiles);

  const int64_t record = ((int64_t(b) * a.kv_heads + head) * a.rows + first_row) * a.splits + split;
  float* const stats = a.partial + int64_t(a.batch) * a.kv_heads * a.rows * a.splits * a.partial_pitch;
  if (a.splits > 1 && first_tile == end_tile) {
    for (int r = int(threadIdx.x); r < some_rows; r += threads) {
      stats[2 * (record + int64_t(r) * a.splits)] = -infinity();
      stats[2 * (record + int64_t(r) * a.splits) + 1] = 0.0f;
    }
    let_the_next_kernel_start();
    return;
  }

  char* const q = shared;
  int* const row_position = reinterpret_cast<int*>(shared + room.rows);
  float* const row_slope = reinterpret_cast<float*>(row_position + kRows);
  char* const ring = shared + room.ring + warp * room.stages * room.stage_bytes;
  if (room.pads) {  // a column of garbage may be a NaN, which even a zero in the query does not silence
    for (int at = 16 * lane; at < room.stages * room.stage_bytes; at += 16 * 32) {
      *reinterpret_cast<uint4*>(ring + at) = uint4{0, 0, 0, 0};
    }
    __syncwarp();
  }

  // Tile i of this warp.
  const int its_tiles = larger(0, (end_tile - first_tile - warp + warps - 1) / warps);
  const int first_key = begin + (first_tile + warp) * kKeys, key_step = warps * kKeys;
  const char *k_head = a.k.data + head * a.k.head, *v_head = a.v.data + head * a.v.head;
  const DecodeSequences& sequences = a.sequences;
  // The block of this lane's key of a tile. Asked for one tile before it is needed.
  const auto block_of = [&](int i) {
    if (!sequences.table) return b;
    const int key = first_key + i * key_step + lane % kKeys;
    if (key >= end) return 0;
    const int block = sequences.table[b * sequences.table_stride + key / sequences.block_size];
    return larger(0, smaller(block, sequences.blocks - 1));
  };
  int next_block = block_of(0);
  const auto start_copies = [&](int i, int slot) {
    if (i < its_tiles) {
      char* const stage = ring + slot * room.stage_bytes;
      const int tile_key = first_key + i * key_step, key = tile_key + lane % kKeys, valid = end - tile_key;
      const int token = sequences.table ? key % sequences.block_size : key;
      const int block = next_block;
      next_block = block_of(i + 1);
      copy_rows<Math::kBytes>(stage, room.k_pitch, a.k, k_head, block * a.k.first + token * a.k.token, valid, lane);
      copy_rows<Math::kBytes>(stage + room.v, room.v_pitch, a.v, v_head, block * a.v.first + token * a.v.token, valid,
                              lane);
      if constexpr (Math::kCodes) {
        const DecodeCache& cache = lane < kKeys ? a.k : a.v;
        const char* scale = reinterpret_cast<const char*>(cache.scale) + head * cache.scale_head;
        const bool there = key < end;
        copy_async<4>(stage + room.scales + 4 * lane,
                      there ? scale + block * cache.scale_first + token * cache.scale_token : scale, there);
      }
    }
    copy_async_commit();
    __syncwarp();  // together again behind loops of unequal length, as the instructions of whole warps need it
  };
  for (int i = 0; i < room.stages - 1; ++i) start_copies(i, i);

  const int padded = (a.k.size + 31) / 32 * 32;
  for (int i = int(threadIdx.x); i < kRows * padded; i += threads) {
    const int row = i / padded, column = i % padded, r = first_row + row;
    const char* from = nullptr;
    if (row < some_rows && column < a.k.size) {
      from = a.q + b * a.q_batch + r / a.group * a.q_query + (head * a.group + r % a.group) * a.q_head +
             column * a.q_element;
    }
    Math::store_query(a, from, q + row * room.q_pitch, column);
  }
  for (int row = int(threadIdx.x); row < kRows; row += threads) {
    const int r = first_row + smaller(row, some_rows - 1);
    row_position[row] = position + r / a.group;
    row_slope[row] =
        a.slopes ? kLog2E * read<float>(a.slopes + b * a.slopes_batch + (head * a.group + r % a.group) * a.slopes_head)
                 : 0.0f;
  }
  __syncthreads();

  float sums[kColumns / 16][kGroups][4], maximum[kGroups][2], total[kGroups][2];
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      maximum[n][j] = -infinity();
      total[n][j] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[i][n][c] = 0.0f;
    }
  }

  for (int i = 0, slot = 0; i < its_tiles; ++i) {
    copy_async_wait(room.stages - 2);
    __syncwarp();
    start_copies(i + room.stages - 1, slot == 0 ? room.stages - 1 : slot - 1);
    const char* const stage = ring + slot * room.stage_bytes;
    slot = slot + 1 == room.stages ? 0 : slot + 1;
    const int tile_key = first_key + i * key_step;
    const bool partial = tile_key < common_begin || tile_key + kKeys > common_end;

    float s[kGroups][4];
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) s[n][c] = 0.0f;
    }
    Math::scores(s, a, stage, q, lane);

    float k_scale[2] = {1.0f, 1.0f}, v_scale[2] = {1.0f, 1.0f};
    if constexpr (Math::kCodes) {
      const float* scales = reinterpret_cast<const float*>(stage + room.scales);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        k_scale[half] = scales[g + 8 * half];
        v_scale[half] = scales[kKeys + g + 8 * half];
      }
    }
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float x = Math::kCodes ? s[n][c] * k_scale[c / 2] : s[n][c];
        if (a.softcap != 0.0f) {
          x = a.softcap * kLog2E * tanhf(x * a.scale / a.softcap);
        } else {
          x *= a.scale * kLog2E;
        }
        const int row = 8 * n + 2 * t + c % 2, key = tile_key + g + 8 * (c / 2);
        if (a.slopes) x -= row_slope[row] * float(row_position[row] - key);
        if (partial) {
          const int distance = row_position[row] - key;
          if (distance < 0 || (a.window && distance >= a.window)) x = -infinity();
        }
        s[n][c] = x;
      }
    }

    // The largest of the scores so far. A score that is NaN is no maximum, but makes its weight and the total NaN.
    float shrink[kGroups][2];
    bool shrinks = false;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float largest = fmaxf(s[n][j], s[n][2 + j]);
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, mask));
        largest = fmaxf(largest, maximum[n][j]);
        const float base = largest == -infinity() ? 0.0f : largest;
        shrink[n][j] = exp2_approx(maximum[n][j] - base);
        shrinks |= largest != maximum[n][j];
        maximum[n][j] = largest;
        const float x = exp2_approx(s[n][j] - base), y = exp2_approx(s[n][2 + j] - base);
        total[n][j] = total[n][j] * shrink[n][j] + (x + y);
        if constexpr (Math::kCodes) {  // a scale that is NaN must not meet the zero of a key that is not taken
          s[n][j] = x == 0.0f ? 0.0f : x * v_scale[0];
          s[n][2 + j] = y == 0.0f ? 0.0f : y * v_scale[1];
        } else {  // marked for accumulate_taken
          s[n][j] = partial && s[n][j] == -infinity() ? -1.0f : x;
          s[n][2 + j] = partial && s[n][2 + j] == -infinity() ? -1.0f : y;
        }
      }
    }
    if (__any_sync(kAll, shrinks)) {
#pragma unroll
      for (int c = 0; c < kColumns / 16; ++c) {
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[c][n][j] *= shrink[n][j % 2];
        }
      }
    }

    const char* const v = stage + room.v;
    if constexpr (!Math::kCodes) {
      if (partial) {
        // Zero times a NaN in the value of a key that only other rows take would be NaN.
        bool finite = true;
        for (int row = 0; row < kKeys; ++row) {
          for (int c = lane; c < a.v.size; c += 32) finite &= Math::finite(v + row * room.v_pitch, c);
        }
        if (__any_sync(kAll, !finite)) {
          Math::template accumulate_taken<kColumns>(sums, s, a, v, lane);
          continue;
        }
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) s[n][c] = fmaxf(s[n][c], 0.0f);
        }
      }
    }
    Math::template accumulate<kColumns>(sums, s, a, v, lane);
  }
  let_the_next_kernel_start();

  // The warps' parts come together, in the order of the warps. The ring is free once all of them are done.
  copy_async_wait(0);
  __syncthreads();
  constexpr int kPitch = kColumns + 4;
  float* const block_sums = reinterpret_cast<float*>(shared + room.ring);
  float* const warp_maximum = block_sums + kRows * kPitch;  // [warps][rows]
  float* const warp_total = warp_maximum + warps * kRows;
#pragma unroll
  for (int n = 0; n < kGroups; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) total[n][j] += __shfl_xor_sync(kAll, total[n][j], mask);
      if (g == 0) {
        warp_maximum[warp * kRows + 8 * n + 2 * t + j] = maximum[n][j];
        warp_total[warp * kRows + 8 * n + 2 * t + j] = total[n][j];
      }
    }
  }
  __syncthreads();
  for (int turn = 0; turn < warps; ++turn) {
    if (turn == warp) {
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int row = 8 * n + 2 * t + j;
          float largest = warp_maximum[row];
          for (int w = 1; w < warps; ++w) largest = fmaxf(largest, warp_maximum[w * kRows + row]);
          const float weight = weight_of(maximum[n][j], largest);
#pragma unroll
          for (int i = 0; i < kColumns / 16; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              float& place = block_sums[row * kPitch + Math::column(i, g, half)];
              const float x = weight * sums[i][n][2 * half + j];
              place = turn == 0 ? x : place + x;
            }
          }
        }
      }
    }
    __syncthreads();
  }
  for (int r = int(threadIdx.x); r < kRows; r += threads) {  // maximum and total of the block, in those of warp 0
    float largest = warp_maximum[r];
    for (int w = 1; w < warps; ++w) largest = fmaxf(largest, warp_maximum[w * kRows + r]);
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) {
      sum += weight_of(warp_maximum[w * kRows + r], largest) * warp_total[w * kRows + r];
    }
    if (a.splits == 1 && a.sinks) {
      const float sink = kLog2E * read<float>(a.sinks + (head * a.group + (first_row + r) % a.group) * a.sinks_head);
      const float both = fmaxf(largest, sink), weight = weight_of(largest, both);
      sum = weight * sum + weight_of(sink, both);
      largest = both;
      warp_total[r] = sum > 0.0f ? weight / sum : sum == 0.0f ? 0.0f : sum;
    } else {
      warp_total[r] = a.splits > 1 ? sum : sum > 0.0f ? 1.0f / sum : sum == 0.0f ? 0.0f : sum;
    }
    warp_maximum[r] = largest;
    if (a.splits == 1 && a.lse && r < some_rows) {
      const int row = first_row + r;
      *reinterpret_cast<float*>(a.lse + b * a.lse_batch + (head * a.group + row % a.group) * a.lse_head +
                                row / a.group * a.lse_query) = sum == 0.0f ? -infinity() : largest * kLn2 + logf(sum);
    }
  }
  __syncthreads();
  if (a.splits > 1) {
    for (int r = int(threadIdx.x); r < some_rows; r += threads) {
      stats[2 * (record + int64_t(r) * a.splits)] = warp_maximum[r];
      stats[2 * (record + int64_t(r) * a.splits) + 1] = warp_total[r];
    }
    for (int i = int(threadIdx.x); i < some_rows * a.partial_pitch; i += threads) {
      const int r = i / a.partial_pitch, c = i % a.partial_pitch;
      if (c < a.v.size) {
        a.partial[(record + int64_t(r) * a.splits) * a.partial_pitch + c] = block_sums[r * kPitch + c];
      }
    }
    return;
  }
  for (int i = int(threadIdx.x); i < some_rows * a.v.size; i += threads) {
    const int r = i / a.v.size, c = i % a.v.size, row = first_row + r;
    char* out = a.out + b * a.out_batch + row / a.group * a.out_query + (head * a.group + row % a.group) * a.out_head;
    store_from_float(a.q_type, out, c, warp_total[r] * block_sums[r * kPitch + c]);
  }
}

// -- the parts of a row come together

// A block has one row. Lanes have four adjacent columns each, warps take splits in turn; a split without keys has no
// sums to read.
__global__ void __launch_bounds__(tuning::kDecodeMergeThreads)
    attention_decode_merge_kernel(const __grid_constant__ DecodeArgs a) {
  LAMINA_DYNAMIC_SHARED(shared);
  constexpr int kThreads = tuning::kDecodeMergeThreads, kWarps = kThreads / 32;
  float* const weights = reinterpret_cast<float*>(shared);           // [splits]
  float* const extra = weights + a.splits;                           // [kWarps]
  float* const warp_sums = extra + kWarps + (4 - a.splits % 4) % 4;  // [kWarps][partial_pitch]
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int64_t record = int64_t(blockIdx.x) * a.splits;
  const int row = int(blockIdx.x % unsigned(a.rows)), head_of_keys = int(blockIdx.x / unsigned(a.rows)) % a.kv_heads;
  const int b = int(blockIdx.x / unsigned(a.rows)) / a.kv_heads;
  const int query = row / a.group, head = head_of_keys * a.group + row % a.group;
  wait_for_the_kernel_before();

  const float* const stats =
      a.partial + int64_t(a.batch) * a.kv_heads * a.rows * a.splits * a.partial_pitch + 2 * record;
  float largest = -infinity();
  for (int s = int(threadIdx.x); s < a.splits; s += kThreads) largest = fmaxf(largest, stats[2 * s]);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, mask));
  if (lane == 0) extra[warp] = largest;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, extra[w]);
  const float sink = a.sinks ? kLog2E * read<float>(a.sinks + head * a.sinks_head) : -infinity();
  largest = fmaxf(largest, sink);
  __syncthreads();

  float total = 0.0f;
  for (int s = int(threadIdx.x); s < a.splits; s += kThreads) {
    const float its_total = stats[2 * s + 1], weight = weight_of(stats[2 * s], largest);
    // Negative: no keys, and no sums to read. NaN where a score is, although NaN is no maximum: the total is one then.
    weights[s] = its_total == 0.0f ? -1.0f : its_total == its_total ? weight : its_total;
    total += its_total == 0.0f ? 0.0f : weight * its_total;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) total += __shfl_xor_sync(kAll, total, mask);
  if (lane == 0) extra[warp] = total;
  __syncthreads();
  total = a.sinks ? weight_of(sink, largest) : 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += extra[w];

  for (int c = 4 * lane; c < a.partial_pitch; c += 128) {
    float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
    const char* from = reinterpret_cast<const char*>(a.partial + record * a.partial_pitch + c);
#pragma unroll 8
    for (int s = warp; s < a.splits; s += kWarps) {
      const float weight = weights[s];
      float4 x{0.0f, 0.0f, 0.0f, 0.0f};
      if (!(weight < 0.0f)) x = read<float4>(from + int64_t(s) * a.partial_pitch * 4);
      sum.x += weight * x.x;
      sum.y += weight * x.y;
      sum.z += weight * x.z;
      sum.w += weight * x.w;
    }
    *reinterpret_cast<float4*>(warp_sums + warp * a.partial_pitch + c) = sum;
  }
  __syncthreads();
  const float inverse = total > 0.0f ? 1.0f / total : total == 0.0f ? 0.0f : total;
  char* const out = a.out + b * a.out_batch + query * a.out_query + head * a.out_head;
  for (int c = int(threadIdx.x); c < a.v.size; c += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += warp_sums[w * a.partial_pitch + c];
    store_from_float(a.q_type, out, c, inverse * sum);
  }
  if (a.lse && threadIdx.x == 0) {
    *reinterpret_cast<float*>(a.lse + b * a.lse_batch + head * a.lse_head + query * a.lse_query) =
        total == 0.0f ? -infinity() : largest * kLn2 + logf(total);
  }
}

// -- new keys and values

// A warp has one row of keys or of values: those of quantize_rows where the cache is int8. What does not fit into the
// cache, or whose block is none, is not written.
__global__ void __launch_bounds__(32 * tuning::kAppendWarps)
    attention_decode_append_kernel(const __grid_constant__ AppendArgs a) {
  const int lane = int(threadIdx.x) % 32;
  int64_t rest = int64_t(blockIdx.x) * tuning::kAppendWarps + threadIdx.x / 32;
  const bool is_value = rest % 2;
  rest /= 2;
  const int head = int(rest % a.heads);
  rest /= a.heads;
  const int i = int(rest % a.tokens);
  const int64_t b64 = rest / a.tokens;
  if (b64 >= a.batch) return;
  const int b = int(b64);

  const DecodeSequences& sequences = a.sequences;
  const char* at = static_cast<const char*>(sequences.lengths) + b * sequences.lengths_stride;
  const int64_t before = sequences.lengths_are_64_bits ? read<int64_t>(at) : read<int32_t>(at);
  if (before < 0 || before > sequences.capacity - a.tokens) return;
  const int key = int(before) + i;
  int first = b, token = key;
  if (sequences.table) {
    first = sequences.table[b * sequences.table_stride + key / sequences.block_size];
    token = key % sequences.block_size;
    if (first < 0 || first >= sequences.blocks) return;
  }
  const DecodeCache& cache = is_value ? a.v_cache : a.k_cache;
  const char* from = is_value ? a.v + b * a.v_batch + i * a.v_token + head * a.v_head
                              : a.k + b * a.k_batch + i * a.k_token + head * a.k_head;
  const int64_t from_element = is_value ? a.v_element : a.k_element;
  char* to = cache.data + first * cache.first + token * cache.token + head * cache.head;
  if (a.cache_type != DecodeType::int8) {
    for (int c = lane; c < cache.size; c += 32) {
      if (a.cache_type == DecodeType::float32) {
        *reinterpret_cast<uint32_t*>(to + c * cache.element) = read<uint32_t>(from + c * from_element);
      } else {
        *reinterpret_cast<uint16_t*>(to + c * cache.element) = read<uint16_t>(from + c * from_element);
      }
    }
    return;
  }
  // As bits, magnitudes are in the order of the numbers, and NaN is the largest.
  int largest_bits = 0;
  for (int c = lane; c < cache.size; c += 32) {
    const float x = load_as_float(a.type, from + c * from_element);
    largest_bits = larger(largest_bits, int(__float_as_uint(x) & 0x7fffffffu));
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2)
    largest_bits = larger(largest_bits, __shfl_xor_sync(kAll, largest_bits, mask));
  const float largest = __uint_as_float(unsigned(largest_bits));
  const bool tiny = largest < 1e-36f, bad = largest_bits >= 0x7f800000;
  const float inverse = tiny || bad ? 0.0f : __fdiv_rn(127.0f, largest);
  for (int c = lane; c < cache.size; c += 32) {
    const float x = load_as_float(a.type, from + c * from_element);
    const float code = bad ? 0.0f : fminf(fmaxf(rintf(x * inverse), -127.0f), 127.0f);
    *reinterpret_cast<int8_t*>(to + c * cache.element) = int8_t(code);
  }
  if (lane == 0) {
    char* scale = reinterpret_cast<char*>(cache.scale) + first * cache.scale_first + token * cache.scale_token +
                  head * cache.scale_head;
    *reinterpret_cast<float*>(scale) = bad ? __uint_as_float(0x7fc00000u) : tiny ? 0.0f : __fdiv_rn(largest, 127.0f);
  }
}

template <class Math, int kColumns>
void launch_rows(const DecodeArgs& a, const Launch& how) {
  if constexpr (Math::kBytes == 2 && kColumns <= 128) {
    if (a.block_rows == 32) {
      launch(kOp, how, attention_decode_kernel<Math, kColumns, 4>, a);
      return;
    }
  }
  if (a.block_rows == 8) {
    launch(kOp, how, attention_decode_kernel<Math, kColumns, 1>, a);
  } else {
    launch(kOp, how, attention_decode_kernel<Math, kColumns, 2>, a);
  }
}

template <class Math>
void launch_columns(const DecodeArgs& a, const Launch& how) {
  if (a.v.size <= 64) {
    launch_rows<Math, 64>(a, how);
  } else if (a.v.size <= 128) {
    launch_rows<Math, 128>(a, how);
  } else {
    launch_rows<Math, 256>(a, how);
  }
}

}  // namespace

void attention_decode_launch(const DecodeArgs& a, bool overlaps, void* stream) {
  const Launch how{.grid = {unsigned(a.row_blocks) * unsigned(a.kv_heads) * unsigned(a.splits) * unsigned(a.batch)},
                   .block = {unsigned(32 * a.room.warps)},
                   .shared_bytes = size_t(a.room.shared_bytes),
                   .stream = stream};
  switch (a.cache_type) {
    case DecodeType::float32: launch_columns<FloatMath>(a, how); break;
    case DecodeType::bfloat16: launch_columns<HalfMath<Bfloat16>>(a, how); break;
    case DecodeType::float16: launch_columns<HalfMath<Float16>>(a, how); break;
    case DecodeType::int8: launch_columns<Int8Math>(a, how); break;
  }
  if (a.splits == 1) return;
  constexpr int kWarps = tuning::kDecodeMergeThreads / 32;
  const Launch merge{.grid = {unsigned(a.batch) * unsigned(a.heads) * unsigned(a.queries)},
                     .block = {tuning::kDecodeMergeThreads},
                     .shared_bytes = size_t(4 * (a.splits + kWarps + 4 + kWarps * a.partial_pitch)),
                     .stream = stream,
                     .overlaps = overlaps};
  launch(kOp, merge, attention_decode_merge_kernel, a);
}

void attention_decode_append_launch(const AppendArgs& a, void* stream) {
  const int64_t rows = int64_t(2) * a.batch * a.tokens * a.heads;
  launch("attention_decode.append",
         {.grid = {unsigned((rows + tuning::kAppendWarps - 1) / tuning::kAppendWarps)},
          .block = {32 * tuning::kAppendWarps},
          .stream = stream},
         attention_decode_append_kernel, a);
}

}  // namespace lamina::cuda
