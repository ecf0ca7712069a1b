#include "ops/cuda/attention_decode.h"

#include <algorithm>
#include <limits>

#include "cuda/attention_decode.h"
#include "cuda/launch.h"
#include "ops/attention_decode_checks.h"
#include "ops/checks.h"

namespace lamina {

namespace {

using cuda::DecodeArgs;
using cuda::DecodeCache;
using cuda::DecodeRoom;
using cuda::DecodeSequences;
using cuda::DecodeType;

using OptionalView = std::optional<CudaTensorView>;

const TensorView* pointer(const OptionalView& t) { return t ? &*t : nullptr; }

template <class... Tensors>
void check_device(const char* op, const char* what, int device, const Tensors&... tensors) {
  const auto check_one = [&](const CudaTensorView& t) {
    check(t.device == device, op, "a tensor is on device cuda:", t.device, ", but ", what, " on cuda:", device);
  };
  const auto check_any = [&](const auto& t) {
    if constexpr (std::is_same_v<std::decay_t<decltype(t)>, OptionalView>) {
      if (t) check_one(*t);
    } else {
      check_one(t);
    }
  };
  (check_any(tensors), ...);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int round_up(int x, int to) { return (x + to - 1) / to * to; }

DecodeType decode_type(DType dtype) {
  return dtype == DType::float32    ? DecodeType::float32
         : dtype == DType::bfloat16 ? DecodeType::bfloat16
         : dtype == DType::float16  ? DecodeType::float16
                                    : DecodeType::int8;
}

int64_t bytes_between(const TensorView& t, int dim) {
  return t.size(dim) > 1 ? t.stride(dim) * dtype_bytes(t.dtype) : 0;
}

DecodeCache decode_cache(const TensorView& cache, const OptionalView& scale) {
  DecodeCache c{.data = cache.as<char>(),
                .first = bytes_between(cache, 0),
                .token = bytes_between(cache, 1),
                .head = bytes_between(cache, 2),
                .element = bytes_between(cache, 3),
                .size = int(cache.size(3)),
                .copy = 0,
                .scale = nullptr,
                .scale_first = 0,
                .scale_token = 0,
                .scale_head = 0};
  const int64_t element = dtype_bytes(cache.dtype), row = c.size * element;
  if (c.size == 1 || c.element == element) {
    for (const int64_t bytes : {16, 8, 4}) {
      const int64_t all = int64_t(uintptr_t(cache.data) % 16) | c.first | c.token | c.head | row;
      if (all % bytes == 0) {
        c.copy = int(bytes);
        break;
      }
    }
  }
  if (scale) {
    c.scale = scale->as<float>();
    c.scale_first = bytes_between(*scale, 0);
    c.scale_token = bytes_between(*scale, 1);
    c.scale_head = bytes_between(*scale, 2);
  }
  return c;
}

DecodeSequences decode_sequences(const char* op, const TensorView& k_cache, const TensorView& lengths,
                                 const OptionalView& block_table, int64_t batch) {
  const int64_t capacity = check_sequences(op, k_cache, lengths, pointer(block_table), batch);
  const int64_t most = std::numeric_limits<int32_t>::max() / 2;
  check(capacity <= most && k_cache.size(0) <= most, op, "k_cache is ", describe(k_cache), ", for ", capacity,
        " keys of a sequence, but a GPU counts up to ", most, " of them and of blocks");
  DecodeSequences s{.lengths = lengths.data,
                    .lengths_stride = bytes_between(lengths, 0),
                    .lengths_are_64_bits = lengths.dtype == DType::int64,
                    .table = nullptr,
                    .table_stride = 0,
                    .block_size = 1,
                    .blocks = int(k_cache.size(0)),
                    .capacity = int(capacity)};
  if (block_table) {
    s.table = block_table->as<int32_t>();
    s.table_stride = block_table->stride(0);
    s.block_size = int(k_cache.size(1));
    if (s.blocks == 0) s.capacity = 0;
  }
  return s;
}

int device_attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  cuda::check(cudaDeviceGetAttribute(&value, which, device), kAttentionDecode);
  return value;
}

// How the rows of a key/value head and the keys of a sequence are shared out over blocks. From what the host knows, the
// room in the cache, not from the lengths of the sequences.
struct Shares {
  int block_rows;
  int64_t rows, row_blocks, splits, partial_pitch;

