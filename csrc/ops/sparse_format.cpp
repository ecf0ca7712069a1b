#include "ops/sparse_format.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "ops/checks.h"
#include "ops/parallel.h"

namespace lamina {
namespace {

constexpr int64_t kAlign = 64;
// What vector loads may read behind the last index and the last value.
constexpr int64_t kSlack = 64;
constexpr int64_t kMost = 0xffffffff;

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; }

int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : dtype == DType::bfloat16 ? 2 : 1; }

SparsePattern pattern_of(const std::string& name) {
  if (name == "unstructured") return {1, 1};
  return {name[0] - '0', name[2] - '0'};
}

// Where each section starts.
struct Sections {
  int64_t slab_first, chunk_first, group_first, groups, index, values, end;

  Sections(int64_t slabs, int64_t chunks, int64_t group_count, int64_t blocks, int64_t value_bytes) {
    slab_first = aligned(sizeof(SparseHeader));
    chunk_first = aligned(slab_first + 4 * (slabs + 1));
    group_first = aligned(chunk_first + 4 * (chunks + 1));
    groups = aligned(group_first + 4 * (chunks + 1));
    index = aligned(groups + int64_t(sizeof(SparseGroup)) * group_count);
    values = aligned(index + 2 * blocks + kSlack);
    end = aligned(values + value_bytes * blocks + kSlack);
  }
};

template <class... Parts>
void check_format(bool ok, const char* op, const Parts&... parts) {
  if (!ok) fail_format(op, parts...);
}

// A weight as bits, of which the sign does not make a zero something else.
struct Bits {
  const TensorView& weight;
  int64_t bytes = size_of(weight.dtype);

  const char* at(int64_t n, int64_t k) const {
    return weight.as<const char>() + (n * weight.stride(0) + k * weight.stride(1)) * bytes;
  }
  bool is_zero(int64_t n, int64_t k) const {
    const char* p = at(n, k);
    if (bytes == 1) return *p == 0;
    if (bytes == 2) {
      uint16_t bits;
      std::memcpy(&bits, p, 2);
      return (bits & 0x7fff) == 0;
    }
    uint32_t bits;
    std::memcpy(&bits, p, 4);
    return (bits & 0x7fffffff) == 0;
  }
};

// The blocks of one chunk, by group.
struct Chunk {
  std::vector<std::vector<uint16_t>> blocks;
  int64_t nonzeros = 0;

  Chunk(const Bits& bits, const SparseCut& cut, int64_t slab, int64_t k_block) {
    const int64_t n_end = std::min(bits.weight.size(0), (slab + 1) * cut.slab);
    const int64_t k_begin = k_block * cut.k_block, k_end = std::min(bits.weight.size(1), k_begin + cut.k_block);
    for (int64_t n = slab * cut.slab; n < n_end; n += cut.shape.rows) {
      std::vector<uint16_t>& found = blocks.emplace_back();
      for (int64_t k = k_begin; k < k_end; k += cut.shape.columns) {
        int64_t values = 0;
        for (int64_t r = n; r < std::min(n + cut.shape.rows, n_end); ++r) {
          for (int64_t c = k; c < std::min(k + cut.shape.columns, k_end); ++c) values += !bits.is_zero(r, c);
        }
        if (values) found.push_back(uint16_t((k - k_begin) / cut.shape.columns));
        nonzeros += values;
      }
    }
  }

  // Most blocks first; those of equal length as they come.
  std::vector<uint16_t> order(bool with_empty) const {
    std::vector<uint16_t> order;
    for (size_t g = 0; g < blocks.size(); ++g) {
      if (with_empty || !blocks[g].empty()) order.push_back(uint16_t(g));
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](uint16_t a, uint16_t b) { return blocks[a].size() > blocks[b].size(); });
    return order;
  }
};

struct Counts {
  int64_t slabs, k_blocks;
  std::vector<uint32_t> chunk_blocks, chunk_groups;  // [k_blocks, slabs]
  int64_t blocks = 0, groups = 0, nonzeros = 0;

