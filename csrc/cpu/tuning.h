// Every tuned number of the CPU kernels, with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// -- int8_gemm

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

// -- quantize_rows

// Fewer elements than this are not worth waking another thread for.
inline constexpr long kQuantizeWorkPerThread = 1L << 15;

// -- sparse_int8

// Groups of four inputs of a span where blocks are one channel high, so that a load of a group serves one product: for
// 32 tokens their codes are 48 KiB, and most loads hit L1. 24 KiB and whole rows of 3072 inputs are 5 to 10% slower.
inline constexpr int kSparseInt8SpanGroups = 384;

// Codes of panels that stay in L2 while the weights pass over them: half of 1 MiB.
inline constexpr int kSparseInt8PanelBytes = 512 * 1024;

// Fewer multiply-adds than this, counting two for each input to quantize and each output, are not worth waking a second
// thread for.
inline constexpr long kSparseInt8WorkPerThread = 1L << 20;

// -- int8_conv

// Output channels of one packed weight panel: two 512-bit registers of int32. With 14 pixels, of which every width of
// ResNet is a multiple or a half, that makes 28 accumulators of 32 registers.
inline constexpr int kInt8ConvPanelChannels = 32;

// Bytes of weights that stay in L2 while all pixels pass over them.
inline constexpr long kInt8ConvWeightBytes = 256 * 1024;

// Fewer multiply-adds than this are not worth waking a second thread for, fewer than this of a depthwise convolution,
// and fewer values to quantize or copy.
inline constexpr long kInt8ConvWorkPerThread = 1L << 20;
inline constexpr long kInt8DepthwiseWorkPerThread = 1L << 18;
inline constexpr long kInt8ConvPixelsPerThread = 1L << 15;

// -- int8_winograd

// Tiles whose products of a panel are held at once: one high tile of the product, and 65 KB.
inline constexpr int kInt8WinogradTiles = 14;

// Bytes of transformed inputs that a panel passes over, once it is transformed. They may leave L2, since a product
// takes two bytes of them a cycle; at 512 KB 256 channels of 128 tiles lose 10% to more passes.
inline constexpr long kInt8WinogradBandBytes = 2 * 1024 * 1024;

// Bytes of a panel's transformed filters that stay in L2: 256 channels. With 512 it loses to the direct sum.
inline constexpr long kInt8WinogradFilterBytes = 640 * 1024;

// What the transforms cost for each input and each output channel of a tile, and for each filter of a band, counted in
// multiply-adds of words; and the part of the direct sum's time that Winograd may take by this count.
inline constexpr long kInt8WinogradInputCost = 240;
inline constexpr long kInt8WinogradOutputCost = 570;
inline constexpr long kInt8WinogradFilterCost = 125;
inline constexpr double kInt8WinogradGain = 0.95;

// -- int8_pool

// Fewer codes to compare or add than this are not worth waking a second thread for.
inline constexpr long kInt8PoolWorkPerThread = 1L << 17;

// -- weight_only_gemm

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

// -- sparse_gemm

// Inputs of a chunk of a packed sparse weight, by channels that share a block. With one, each multiply-add reads a
// register of inputs, which should come from L1: 192 of 64 columns are 48 KiB, so that most do, and fewer ranges would
// load and store the sums less often. Blocks of four read 256 KiB from L2 at full speed.
inline constexpr int kSparseInputs1 = 192;
inline constexpr int kSparseInputs2 = 256;
inline constexpr int kSparseInputs4 = 1024;

// Channels of a chunk: a multiple of the first, so many that a weight has four chunks of them, but not more than the
// last. Groups are sorted by their length within a chunk, and the more there are, the fewer loops end unforeseen (10%
// at 64 channels); threads share a weight by chunks where rows are few.
inline constexpr int kSparseSlab = 64;
inline constexpr int kSparseSlabs = 4;
inline constexpr int kSparseMostSlab = 256;

// Bytes of values between those that are multiplied and those that are asked for: 5 to 15% where the weight comes from
// the third-level cache.
inline constexpr int kSparseAhead = 8192;

// Rows of x up to which the path without panels is the faster one, by channels that share a block.
inline constexpr int kSparseFewRows1 = 1;
inline constexpr int kSparseFewRows2 = 2;
inline constexpr int kSparseFewRows4 = 4;

// Fewer multiply-adds than this are not worth waking a second thread for.
inline constexpr long kSparseWorkPerThread = 1L << 16;

// -- attention

