// The tuned numbers of float convolutions, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Input or output rows of a task: a quarter of L2, beside the panel of weights that passes over them.
inline constexpr long kConvBandBytes = 256 * 1024;

// Fewer multiply-adds than this are not worth waking a second thread for (about 5 us at the FMA peak of one core).
inline constexpr long kConvWorkPerThread = 1L << 18;

// Winograd's weights are asked into L2 so many blocks of 16 channels ahead. Where few tiles pass over them they come as
// fast as L3 or memory gives them: 512 channels of 7 x 7 by F(4x4) take 1.35 ms, at 2 blocks 1.45 ms, asked into L1,
// which waits for fewer lines at once, 2.1 ms.
inline constexpr int kConvWinogradAhead = 4;

// Tiles of a Winograd task at least: with fewer the weights, read once for each task, come too slowly from L3 (8 tiles
// of F(2x2) take 8 bytes a cycle, 14 take 4.6), and output channels are shared out instead.
inline constexpr long kConvWinogradTiles = 14;

// Bytes of a call's input and output from which Winograd fetches them ahead. 12 MB gain 6% (F(2x2), 64 channels); what
// still lies in L3 from the layer before comes in time anyhow, and fetching it costs 1% to 3%.
inline constexpr long kConvFarBytes = 4L << 20;

}  // namespace lamina::tuning