  Counts(const char* op, const TensorView& weight, const SparseCut& cut)
      : slabs(ceil_div(weight.size(0), cut.slab)), k_blocks(ceil_div(weight.size(1), cut.k_block)) {
    const int64_t chunks = slabs * k_blocks;
    chunk_blocks.resize(chunks);
    chunk_groups.resize(chunks);
    std::vector<int64_t> chunk_nonzeros(chunks);
    const Bits bits{weight};
    parallel_ranges(chunks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Chunk chunk(bits, cut, i % slabs, i / slabs);
        for (const auto& group : chunk.blocks) {
          chunk_blocks[i] += uint32_t(ceil_div(int64_t(group.size()), cut.step) * cut.step);
          chunk_groups[i] += i < slabs || !group.empty();
        }
        chunk_nonzeros[i] = chunk.nonzeros;
      }
    });
    for (int64_t i = 0; i < chunks; ++i) {
      blocks += chunk_blocks[i];
      groups += chunk_groups[i];
      nonzeros += chunk_nonzeros[i];
    }
    check(blocks < kMost && groups < kMost, op, "the weight has ", blocks, " blocks of nonzero values, but at most ",
          kMost - 1, " can be packed");
  }

  Sections sections(const TensorView& weight, const SparseCut& cut) const {
    return {slabs, slabs * k_blocks, groups, blocks, size_of(weight.dtype) * cut.shape.rows * cut.shape.columns};
  }
};

void check_weight(const char* op, const TensorView& weight) {
  check_dtype(op, "weight", weight, {DType::float32, DType::bfloat16, DType::int8});
  check_shape(op, "weight", weight, {-1, -1});
}

std::string listed(std::initializer_list<const char*> names) {
  std::string text;
  for (const char* name : names) text += (text.empty() ? "" : ", ") + std::string(name);
  return text;
}

bool contains(std::initializer_list<const char*> names, const std::string& name) {
  return std::any_of(names.begin(), names.end(), [&](const char* each) { return name == each; });
}

// Text of a fixed field, which a foreign file may have left without an end.
template <size_t size>
std::string text_of(const char (&field)[size]) {
  return std::string(field, std::find(field, field + size, '\0'));
}

template <size_t size>
void set_text(char (&field)[size], const std::string& text) {
  std::memcpy(field, text.data(), std::min(size, text.size()));
}

}  // namespace

SparsePattern parse_sparse_pattern(const char* op, const std::string& name,
                                   std::initializer_list<const char*> allowed) {
  check(contains(allowed, name), op, "pattern '", name, "' is unknown; use one of ", listed(allowed));
  return pattern_of(name);
}

int64_t SparseForm::value_bytes() const { return size_of(dtype) * pattern.rows * pattern.columns; }

int64_t SparseForm::channels(int64_t slab) const {
  return std::min<int64_t>(header.slab, header.n - slab * header.slab);
}

int64_t SparseForm::inputs(int64_t k_block) const {
  return std::min<int64_t>(header.k_block, header.k - k_block * header.k_block);
}

int64_t SparseForm::slab_at(int64_t part, int64_t parts) const {
  if (part >= parts) return slabs;
  // Each slab has a small cost of its own, also where it has no blocks.
  const auto weight = [&](int64_t slab) { return int64_t(slab_first[slab]) + slab; };
  const int64_t wanted = weight(slabs) * part / parts;
  int64_t low = 0, high = slabs;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    weight(middle) < wanted ? low = middle + 1 : high = middle;
  }
  // The nearer of the two slabs around the point.
  return low > 0 && wanted - weight(low - 1) < weight(low) - wanted ? low - 1 : low;
}

int64_t sparse_packed_size(const char* op, const TensorView& weight, const SparseCut& cut) {
  check_weight(op, weight);
  return Counts(op, weight, cut).sections(weight, cut).end;
}

