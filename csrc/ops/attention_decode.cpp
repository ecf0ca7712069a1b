#include "ops/attention_decode.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/kernels/attention_decode.h"
#include "cpu/kernels/quantize_rows.h"
#include "cpu/tuning/attention.h"
#include "cpu/tuning/attention_decode.h"
#include "cpu/tuning/quantize_rows.h"
#include "ops/attention_decode_checks.h"
#include "ops/checks.h"
#include "ops/parallel.h"
#include "ops/workspace.h"

namespace lamina {

constinit const KernelTable<void(const DecodeArgs&)> attention_decode_f32_table;
constinit const KernelTable<void(const DecodeArgs&)> attention_decode_bf16_table;
constinit const KernelTable<void(const DecodeArgs&)> attention_decode_f16_table;
constinit const KernelTable<void(const DecodeArgs&)> attention_decode_i8_table;
constinit const KernelTable<void(const DecodeMergeArgs&)> attention_decode_merge_f32_table;
constinit const KernelTable<void(const DecodeMergeArgs&)> attention_decode_merge_bf16_table;
constinit const KernelTable<void(const DecodeMergeArgs&)> attention_decode_merge_f16_table;

namespace {

constexpr const char* kOp = kAttentionDecode;
constexpr const char* kAppend = kAttentionDecodeAppend;

const TensorView* pointer(const std::optional<TensorView>& t) { return t ? &*t : nullptr; }

int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : dtype == DType::int8 ? 1 : 2; }

// A cache of keys or of values with its scales, and the sequences in it.
struct Cache {
  const TensorView& tensor;
  const TensorView* scale;

  const char* at(int64_t first, int64_t second, int64_t head) const {
    const TensorView& t = tensor;
    return t.as<char>() + (first * t.stride(0) + second * t.stride(1) + head * t.stride(2)) * size_of(t.dtype);
  }
  float* scale_at(int64_t first, int64_t second, int64_t head) const {
    return scale->as<float>() + first * scale->stride(0) + second * scale->stride(1) + head * scale->stride(2);
  }
};

class Sequences {
 public:
  Sequences(const char* op, const TensorView& k_cache, const TensorView& lengths,
            const std::optional<TensorView>& block_table, int64_t batch)
      : op_(op), lengths_(lengths), table_(block_table ? &*block_table : nullptr), blocks_(k_cache.size(0)) {
    capacity_ = check_sequences(op, k_cache, lengths, table_, batch);
    if (table_) block_size_ = k_cache.size(1);
  }

  // Keys of sequence b once `more` are added, checked against the cache and its blocks.
  int64_t length(int64_t b, int64_t more) const {
    const int64_t at = b * lengths_.stride(0);
    const int64_t n = lengths_.dtype == DType::int32 ? lengths_.as<int32_t>()[at] : lengths_.as<int64_t>()[at];
    check(n >= 0 && n + more <= capacity_, op_, "cache_seqlens[", b, "] is ", n, more ? " and " : "",
          more ? std::to_string(more) + " keys are added" : "", ", but the cache holds 0 to ", capacity_, " keys");
    return n + more;
  }
  void check_blocks(int64_t b, int64_t first_key, int64_t end_key) const {
    if (!table_) return;
    for (int64_t i = first_key / block_size_; i * block_size_ < end_key; ++i) {
      check(blocks(b)[i] >= 0 && blocks(b)[i] < blocks_, op_, "block_table[", b, ", ", i, "] is ", blocks(b)[i],
            ", but the cache has blocks 0 to ", blocks_ - 1);
    }
  }
  bool paged() const { return table_ != nullptr; }
  int64_t block_size() const { return block_size_; }
  const int32_t* blocks(int64_t b) const { return table_->as<int32_t>() + b * table_->stride(0); }
  // Where key j of sequence b lies: indices of the cache's first two dimensions.
  int64_t first_index(int64_t b, int64_t j) const { return table_ ? blocks(b)[j / block_size_] : b; }
  int64_t second_index(int64_t j) const { return table_ ? j % block_size_ : j; }

