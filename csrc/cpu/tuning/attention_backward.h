// The tuned numbers of the gradients of attention, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Keys whose scores and gradients are held at once for a block of query rows: a multiple of the tile of 6 keys, and of
// the 8 that one random number serves.
inline constexpr int kAttentionBackwardChunk = 96;

// Heads from which on none is split: enough for an even load. Fewer are split over ranges of keys, none shorter than
// this, at the price of one more sum over the gradient of the query for each range.
inline constexpr int kAttentionBackwardOwners = 16;
inline constexpr int kAttentionBackwardRange = 384;

}  // namespace lamina::tuning