void sparse_pack(const char* op, const TensorView& weight, const SparseCut& cut, const TensorView& data) {
  check_weight(op, weight);
  const Counts counts(op, weight, cut);
  const Sections sections = counts.sections(weight, cut);
  check_dtype(op, "data", data, {DType::uint8});
  check_shape(op, "data", data, {sections.end});
  check_contiguous(op, "data", data);
  uint8_t* to = data.as<uint8_t>();
  std::memset(to, 0, sections.end);

  SparseHeader header{};
  std::memcpy(header.magic, SparseHeader::kMagic, sizeof header.magic);
  header.version = SparseHeader::kVersion;
  header.k_block = uint32_t(cut.k_block);
  header.slab = uint32_t(cut.slab);
  header.step = uint32_t(cut.step);
  set_text(header.pattern, cut.pattern);
  set_text(header.dtype, dtype_name(weight.dtype));
  header.n = weight.size(0);
  header.k = weight.size(1);
  header.blocks = counts.blocks;
  header.groups = counts.groups;
  header.bytes = sections.end;
  header.nonzeros = counts.nonzeros;
  std::memcpy(to, &header, sizeof header);

  auto* slab_first = reinterpret_cast<uint32_t*>(to + sections.slab_first);
  auto* chunk_first = reinterpret_cast<uint32_t*>(to + sections.chunk_first);
  auto* group_first = reinterpret_cast<uint32_t*>(to + sections.group_first);
  const int64_t slabs = counts.slabs, chunks = slabs * counts.k_blocks;
  for (int64_t i = 0; i < chunks; ++i) {
    chunk_first[i + 1] = chunk_first[i] + counts.chunk_blocks[i];
    group_first[i + 1] = group_first[i] + counts.chunk_groups[i];
    slab_first[i % slabs + 1] += counts.chunk_blocks[i];
  }
  for (int64_t s = 0; s < slabs; ++s) slab_first[s + 1] += slab_first[s];

  const Bits bits{weight};
  const int64_t rows = cut.shape.rows, columns = cut.shape.columns, item = bits.bytes;
  parallel_ranges(chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Chunk chunk(bits, cut, i % slabs, i / slabs);
      auto* group = reinterpret_cast<SparseGroup*>(to + sections.groups) + group_first[i];
      auto* index = reinterpret_cast<uint16_t*>(to + sections.index) + chunk_first[i];
      uint8_t* value = to + sections.values + chunk_first[i] * rows * columns * item;
      for (uint16_t g : chunk.order(i < slabs)) {
        const int64_t count = int64_t(chunk.blocks[g].size()), filled = ceil_div(count, cut.step) * cut.step;
        *group++ = {g, uint16_t(filled)};
        for (uint16_t block : chunk.blocks[g]) {
          *index++ = block;
          const int64_t n = i % slabs * cut.slab + g * rows, k = i / slabs * cut.k_block + block * columns;
          for (int64_t r = n; r < n + rows; ++r) {
            for (int64_t c = k; c < k + columns; ++c, value += item) {
              if (r < header.n && c < header.k) std::memcpy(value, bits.at(r, c), item);
            }
          }
        }
        for (int64_t i = count; i < filled; ++i) *index++ = chunk.blocks[g].back();
        value += (filled - count) * rows * columns * item;
      }
    }
  });
}

SparseForm open_sparse(const char* op, const TensorView& data, std::initializer_list<const char*> patterns,
                       std::initializer_list<DType> dtypes) {
  check_format(data.dtype == DType::uint8 && data.ndim == 1 && data.is_contiguous(), op, "packed_weight.data is ",
               describe(data), ", but must be uint8, contiguous and of one dimension");
  const int64_t size = data.size(0);
  SparseForm form;
  SparseHeader& h = form.header;
  const bool whole = size >= int64_t(sizeof h);
  if (whole) std::memcpy(&h, data.data, sizeof h);
  check_format(whole && std::memcmp(h.magic, SparseHeader::kMagic, sizeof h.magic) == 0, op,
               "packed_weight.data is no packed sparse weight");
  check_format(h.version == SparseHeader::kVersion, op, "packed_weight.data has format version ", h.version,
               ", but this lamina reads version ", SparseHeader::kVersion);
  const std::string pattern = text_of(h.pattern), dtype = text_of(h.dtype);
  check_format(contains(patterns, pattern), op, "packed_weight.data has pattern '", pattern, "', but must have one of ",
               listed(patterns));
  form.pattern = pattern_of(pattern);
  for (DType each : dtypes) {
    if (dtype == dtype_name(each)) form.dtype = each;
  }
  check_format(form.dtype != DType::other, op, "packed_weight.data has values of type '", dtype,
               "', which this op does not take");
  constexpr int64_t kLargest = int64_t{1} << 40;
  const auto [rows, columns] = form.pattern;
  bool fits = h.n >= 0 && h.n < kLargest && h.k >= 0 && h.k < kLargest && h.blocks >= 0 && h.blocks < kMost &&
              h.groups >= 0 && h.groups < kMost && h.k_block > 0 && h.k_block % columns == 0 &&
              int64_t(h.k_block) <= int64_t{65535} * columns && h.slab > 0 && h.slab % rows == 0 &&
              int64_t(h.slab) <= int64_t{65535} * rows;
  if (fits) {
    form.slabs = ceil_div(h.n, h.slab);
    form.k_blocks = ceil_div(h.k, h.k_block);
    fits = form.k_blocks == 0 || form.slabs <= size / form.k_blocks;
  }
  if (fits) {
    const Sections sections(form.slabs, form.slabs * form.k_blocks, h.groups, h.blocks, form.value_bytes());
    fits = h.bytes == sections.end && size == sections.end;
    const auto* from = data.as<const uint8_t>();
    form.slab_first = reinterpret_cast<const uint32_t*>(from + sections.slab_first);
    form.chunk_first = reinterpret_cast<const uint32_t*>(from + sections.chunk_first);
    form.group_first = reinterpret_cast<const uint32_t*>(from + sections.group_first);
    form.groups = reinterpret_cast<const SparseGroup*>(from + sections.groups);
    form.index = reinterpret_cast<const uint16_t*>(from + sections.index);
    form.values = from + sections.values;
  }
  check_format(fits, op, "packed_weight.data is truncated or damaged: its header does not go with its ", size,
               " bytes");
  return form;
}

