// The tuned numbers of products with weights that alone are quantized, each with its reason. Measured on Zen 4 unless
// it says otherwise.
#pragma once

namespace lamina::tuning {

// Inputs of a panel that are floats at once where the kernel multiplies floats: 64 of 64 channels are 16 KiB, half of a
// small L1. A multiple of the int4 block.
inline constexpr int kWeightOnlyPiece = 64;

// Bytes of weights between the one that is read and the one that is asked for from memory: in one stream for int8, in
// each of the four slices of a panel for int4. Without, reading from memory is a quarter slower.
inline constexpr int kWeightOnlyAhead = 8192;
inline constexpr int kWeightOnlyAheadInt4 = 4096;

// Prepared rows that stay in L2 while panels of weights pass over them.
inline constexpr int kWeightOnlyRowBlockBytes = 384 * 1024;

// Rows that are prepared at once: as many as keep the scratch memory small, beyond which weights are read again.
inline constexpr int kWeightOnlyChunkBytes = 8 * 1024 * 1024;

// Fewer multiply-adds than this are not worth waking a second thread for (about 5 us on one core).
inline constexpr long kWeightOnlyWorkPerThread = 1L << 18;

}  // namespace lamina::tuning
