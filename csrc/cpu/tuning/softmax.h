// The tuned numbers of softmax, each with its reason. Measured on Zen 4 unless it says otherwise.
#pragma once

namespace lamina::tuning {

// Fewer elements than this are not worth waking a second thread for (about 8 us of exponentials).
inline constexpr long kSoftmaxWorkPerThread = 1L << 14;

}  // namespace lamina::tuning
