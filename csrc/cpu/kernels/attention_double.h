// attention of float64: one row after the other, for gradcheck and references rather than for speed.
#pragma once

#include "cpu/kernels/attention_masks.h"
#include "cpu/vec/philox.h"

namespace lamina::LAMINA_ISA {
namespace {

class DoubleRow {
 public:
  DoubleRow(const AttentionArgs& a, int64_t row)
      : a_(a),
        head_(row / a.queries),
        query_(row % a.queries),
        q_(static_cast<const double*>(a.q) + head_ * a.q_head + query_ * a.q_row),
        mask_(static_cast<const char*>(a.mask) +
              (head_ * a.mask_head + query_ * a.mask_row) * mask_bytes(a.mask_type)) {}

  void run() {
    const int64_t position = query_ + a_.shift;
    const KeyRange taken = keys_of_position(a_, position);
    for (int c = 0; c < a_.value_size; ++c) sums_[c] = 0.0;
    if (a_.sinks) {
      maximum_ = static_cast<const double*>(a_.sinks)[head_ * a_.sinks_head];
      total_ = maximum_ == -kInfinity ? 0.0 : 1.0;
    }
    for (int64_t j = taken.begin; j < taken.end; ++j) {
      double added = 0.0;
      if (!keeps(j, added)) continue;
      take(j, score(j) + added + bias(position - j));
    }
    const double growth = a_.keep_below == 0 ? 0.0 : 65536.0 / a_.keep_below;
    double* out = static_cast<double*>(a_.out) + head_ * a_.out_head + query_ * a_.out_row;
    for (int c = 0; c < a_.value_size; ++c) out[c] = total_ == 0.0 ? 0.0 : growth * sums_[c] / total_;
    if (!a_.lse) return;
    static_cast<double*>(a_.lse)[head_ * a_.lse_head + query_ * a_.lse_row] =
        total_ == 0.0 ? -kInfinity : maximum_ + __builtin_log(total_);
  }

 private:
  bool keeps(int64_t key, double& added) const {
    const char* p = mask_ + key * a_.mask_col * mask_bytes(a_.mask_type);
    switch (a_.mask_type) {
      case AttentionMask::none: return true;
      case AttentionMask::boolean: return *p != 0;
      case AttentionMask::float64: added = *reinterpret_cast<const double*>(p); break;
      default: added = added_at(a_.mask_type, p, 0);
    }
    return added != -kInfinity;
  }

  double score(int64_t key) const {
    const double* k = static_cast<const double*>(a_.k) + key * a_.k_row;
    double sum = 0.0;
    for (int d = 0; d < a_.head_size; ++d) sum += q_[d * a_.q_col] * k[d * a_.k_col];
    sum *= a_.scale;
    return a_.softcap == 0.0 ? sum : a_.softcap * __builtin_tanh(sum / a_.softcap);
  }

  double bias(int64_t distance) const {
    if (!a_.alibi_slopes) return 0.0;
    return -static_cast<const double*>(a_.alibi_slopes)[head_ * a_.alibi_head] *
           double(distance < 0 ? -distance : distance);
  }

  void take(int64_t key, double score) {
    if (total_ == 0.0 && !(score == -kInfinity)) maximum_ = score;
    if (score > maximum_) {
      const double factor = __builtin_exp(maximum_ - score);
      for (int c = 0; c < a_.value_size; ++c) sums_[c] *= factor;
      total_ *= factor;
      maximum_ = score;
    }
    const double weight = score == -kInfinity ? 0.0 : __builtin_exp(score - maximum_);
    total_ += weight;
    if (drops(key)) return;
    const double* v = static_cast<const double*>(a_.v) + key * a_.v_row;
    for (int c = 0; c < a_.value_size; ++c) sums_[c] += weight * v[c * a_.v_col];
  }

  bool drops(int64_t key) const {
    if (a_.keep_below >= 65536) return false;
    int32_t queries[kLanes], heads[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      queries[i] = int32_t(query_);
      heads[i] = int32_t(a_.first_head + head_);
    }
    uint64_t kept;
    kept_by_dropout(a_.keep_below, a_.seed, a_.batch, queries, heads, 1, key, 1, &kept);
    return (kept & 1) == 0;
  }

  const AttentionArgs& a_;
  const int64_t head_, query_;
  const double* q_;
  const char* mask_;
  double maximum_ = 0.0, total_ = 0.0;
  double sums_[tuning::kAttentionMaxHeadSize];
};

void attention_of_doubles(const AttentionArgs& args) {
  for (int64_t row = args.first_row; row < args.first_row + args.rows; ++row) DoubleRow(args, row).run();
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
