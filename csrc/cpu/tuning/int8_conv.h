// The tuned numbers of int8 convolutions, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Output channels of one packed weight panel: two 512-bit registers of int32. With 14 pixels, of which every width of
// ResNet is a multiple or a half, that makes 28 accumulators of 32 registers.
inline constexpr int kInt8ConvPanelChannels = 32;

// Bytes of weights that stay in L2 while all pixels pass over them.
inline constexpr long kInt8ConvWeightBytes = 256 * 1024;

// Tiles of 64 channels instead of 32: 3 to 5% faster with a residual, 1 to 3% for filters of up to so many products, 7%
// for so few pixels (a 7 x 7 map). Elsewhere twice the weights pass through L1 for nothing: 2% slower at 512 products.
inline constexpr long kInt8ConvShallowDepth = 256;
inline constexpr long kInt8ConvFewPixels = 64;

// Maps of so few columns, in so many images, have their first and last column computed on their own, without the taps
// that see padding only.
inline constexpr long kInt8ConvNarrow = 14, kInt8ConvNarrowImages = 3;

// Fewer multiply-adds than this are not worth waking a second thread for, fewer than this of a depthwise convolution,
// and fewer values to quantize or copy.
inline constexpr long kInt8ConvWorkPerThread = 1L << 20;
inline constexpr long kInt8DepthwiseWorkPerThread = 3L << 16;
inline constexpr long kInt8ConvPixelsPerThread = 1L << 15;

// Fewer output rows than this for a thread, which computes two or four at a time, and threads share channels instead.
inline constexpr long kInt8DepthwiseRowsPerThread = 6;

}  // namespace lamina::tuning