 private:
  const char* op_;
  const TensorView& lengths_;
  const TensorView* table_;
  int64_t blocks_, block_size_ = 1, capacity_;
};

DecodeCache decode_cache(const Cache& c, const Sequences& sequences, int64_t b, int64_t head) {
  const bool paged = sequences.paged();
  DecodeCache to{.data = c.at(paged ? 0 : b, 0, head),
                 .row = c.tensor.stride(1),
                 .col = c.tensor.size(3) == 1 ? 1 : c.tensor.stride(3),
                 .block = c.tensor.stride(0),
                 .scale = nullptr,
                 .scale_row = 0,
                 .scale_block = 0};
  if (c.scale) {
    to.scale = c.scale_at(paged ? 0 : b, 0, head);
    to.scale_row = c.scale->stride(1);
    to.scale_block = c.scale->stride(0);
  }
  return to;
}

const float* slopes_of(const TensorView& alibi_slopes, int64_t b) {
  return alibi_slopes.as<float>() + (alibi_slopes.ndim == 2 ? b * alibi_slopes.stride(0) : 0);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void attention_decode(const TensorView& q, const TensorView& k_cache, const TensorView& v_cache,
                      const TensorView& cache_seqlens, const std::optional<TensorView>& block_table, double scale,
                      std::optional<int64_t> window, std::optional<double> softcap,
                      const std::optional<TensorView>& alibi_slopes, const std::optional<TensorView>& sinks,
                      const std::optional<TensorView>& k_scale, const std::optional<TensorView>& v_scale,
                      const TensorView& out, const std::optional<TensorView>& lse) {
  check_attention_decode(q, k_cache, v_cache, window, softcap, pointer(alibi_slopes), pointer(sinks), pointer(k_scale),
                         pointer(v_scale), out, pointer(lse));
  const int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), head_size = q.size(3);
  const int64_t kv_heads = k_cache.size(2), value_size = v_cache.size(3);
  const Sequences sequences(kOp, k_cache, cache_seqlens, block_table, batch);

  const Cache keys{k_cache, k_scale ? &*k_scale : nullptr}, values{v_cache, v_scale ? &*v_scale : nullptr};
  const int64_t group = kv_heads ? heads / kv_heads : 1;
  const bool is_float = q.dtype == DType::float32, is_half = q.dtype == DType::float16;
  const auto merge = (is_float  ? attention_decode_merge_f32_table
                      : is_half ? attention_decode_merge_f16_table
                                : attention_decode_merge_bf16_table)
                         .get();
  const auto kernel = (k_cache.dtype == DType::int8 ? attention_decode_i8_table
                       : is_float                   ? attention_decode_f32_table
                       : is_half                    ? attention_decode_f16_table
                                                    : attention_decode_bf16_table)
                          .get();
  const bool copies = (head_size > 1 && k_cache.stride(3) != 1) || (value_size > 1 && v_cache.stride(3) != 1);
  const int64_t scratch_floats = decode_scratch_floats(int(head_size), int(value_size), copies);
  const int64_t most_rows = tuning::kDecodeTaskRows;

  // What one sequence needs: its pieces, and the tasks and units (a head's rows that are merged together) before it.
  struct Sequence {
    int64_t length, first_key, first_piece, pieces, tasks_before, units_before;
  };
  WorkspaceFrame frame;
  Sequence* each = frame.take<Sequence>(size_t(batch) + 1);

  for (int64_t first = 0; first < queries; first += tuning::kDecodeQueries) {
    const int64_t some = std::min<int64_t>(tuning::kDecodeQueries, queries - first);
    const int64_t rows = some * group, row_blocks = ceil_div(rows, most_rows);
    int64_t tasks = 0, units = 0;
    double work = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t whole = sequences.length(b, 0), position = whole - queries + first;
      const int64_t length = std::clamp<int64_t>(position + some, 0, whole);  // what the last of these queries takes
      const int64_t first_key = window ? std::clamp<int64_t>(position - *window + 1, 0, length) : 0;
      sequences.check_blocks(b, first_key, length);
      const int64_t first_piece = first_key / tuning::kDecodePiece;
      const int64_t pieces = std::max<int64_t>(1, ceil_div(length, tuning::kDecodePiece) - first_piece);
      each[b] = {length, first_key, first_piece, pieces, tasks, units};
      tasks += kv_heads * row_blocks * pieces;
      units += kv_heads * row_blocks;
      work += double(length - first_key) * double(heads * some) * double(head_size + value_size);
    }
    each[batch] = {0, 0, 0, 0, tasks, units};
    if (tasks == 0) continue;

    WorkspaceFrame inner;
    const int64_t record = decode_record_floats(int(std::min(rows, most_rows)), int(value_size));
    float* partial = inner.take<float>(size_t(tasks * record));
    int* open = inner.take<int>(size_t(units));
    for (int64_t b = 0; b < batch; ++b) {
      std::fill(open + each[b].units_before, open + each[b + 1].units_before, int(each[b].pieces));
    }
    const bool alone = work < 2 * double(tuning::kDecodeWorkPerThread);
    const int64_t most = max_threads() == 1 ? 1 : tuning::kAttentionSharesPerThread * max_threads();
    const int64_t shares = alone ? 1 : std::min(tasks, most);

    parallel_tasks(shares, [&](int64_t share) {
      WorkspaceFrame own;
      float* scratch = own.take<float>(size_t(scratch_floats));
      int64_t task = tasks * share / shares;
      const int64_t end = tasks * (share + 1) / shares;
      int64_t b =
          std::upper_bound(each, each + batch, task, [](int64_t t, const Sequence& s) { return t < s.tasks_before; }) -
          each - 1;
      for (; task < end; ++task) {
        while (task >= each[b + 1].tasks_before) ++b;
        const Sequence& s = each[b];
        const int64_t unit = (task - s.tasks_before) / s.pieces, piece = (task - s.tasks_before) % s.pieces;
        const int64_t head = unit / row_blocks, first_row = unit % row_blocks * most_rows;
        const int some_rows = int(std::min(most_rows, rows - first_row));
        const int64_t piece_begin = (s.first_piece + piece) * tuning::kDecodePiece;
        const int64_t begin = std::max(piece_begin, s.first_key);
        const int64_t count = std::max<int64_t>(0, std::min(piece_begin + tuning::kDecodePiece, s.length) - begin);
        // Records of a unit lie one after the other, each as long as its rows need.
        const int64_t its_record = decode_record_floats(some_rows, int(value_size));
        float* records = partial + (task - piece) * record;
        kernel({.q = q.as<char>() +
                     (b * q.stride(0) + first * q.stride(1) + head * group * q.stride(2)) * size_of(q.dtype),
                .q_type = is_float  ? DecodeArgs::Type::float32
                          : is_half ? DecodeArgs::Type::float16
                                    : DecodeArgs::Type::bfloat16,
                .q_query = q.stride(1),
                .q_head = q.stride(2),
                .q_col = q.stride(3),
                .group = group,
                .first_row = first_row,
                .rows = some_rows,
                .k = decode_cache(keys, sequences, b, head),
                .v = decode_cache(values, sequences, b, head),
                .block_table = sequences.paged() ? sequences.blocks(b) : nullptr,
                .block_size = sequences.block_size(),
                .head_size = int(head_size),
                .value_size = int(value_size),
                .first_key = begin,
                .keys = int(count),
                .length = s.length,
                .first_position = sequences.length(b, 0) - queries + first,
                .window = window.value_or(0),
                .scale = float(scale),
                .softcap = float(softcap.value_or(0)),
                .alibi_slopes =
                    alibi_slopes ? slopes_of(*alibi_slopes, b) + head * group * alibi_slopes->stride(-1) : nullptr,
                .alibi_stride = alibi_slopes ? alibi_slopes->stride(-1) : 0,
                .sums = records + piece * its_record,
                .scratch = scratch});
        // Whoever finishes the last piece of a unit merges it, in the order of the pieces.
        if (std::atomic_ref(open[s.units_before + unit]).fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
        merge(
            {.partial = records,
             .pieces = s.pieces,
             .group = group,
             .first_row = first_row,
             .rows = some_rows,
             .value_size = int(value_size),
             .sinks = sinks ? sinks->as<float>() + head * group * sinks->stride(0) : nullptr,
             .sink_stride = sinks ? sinks->stride(0) : 0,
             .out = out.as<char>() +
                    (b * out.stride(0) + first * out.stride(1) + head * group * out.stride(2)) * size_of(out.dtype),
             .out_query = out.stride(1),
             .out_head = out.stride(2),
             .lse = lse ? lse->as<float>() + b * lse->stride(0) + head * group * lse->stride(1) + first * lse->stride(2)
                        : nullptr,
             .lse_query = lse ? lse->stride(2) : 0,
             .lse_head = lse ? lse->stride(1) : 0});
      }
    });
  }
}

namespace {

// One row of keys or values into its place; int8 codes and a scale where the cache holds such.
template <class T>
void append_row(const T* from, int64_t col, int64_t size, const Cache& to, int64_t first, int64_t second, int64_t head,
                const KernelTable<void(const QuantizeRowsArgs<T>&)>& quantize) {
  const int64_t to_col = to.tensor.stride(3);
  char* place = const_cast<char*>(to.at(first, second, head));
  T row[tuning::kAttentionMaxHeadSize];
  if (col != 1 && size > 1) {
    for (int64_t i = 0; i < size; ++i) row[i] = from[i * col];
    from = row;
  }
  if (!to.scale) {
    if (to_col == 1 || size == 1) {
      std::memcpy(place, from, size_t(size) * sizeof(T));
    } else {
      for (int64_t i = 0; i < size; ++i) reinterpret_cast<T*>(place)[i * to_col] = from[i];
    }
    return;
  }
  uint8_t codes[tuning::kAttentionMaxHeadSize + 64];
  const bool adjacent = to_col == 1 || size == 1;
  quantize.get()({.x = from,
                  .ldx = size,
                  .rows = 1,
                  .k = size,
                  .codes = adjacent ? reinterpret_cast<uint8_t*>(place) : codes,
                  .ld_codes = size,
                  .k_padded = size,
                  .zero = 0,
                  .scale = 0.0f,
                  .scales = to.scale_at(first, second, head)});
  for (int64_t i = 0; !adjacent && i < size; ++i) place[i * to_col] = char(codes[i]);
}

}  // namespace

void attention_decode_append(const TensorView& k_cache, const TensorView& v_cache, const TensorView& cache_seqlens,
                             const TensorView& k, const TensorView& v, const std::optional<TensorView>& block_table,
                             const std::optional<TensorView>& k_scale, const std::optional<TensorView>& v_scale) {
  check_attention_decode_append(k_cache, v_cache, k, v, pointer(k_scale), pointer(v_scale));
  const int64_t batch = k.size(0), more = k.size(1), heads = k_cache.size(2);
  const Sequences sequences(kAppend, k_cache, cache_seqlens, block_table, batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t end = sequences.length(b, more);
    sequences.check_blocks(b, end - more, end);
  }

  const Cache keys{k_cache, k_scale ? &*k_scale : nullptr}, values{v_cache, v_scale ? &*v_scale : nullptr};
  const auto append = [&](const TensorView& t, const Cache& to, int64_t b, int64_t i, int64_t h, int64_t first,
                          int64_t second) {
    const int64_t at = b * t.stride(0) + i * t.stride(1) + h * t.stride(2), size = t.size(3);
    if (t.dtype == DType::float16) {  // goes in as it is
      append_row(t.as<bf16>() + at, t.stride(3), size, to, first, second, h, quantize_rows_bf16_table);
    } else if (t.dtype == DType::float32) {
      append_row(t.as<float>() + at, t.stride(3), size, to, first, second, h, quantize_rows_f32_table);
    } else {
      append_row(t.as<bf16>() + at, t.stride(3), size, to, first, second, h, quantize_rows_bf16_table);
    }
  };
  const int64_t grain = 1 + tuning::kQuantizeWorkPerThread / std::max<int64_t>(1, heads * (k.size(3) + v.size(3)));
  parallel_ranges(batch * more, grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / more, i = token % more, key = sequences.length(b, more) - more + i;
      const int64_t first = sequences.first_index(b, key), second = sequences.second_index(key);
      for (int64_t h = 0; h < heads; ++h) {
        append(k, keys, b, i, h, first, second);
        append(v, values, b, i, h, first, second);
      }
    }
  });
}

}  // namespace lamina
