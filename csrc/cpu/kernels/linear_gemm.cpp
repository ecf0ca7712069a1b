// linear_gemm: the tiles of panel_tile.h, one panel after the other, over all partial sums of k, and the end of the
// layer while a tile's sums are in the cache. Where nothing follows the sums they go straight to the output.
#include "cpu/kernels/linear_gemm.h"

#include "cpu/kernels/epilogue.h"
#include "cpu/kernels/panel_tile.h"
#include "cpu/kernels/row_tiles.h"
#include "cpu/tuning/linear.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kWidth = tuning::kLinearPanelChannels;
constexpr int kMostGroups = kWidth / kPanelLanes;

// Rows of the tallest tile on a panel of so many groups: narrow panels have registers left for more of them.
constexpr int rows_of(int groups) { return kWide && groups < 4 ? 8 : 6; }

// Few rows are bound by reading the weights and take two panels at once, two streams for the prefetcher.
constexpr int kPairRows = kWide ? 3 : 0;

template <int MR, int NG>
constexpr TileFunction<float> tile_of() {
  if constexpr (MR <= rows_of(NG)) {
    return tile<float, MR, NG, 1>;
  } else {
    return nullptr;  // never asked for
  }
}

template <int NG>
constexpr TileFunction<float> kTilesOf[8] = {tile_of<1, NG>(), tile_of<2, NG>(), tile_of<3, NG>(), tile_of<4, NG>(),
                                             tile_of<5, NG>(), tile_of<6, NG>(), tile_of<7, NG>(), tile_of<8, NG>()};

constexpr const TileFunction<float>* kTilesByGroups[kMostGroups] = {kTilesOf<1>, kTilesOf<2>, kTilesOf<3>, kTilesOf<4>};

template <int MR>
constexpr TileFunction<float> pair_of() {
  if constexpr (MR <= kPairRows) {
    return tile<float, MR, 4, 2>;
  } else {
    return nullptr;  // never asked for
  }
}

constexpr TileFunction<float> kPairs[3] = {pair_of<1>(), pair_of<2>(), pair_of<3>()};

// Where sums [rows, width] belong: rows from `row` on, channels from `first` on, `channels` of them.
struct Block {
  int64_t row, first;
  int rows, channels, width;
};

template <Activation A>
void finish(const LinearGemmArgs& a, const float* sums, const Block& b) {
  // By value: a store of floats may change anything that is only referred to.
  const EpilogueMatrix out = a.out, residual = a.residual;
  for (int r = 0; r < b.rows; ++r, sums += b.width) {
    const int64_t at = (b.row + r) * out.ld + b.first, residual_at = (b.row + r) * residual.ld + b.first;
    for (int c = 0; c < b.channels; c += F32::lanes) {
      const int n = b.channels - c < F32::lanes ? b.channels - c : F32::lanes;
      F32 y = load(sums + c);
      if (residual.data) y = y + load_from(residual.data, residual.format, residual_at + c, n);
      store_to(out.data, out.format, at + c, activate<A>(y), zero(), n);
    }
  }
}

// Asks for the lines of a block of a matrix: by the end of the product they are in the second-level cache.
LAMINA_INLINE void fetch(const EpilogueMatrix& m, const Block& b) {
  if (!m.data) return;
  for (int r = 0; r < b.rows; ++r) {
    const char* row = static_cast<const char*>(m.data) + ((b.row + r) * m.ld + b.first) * m.format;
    for (int byte = 0; byte < b.channels * m.format; byte += 64) __builtin_prefetch(row + byte);
  }
}

// The panels of one block (one, or two whole ones) times all rows. bias: [width] or null.
LAMINA_INLINE void block(const LinearGemmArgs& a, const float* bias, const TileFunction<float>* tiles, int tallest,
                         int64_t first, int channels, int width) {
  const bool straight =
      channels == width && a.activation == Activation::none && !a.residual.data && a.out.format == EpilogueMatrix::f32;
  PanelGemmArgs<float> part{};
  part.ldx = a.ldx;
  part.out_panel = kWidth;
  part.out_row = straight ? a.out.ld : width;
  part.panel_k = a.k;
  const int64_t parts =
      a.k > tuning::kLinearPartialSum ? (a.k + tuning::kLinearPartialSum - 1) / tuning::kLinearPartialSum : 1;
  alignas(64) float sums[kMaxSums];
  for_balanced_tiles(a.rows, tallest, [&](int64_t row, int rows) {
    const Block b{row, first, rows, channels, width};
    fetch(a.residual, b);
    fetch(a.out, b);
    float* const to = straight ? static_cast<float*>(a.out.data) + row * a.out.ld + first : sums;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t k = a.k * i / parts;
      part.k = a.k * (i + 1) / parts - k;
      part.x = a.x + k;
      part.panels = a.panels + first * a.k + k * (width < kWidth ? width : kWidth);
      part.bias = i == 0 ? bias : nullptr;
      part.adds = i > 0;
      tiles[rows - 1](part, 0, row, to);
    }
    if (!straight) with_activation(a.activation, [&]<Activation A>() { finish<A>(a, sums, b); });
  });
}

void linear_gemm(const LinearGemmArgs& a) {
  for (int64_t first = 0; first < a.channels;) {
    const int64_t left = a.channels - first;
    const float* const bias = a.bias ? a.bias + first : nullptr;
    if (a.rows <= kPairRows && left >= 2 * kWidth) {
      block(a, bias, kPairs, kPairRows, first, 2 * kWidth, 2 * kWidth);
      first += 2 * kWidth;
      continue;
    }
    const int channels = int(left < kWidth ? left : kWidth), groups = (channels + kPanelLanes - 1) / kPanelLanes;
    const int width = groups * kPanelLanes;
    alignas(64) float padded[kWidth];  // the bias of a last panel with fewer channels than lanes
    if (bias && channels < width) {
      for (int c = 0; c < width; c += F32::lanes) {
        const int n = channels - c < 0 ? 0 : channels - c;
        store(padded + c, load_up_to(bias + (n ? c : 0), n));
      }
    }
    block(a, bias && channels < width ? padded : bias, kTilesByGroups[groups - 1], rows_of(groups), first, channels,
          width);
    first += kWidth;
  }
}

REGISTER_KERNEL(linear_gemm_table, linear_gemm);

}  // namespace
}  // namespace lamina::LAMINA_ISA
