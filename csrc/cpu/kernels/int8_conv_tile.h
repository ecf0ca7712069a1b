// The part of int8_conv that every ISA shares: which pixels make a tile, and the epilogue of one.
#pragma once

#include "cpu/kernels/epilogue.h"
#include "cpu/kernels/int8_conv.h"
#include "cpu/tuning/int8_conv.h"

namespace lamina::LAMINA_ISA {
namespace {

constexpr int kConvPanel = tuning::kInt8ConvPanelChannels;
constexpr int kConvMaxPixels = 14;

// Output pixels that have the same rows of taps, and one scale.
struct ConvTile {
  int count;
  int tap_begin, tap_end;       // rows of taps that lie in the image
  int64_t from, to;             // the bytes of each row of taps that count
  const int32_t* compensation;  // of those bytes: [taps_y][ld_compensation]
  int64_t ld_compensation;
  const float* scale;               // [channels] of its image
  const int8_t* x[kConvMaxPixels];  // under tap (tap_begin, 0)
  int64_t out[kConvMaxPixels], residual[kConvMaxPixels];
};

// Output columns [begin, end), whose taps count from byte `from` to byte `to` of a row of them; in all output rows, or
// in those that have the rows of taps [taps_begin, taps_end): then tiles go across images.
struct ConvColumns {
  int64_t begin, end, from, to;
  const int32_t* compensation;
  int64_t ld_compensation;
  bool some_rows = false;
  int taps_begin = 0, taps_end = 0;
};

// Where an output row is, and which rows of taps it has.
struct ConvRow {
  int64_t index;          // through all images
  int64_t image, y, top;  // top: the image row under tap row 0
  int begin, end;