  int64_t workspace(int64_t batch, int64_t kv_heads) const {
    return splits == 1 ? 0 : batch * kv_heads * rows * splits * (partial_pitch + 2);
  }
};

Shares share_out(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache, int64_t capacity,
                 int device) {
  namespace tuning = cuda::tuning;
  const int64_t kv_heads = k_cache.size(2), group = kv_heads ? q.size(2) / kv_heads : 0;
  Shares s{};
  s.rows = q.size(1) * group;
  const bool wide = dtype_bytes(k_cache.dtype) == 2 && v_cache.size(3) <= 128;
  s.block_rows = s.rows <= 8 ? 8 : s.rows <= 16 || !wide ? 16 : 32;
  s.row_blocks = ceil_div(s.rows, s.block_rows);
  s.partial_pitch = (v_cache.size(3) + 3) / 4 * 4;
  const int64_t blocks = std::max<int64_t>(1, s.row_blocks * kv_heads * q.size(0));
  const int64_t wanted =
      int64_t(device_attribute(cudaDevAttrMultiProcessorCount, device)) * tuning::kDecodeBlocksPerMultiprocessor;
  // Not for many rows, whose sums would be many as well.
  const int64_t fewest = s.row_blocks == 1 && blocks < wanted ? ceil_div(capacity, tuning::kDecodeMostSplitKeys) : 1;
  const int64_t most = std::clamp<int64_t>(capacity / tuning::kDecodeSplitKeys, 1, tuning::kDecodeMostSplits);
  s.splits = std::min(std::max(wanted / blocks, std::max<int64_t>(1, fewest)), most);
  return s;
}

// An odd number of 16 bytes that holds `columns` whole groups of 32.
int pitch_of(int columns, int element_bytes) {
  const int sixteens = round_up(columns, 32) * element_bytes / 16;
  return 16 * (sixteens | 1);
}

DecodeRoom room_of(DecodeType q_type, DecodeType cache_type, int block_rows, int head_size, int value_size,
                   int device) {
  namespace tuning = cuda::tuning;
  const bool codes = cache_type == DecodeType::int8;
  const int element = cache_type == DecodeType::float32 ? 4 : codes ? 1 : 2;
  DecodeRoom r{};
  r.k_pitch = pitch_of(head_size, element);
  r.v_pitch = pitch_of(value_size, element);
  r.q_pitch = pitch_of(head_size, codes ? 2 : element);
  r.query_parts = !codes || q_type == DecodeType::bfloat16 ? 1 : q_type == DecodeType::float16 ? 2 : 3;
  r.rows = r.query_parts * block_rows * r.q_pitch;
  r.ring = r.rows + 8 * block_rows;
  r.v = tuning::kDecodeKeys * r.k_pitch;
  r.scales = r.v + tuning::kDecodeKeys * r.v_pitch;
  r.stage_bytes = r.scales + (codes ? 2 * tuning::kDecodeKeys * 4 : 0);
  r.stages = std::clamp(1 + int(ceil_div(tuning::kDecodeWarpBytesAhead, r.stage_bytes)), 2, tuning::kDecodeMostStages);
  r.warps = tuning::kDecodeWarps;
  const auto bytes = [&] { return r.ring + r.warps * r.stages * r.stage_bytes; };
  const int most =
      std::min(tuning::kDecodeSharedBytes, device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  while (bytes() > most && r.stages > 2) --r.stages;
  while (bytes() > most && r.warps > 1) r.warps /= 2;
  const int columns = value_size <= 64 ? 64 : value_size <= 128 ? 128 : 256;
  const int at_the_end = r.ring + 4 * block_rows * (columns + 4 + 2 * r.warps);
  r.shared_bytes = std::max(bytes(), at_the_end);
  r.pads = head_size % 32 != 0 || value_size % 32 != 0;
  return r;
}

}  // namespace

int64_t attention_decode_workspace_cuda(const CudaTensorView& q, const CudaTensorView& k_cache,
                                        const CudaTensorView& v_cache, const OptionalView& block_table) {
  // attention_decode_cuda says in order what is wrong.
  if (q.ndim != 4 || k_cache.ndim != 4 || v_cache.ndim != 4 || (block_table && block_table->ndim != 2)) return 0;
  const int64_t capacity = k_cache.size(1) * (block_table ? block_table->size(1) : 1);
  return share_out(q, k_cache, v_cache, capacity, q.device).workspace(q.size(0), k_cache.size(2));
}

void attention_decode_cuda(const CudaTensorView& q, const CudaTensorView& k_cache, const CudaTensorView& v_cache,
                           const CudaTensorView& cache_seqlens, const OptionalView& block_table, double scale,
                           std::optional<int64_t> window, std::optional<double> softcap,
                           const OptionalView& alibi_slopes, const OptionalView& sinks, const OptionalView& k_scale,
                           const OptionalView& v_scale, const CudaTensorView& out, const OptionalView& lse,
                           const CudaTensorView& workspace) {
  constexpr const char* op = kAttentionDecode;
  check_attention_decode(q, k_cache, v_cache, window, softcap, pointer(alibi_slopes), pointer(sinks), pointer(k_scale),
                         pointer(v_scale), out, pointer(lse));
  check_device(op, "q is", q.device, k_cache, v_cache, cache_seqlens, block_table, alibi_slopes, sinks, k_scale,
               v_scale, out, lse, workspace);
  const int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), kv_heads = k_cache.size(2);
  const DecodeSequences sequences = decode_sequences(op, k_cache, cache_seqlens, block_table, batch);
  if (batch == 0 || queries == 0 || heads == 0) return;

