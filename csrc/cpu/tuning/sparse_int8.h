// The tuned numbers of sparse int8 products, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Groups of four inputs of a span where blocks are one channel high, so that a load of a group serves one product: for
// 32 tokens their codes are 48 KiB, and most loads hit L1. 24 KiB and whole rows of 3072 inputs are 5 to 10% slower.
inline constexpr int kSparseInt8SpanGroups = 384;

// Codes of panels that stay in L2 while the weights pass over them: half of 1 MiB.
inline constexpr int kSparseInt8PanelBytes = 512 * 1024;

// Fewer multiply-adds than this, counting two for each input to quantize and each output, are not worth waking a second
// thread for.
inline constexpr long kSparseInt8WorkPerThread = 1L << 20;

}  // namespace lamina::tuning