// Keys that go by between two steps of the online softmax. With 64 rows their scores are 64 KiB, as are K and V at head
// size 64: a quarter of L2 together. 128 and 512 are 3 to 6% slower.
inline constexpr int kAttentionChunk = 256;

// A rest of up to 64 keys joins the last chunk: a chunk of its own would rescale all sums for a few keys.
inline constexpr int kAttentionMaxChunk = kAttentionChunk + 64;

// Query rows of one task: four 512-bit vectors, the wide side of the score tile. Narrower ISAs take several blocks.
inline constexpr int kAttentionTaskRows = 64;

// Keys and values of a head in packed form, in floats, that are kept for all of its blocks: half of 1 MiB of L2, which
// bfloat16 pairs fill by half.
inline constexpr long kAttentionPackedFloats = 256L << 10;

// Fewer rows of queries for each head than this do not pay for quantizing K.
inline constexpr int kAttentionInt8Rows = 16;

// Models in use stop at 256, where Q, K, V and scores of a chunk still fit L2 together. Larger heads go to torch.
inline constexpr int kAttentionMaxHeadSize = 256;

// Fewer multiply-adds than this are not worth waking a second thread for (about 5 us at the FMA peak of one core).
inline constexpr long kAttentionWorkPerThread = 1L << 18;

// Work is dealt out in so many shares for each thread: enough for an even load, and few, since only inside a share does
// a task fetch what the next one will read.
inline constexpr int kAttentionSharesPerThread = 8;

// Q, K, V and output of a call from which on rows are fetched ahead, and keys and values of a head. Below, they come
// from L2 and L3 early enough by themselves, and fetching costs 2 to 15%; at 8 x 12 x 128 x 64 it gains 3 to 21%.
inline constexpr long kAttentionFarBytes = 3L << 20;
inline constexpr long kAttentionFarHeadBytes = 16L << 10;

// -- attention_decode

// Keys of a piece, whose softmax is by itself: a fixed part of the cache, so that the bits do not depend on who
// computes it. A group of four rows then writes 2 KiB of sums for 128 KiB (int8) or more that it reads.
inline constexpr int kDecodePiece = 512;

// Keys whose values are read column by column: 32 KiB of float32 at head size 256.
inline constexpr int kDecodeValueGroup = 32;

// Places of a piece that are read side by side. Eight streams come from memory 6% faster than four, and four a third
// faster than two.
inline constexpr int kDecodeStreams = 8;

// Bytes between a key that is read and the one that is asked for from memory, in each of those places. 2 to 8 KiB are
// no better.
inline constexpr int kDecodeAheadBytes = 1024;

// Rows of one task: the heads of a group times the new queries.
inline constexpr int kDecodeTaskRows = 32;

// New queries that go through the cache together; more of them take turns, which bounds the memory for their sums.
inline constexpr int kDecodeQueries = 64;

// Fewer multiply-adds than this are not worth waking a second thread for.
inline constexpr long kDecodeWorkPerThread = 1L << 16;

// -- attention_backward

// Keys whose scores and gradients are held at once for a block of query rows: a multiple of the tile of 6 keys, and of
// the 8 that one random number serves.
inline constexpr int kAttentionBackwardChunk = 96;

// Heads from which on none is split: enough for an even load. Fewer are split over ranges of keys, none shorter than
// this, at the price of one more sum over the gradient of the query for each range.
inline constexpr int kAttentionBackwardOwners = 16;
inline constexpr int kAttentionBackwardRange = 384;

// -- conv2d

// Input or output rows of a task: a quarter of L2, beside the panel of weights that passes over them.
inline constexpr long kConvBandBytes = 256 * 1024;

// Fewer multiply-adds than this are not worth waking a second thread for (about 5 us at the FMA peak of one core).
inline constexpr long kConvWorkPerThread = 1L << 18;

// -- norm_rows

// Fewer elements than this are not worth waking a second thread for (about 3 us of rows in L2).
inline constexpr long kNormWorkPerThread = 1L << 15;

// -- recurrent layers

// Input rows (steps x batch) whose gates are computed ahead by one product: enough that reading the input weights costs
// little, few enough that the gates (4 KiB a row at 256 units) do not leave the third-level cache.
inline constexpr int64_t kRnnChunkRows = 384;

// Fewer multiply-adds a step than this are not worth a second thread: threads meet once a step, which costs as much.
inline constexpr int64_t kRnnWorkPerThread = 1 << 16;

}  // namespace lamina::tuning