  LAMINA_INLINE ConvRow(const Int8ConvArgs& a, int64_t index)
      : index(index), image(index / a.out_height), y(index % a.out_height) {
    find(a);
  }
  LAMINA_INLINE void find(const Int8ConvArgs& a) {
    top = y * a.stride_y - a.pad_y;
    const auto taps_in = [&](int64_t rows) {
      if (a.dilation_y == 1) return int(rows);  // a division costs more than all else here
      return int((rows + a.dilation_y - 1) / a.dilation_y);
    };
    begin = top >= 0 ? 0 : taps_in(-top);
    const int64_t below = a.height - top;  // rows from the top to the end
    end = below <= 0 ? 0 : taps_in(below < a.taps_y * a.dilation_y ? below : a.taps_y * a.dilation_y);
    if (end > a.taps_y) end = a.taps_y;
    if (begin >= end) begin = end = 0;
  }
  LAMINA_INLINE void next(const Int8ConvArgs& a) {
    ++index;
    if (++y == a.out_height) {
      y = 0;
      ++image;
    }
    find(a);
  }
  // To the first of these rows that belongs to `columns`.
  LAMINA_INLINE void skip(const Int8ConvArgs& a, const ConvColumns& columns) {
    if (!columns.some_rows) return;
    while (index < a.row_end && (begin != columns.taps_begin || end != columns.taps_end)) next(a);
  }
};

// Calls body(tile) for all output pixels of `columns`. Rows that follow each other and have the same taps are one line
// of pixels, cut into tiles that differ by at most one in size: 49 pixels as 13 + 12 + 12 + 12.
template <class Body>
LAMINA_INLINE void for_each_conv_tile(const Int8ConvArgs& a, const ConvColumns& columns, int most, const Body& body) {
  ConvTile tile;
  tile.from = columns.from;
  tile.to = columns.to;
  tile.compensation = columns.compensation;
  tile.ld_compensation = columns.ld_compensation;
  ConvRow row(a, a.row_begin);
  row.skip(a, columns);
  while (row.index < a.row_end) {
    // The line: `rows` rows from `row` on.
    ConvRow after = row;
    int64_t rows = 0;
    do {
      ++rows;
      after.next(a);
      after.skip(a, columns);
    } while (after.index < a.row_end && after.begin == row.begin && after.end == row.end &&
             (a.end.image_scale == 0 || after.image == row.image));
    tile.tap_begin = row.begin;
    tile.tap_end = row.end;
    tile.scale = a.end.scale + row.image * a.end.image_scale;
    const int64_t pixels = rows * (columns.end - columns.begin);
    const int64_t tiles = (pixels + most - 1) / most;
    int64_t column;
    const int8_t* x;
    int64_t out, residual;
    const auto start_row = [&] {
      column = columns.begin;
      x = a.x + row.image * a.image + (row.top + row.begin * a.dilation_y) * a.row + column * a.column;
      out = row.image * a.end.out.image + row.y * a.end.out.row + column * a.end.out.column;
      residual = row.image * a.end.residual.image + row.y * a.end.residual.row + column * a.end.residual.column;
    };
    start_row();
    for (int64_t t = 0, done = 0; t < tiles; ++t) {
      tile.count = int((pixels - done + tiles - t - 1) / (tiles - t));
      done += tile.count;
      for (int i = 0; i < tile.count; ++i) {
        tile.x[i] = x;
        tile.out[i] = out;
        tile.residual[i] = residual;
        x += a.column;
        out += a.end.out.column;
        residual += a.end.residual.column;
        if (++column == columns.end) {
          row.next(a);
          row.skip(a, columns);
          start_row();
        }
      }
      body(tile);
    }
    row = after;
  }
}

// The same of all columns.
template <class Body>
LAMINA_INLINE void for_each_conv_tile(const Int8ConvArgs& a, int most, const Body& body) {
  for_each_conv_tile(a, {0, a.out_width, 0, a.length, a.compensation, a.ld_compensation}, most, body);
}

template <Activation A>
void finish_conv_pixels(const ConvEpilogue& end, const ConvTile& tile, const int32_t* sums, int64_t first,
                        int channels) {
  const F32 inverse = set1(end.out_inverse), factor = set1(end.residual_scale);
  const F32 lowest = set1(end.lowest), highest = set1(end.highest);
  for (int c = 0; c < channels; c += F32::lanes) {
    const int n = channels - c < F32::lanes ? channels - c : F32::lanes;
    const F32 scale = load(tile.scale + first + c), bias = load(end.bias + first + c);
    for (int i = 0; i < tile.count; ++i) {
      F32 y = to_float(load_i32(sums + i * kConvPanel + c)) * scale + bias;
      if (end.residual.data) {
        const F32 r = load_from(end.residual.data, end.residual.format, tile.residual[i] + first + c, n);
        y = y + (end.residual.format == EpilogueMatrix::int8 ? r * factor : r);
      }
      y = activate<A>(y);
      const int64_t at = tile.out[i] + first + c;
      if (end.out.format == EpilogueMatrix::int8) {
        store_codes(static_cast<uint8_t*>(end.out.data) + at, min(max(y * inverse, lowest), highest), 0, n);
      } else {
        store_to(end.out.data, end.out.format, at, y, inverse, n);
      }
    }
  }
}

// sums [tile.count][32], exact, of `channels` channels from `first` on -> out.
void finish_conv_tile(const ConvEpilogue& end, const ConvTile& tile, const int32_t* sums, int64_t first, int channels) {
  with_activation(end.activation, [&]<Activation A>() { finish_conv_pixels<A>(end, tile, sums, first, channels); });
}

// Calls body(weights, first channel, channels, width) for every panel whose channels begin in [begin, end).
template <class Body>
LAMINA_INLINE void for_each_conv_panel(const Int8ConvArgs& a, int64_t begin, int64_t end, const Body& body) {
  const int64_t depth = a.taps_y * a.taps_x * a.length;
  for (int64_t first = begin; first < end; first += kConvPanel) {
    const int64_t left = a.channels - first;
    const int channels = int(left < kConvPanel ? left : kConvPanel);
    body(a.panels + first * depth, first, channels, channels > 16 ? 32 : 16);
  }
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
