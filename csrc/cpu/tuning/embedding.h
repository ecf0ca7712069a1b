// The tuned numbers of embedding, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Fewer bytes than this are not worth waking a second thread for (about 5 us of copying).
inline constexpr long kEmbeddingBytesPerThread = 1L << 17;

// Rows between the one that is copied and the one that is asked for: rows of a table are far apart, so no hardware
// prefetcher knows the next.
inline constexpr int kEmbeddingRowsAhead = 2;

}  // namespace lamina::tuning