void check_sparse_sections(const char* op, const SparseForm& form) {
  const int64_t slabs = form.slabs, chunks = slabs * form.k_blocks;
  bool good = form.slab_first[0] == 0 && form.chunk_first[0] == 0 && form.group_first[0] == 0 &&
              form.chunk_first[chunks] == form.header.blocks && form.group_first[chunks] == form.header.groups &&
              (form.k_blocks == 0 || form.slab_first[slabs] == form.header.blocks);
  for (int64_t s = 0; good && s < slabs; ++s) good = form.slab_first[s] <= form.slab_first[s + 1];
  for (int64_t i = 0; good && i < chunks; ++i) {
    good = form.chunk_first[i] <= form.chunk_first[i + 1] && form.group_first[i] <= form.group_first[i + 1];
  }
  std::vector<bool> seen;
  for (int64_t i = 0; good && i < chunks; ++i) {
    const int64_t count = ceil_div(form.channels(i % slabs), form.pattern.rows);
    const int64_t inputs = ceil_div(form.inputs(i / slabs), form.pattern.columns);
    int64_t block = form.chunk_first[i], listed = 0;
    seen.assign(size_t(count), false);
    for (int64_t g = form.group_first[i]; good && g < form.group_first[i + 1]; ++g, ++listed) {
      const SparseGroup group = form.groups[g];
      good = group.group < count && !seen[group.group] && block + group.count <= form.chunk_first[i + 1];
      if (!good) break;
      seen[group.group] = true;
      for (int b = 0; good && b < group.count; ++b) good = form.index[block + b] < inputs;
      block += group.count;
    }
    good = good && block == form.chunk_first[i + 1] && (i >= slabs || listed == count);
  }
  check_format(good, op, "packed_weight.data is damaged: its blocks lie outside the weight");
}

void sparse_unpack(const char* op, const SparseForm& form, const TensorView& weight) {
  check_dtype(op, "weight", weight, {form.dtype});
  check_shape(op, "weight", weight, {form.n(), form.k()});
  check_contiguous(op, "weight", weight);
  const int64_t item = size_of(form.dtype), rows = form.pattern.rows, columns = form.pattern.columns;
  uint8_t* to = weight.as<uint8_t>();
  std::memset(to, 0, form.n() * form.k() * item);
  parallel_ranges(form.slabs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slab = begin; slab < end; ++slab) {
      for (int64_t k_block = 0; k_block < form.k_blocks; ++k_block) {
        const int64_t i = k_block * form.slabs + slab;
        int64_t block = form.chunk_first[i];
        for (int64_t g = form.group_first[i]; g < form.group_first[i + 1]; ++g) {
          for (int b = 0; b < form.groups[g].count; ++b, ++block) {
            const uint8_t* value = form.values + block * form.value_bytes();
            const int64_t n = slab * form.header.slab + form.groups[g].group * rows;
            const int64_t k = k_block * form.header.k_block + form.index[block] * columns;
            for (int64_t r = n; r < n + rows; ++r) {
              for (int64_t c = k; c < k + columns; ++c, value += item) {
                // Not over what another block put there: this one may only fill up its group.
                const bool zero = std::all_of(value, value + item, [](uint8_t byte) { return byte == 0; });
                if (!zero && r < form.n() && c < form.k()) std::memcpy(to + (r * form.k() + c) * item, value, item);
              }
            }
          }
        }
      }
    }
  });
}

}  // namespace lamina
