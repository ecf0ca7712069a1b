// The tuned numbers of int8 products, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Output channels of one packed weight panel: four 512-bit registers of int32. With six rows that makes the 6x4 tile
// (24 accumulators, 4 weights, 1 activation of 32 registers); 1-wide and less than 4-high tiles lose 10% and more.
inline constexpr int kInt8PanelChannels = 64;

// Bytes behind each quantized row, so that rows do not start a multiple of 4096 apart and fight for the same L1 sets.
inline constexpr int kInt8RowPadding = 64;

// Rows whose quantized form is kept in L2 while all panels of weights pass over it: half of 1 MiB leaves room for a
// panel and its successor up to K = 4096. With a quarter, 512 x 768 x 3072 reads its weights twice and loses 1%.
inline constexpr int kInt8RowBlockBytes = 512 * 1024;

// Rows from which on a thread takes rows of its own instead of panels. It then reads all weights, 64 / rows bytes a
// cycle, a tenth of what the third-level cache gives; in return threads meet once a call instead of twice.
inline constexpr int kInt8RowsPerShare = 48;

// Outputs larger than this do not stay in L2 between two calls, and a tile prefetches its lines of them: 2% at 512 x
// 768 x 3072. Smaller ones lose 1% by it.
inline constexpr long kInt8FarOutputBytes = 1L << 20;

// Fewer multiply-adds than this are not worth waking a second thread for (about 5 us at the VNNI peak of one core).
inline constexpr long kInt8WorkPerThread = 1L << 20;

}  // namespace lamina::tuning
