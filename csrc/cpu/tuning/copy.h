// The tuned numbers of copies, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Fewer bytes than this are not worth waking a second thread for.
inline constexpr long kCopyBytesPerThread = 1L << 16;

// Output rows of a transposition that are finished before the next ones: they stay in L1 while pieces of a cache line
// each come in.
inline constexpr int kCopyRows = 64;

// Transpositions of fewer rows or columns go element by element.
inline constexpr int kCopyFew = 6;

}  // namespace lamina::tuning