  const Shares shares = share_out(q, k_cache, v_cache, sequences.capacity, q.device);
  const int64_t most = std::numeric_limits<int32_t>::max();
  check(shares.row_blocks * kv_heads * shares.splits * batch <= most && batch * heads * queries <= most &&
            shares.rows <= most,
        op, "q is ", describe(q), ", but a GPU takes at most ", most, " rows at once");
  check_dtype(op, "workspace", workspace, {DType::float32});
  check(workspace.is_contiguous() && workspace.numel() >= shares.workspace(batch, kv_heads), op, "workspace is ",
        describe(workspace), ", but must have ", shares.workspace(batch, kv_heads), " adjacent elements");

  const cuda::DeviceGuard guard(q.device);
  const DecodeType q_type = decode_type(q.dtype), cache_type = decode_type(k_cache.dtype);
  const int slopes_head = alibi_slopes ? alibi_slopes->ndim - 1 : 0;
  cuda::attention_decode_launch(
      DecodeArgs{
          .q_type = q_type,
          .cache_type = cache_type,
          .q = q.as<char>(),
          .q_batch = bytes_between(q, 0),
          .q_query = bytes_between(q, 1),
          .q_head = bytes_between(q, 2),
          .q_element = bytes_between(q, 3),
          .k = decode_cache(k_cache, k_scale),
          .v = decode_cache(v_cache, v_scale),
          .sequences = sequences,
          .batch = int(batch),
          .queries = int(queries),
          .heads = int(heads),
          .kv_heads = int(kv_heads),
          .group = int(heads / kv_heads),
          .rows = int(shares.rows),
          .block_rows = shares.block_rows,
          .row_blocks = int(shares.row_blocks),
          .splits = int(shares.splits),
          // Wider than a cache is no window.
          .window = window && *window < sequences.capacity + queries ? int(*window) : 0,
          .scale = float(scale),
          .softcap = float(softcap.value_or(0)),
          .slopes = alibi_slopes ? alibi_slopes->as<char>() : nullptr,
          .slopes_batch = slopes_head == 1 ? bytes_between(*alibi_slopes, 0) : 0,
          .slopes_head = alibi_slopes ? bytes_between(*alibi_slopes, slopes_head) : 0,
          .sinks = sinks ? sinks->as<char>() : nullptr,
          .sinks_head = sinks ? bytes_between(*sinks, 0) : 0,
          .out = out.as<char>(),
          .out_batch = bytes_between(out, 0),
          .out_query = bytes_between(out, 1),
          .out_head = bytes_between(out, 2),
          .lse = lse ? lse->as<char>() : nullptr,
          .lse_batch = lse ? bytes_between(*lse, 0) : 0,
          .lse_query = lse ? bytes_between(*lse, 2) : 0,
          .lse_head = lse ? bytes_between(*lse, 1) : 0,
          .partial = workspace.as<float>(),
          .partial_pitch = int(shares.partial_pitch),
          .room = room_of(q_type, cache_type, shares.block_rows, int(q.size(3)), int(v_cache.size(3)), q.device)},
      device_attribute(cudaDevAttrComputeCapabilityMajor, q.device) >= 9, q.stream);
}

void attention_decode_append_cuda(const CudaTensorView& k_cache, const CudaTensorView& v_cache,
                                  const CudaTensorView& cache_seqlens, const CudaTensorView& k, const CudaTensorView& v,
                                  const OptionalView& block_table, const OptionalView& k_scale,
                                  const OptionalView& v_scale) {
  constexpr const char* op = kAttentionDecodeAppend;
  check_attention_decode_append(k_cache, v_cache, k, v, pointer(k_scale), pointer(v_scale));
  check_device(op, "k is", k.device, k_cache, v_cache, cache_seqlens, v, block_table, k_scale, v_scale);
  const int64_t batch = k.size(0), tokens = k.size(1), heads = k.size(2);
  const DecodeSequences sequences = decode_sequences(op, k_cache, cache_seqlens, block_table, batch);
  check(tokens <= sequences.capacity || batch == 0 || heads == 0, op, "k has ", tokens,
        " tokens, but the cache holds 0 to ", sequences.capacity, " keys");
  const int64_t most = std::numeric_limits<int32_t>::max();
  check(2 * batch * tokens * heads <= most, op, "k is ", describe(k), ", but a GPU takes at most ", most / 2,
        " rows at once");
  if (batch == 0 || tokens == 0 || heads == 0) return;
  const cuda::DeviceGuard guard(k.device);
  cuda::attention_decode_append_launch({.type = decode_type(k.dtype),
                                        .cache_type = decode_type(k_cache.dtype),
                                        .k_cache = decode_cache(k_cache, k_scale),
                                        .v_cache = decode_cache(v_cache, v_scale),
                                        .k = k.as<char>(),
                                        .v = v.as<char>(),
                                        .k_batch = bytes_between(k, 0),
                                        .k_token = bytes_between(k, 1),
                                        .k_head = bytes_between(k, 2),
                                        .k_element = bytes_between(k, 3),
                                        .v_batch = bytes_between(v, 0),
                                        .v_token = bytes_between(v, 1),
                                        .v_head = bytes_between(v, 2),
                                        .v_element = bytes_between(v, 3),
                                        .sequences = sequences,
                                        .batch = int(batch),
                                        .tokens = int(tokens),
                                        .heads = int(heads)},
                                       k.stream);
}

}  // namespace lamina
