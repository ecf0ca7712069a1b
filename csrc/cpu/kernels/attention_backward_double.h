// attention_backward of float64: one row after the other, for gradcheck and references rather than for speed.
#pragma once

#include "cpu/kernels/attention_backward.h"
#include "cpu/kernels/attention_masks.h"
#include "cpu/vec/philox.h"

namespace lamina::LAMINA_ISA {
namespace {

class DoubleGradient {
 public:
  explicit DoubleGradient(const AttentionBackwardArgs& args) : a_(args) {}

  void run() {
    for (int64_t j = 0; j < a_.range; ++j) {
      for (int d = 0; d < a_.head_size; ++d) grad_k(j)[d] = 0.0;
      for (int c = 0; c < a_.value_size; ++c) grad_v(j)[c] = 0.0;
    }
    for (int64_t head = 0; head < a_.heads; ++head) {
      for (int64_t query = 0; query < a_.queries; ++query) row(head, query);
    }
  }

 private:
  double* grad_k(int64_t j) const { return static_cast<double*>(a_.grad_k) + j * a_.grad_k_row; }
  double* grad_v(int64_t j) const { return static_cast<double*>(a_.grad_v) + j * a_.grad_v_row; }

  void row(int64_t head, int64_t query) {
    const double* q = static_cast<const double*>(a_.q) + head * a_.q_head + query * a_.q_row;
    const double* out = static_cast<const double*>(a_.out) + head * a_.out_head + query * a_.out_row;
    const double* grad = static_cast<const double*>(a_.grad) + head * a_.grad_head + query * a_.grad_row;
    const double lse = static_cast<const double*>(a_.lse)[head * a_.lse_head + query * a_.lse_row];
    double* grad_q = static_cast<double*>(a_.grad_q) + head * a_.grad_q_head + query * a_.grad_q_row;
    for (int d = 0; d < a_.head_size; ++d) grad_q[d] = 0.0;
    if (lse == -kInfinity) return;

    double delta = 0.0;
    for (int c = 0; c < a_.value_size; ++c) delta += out[c * a_.out_col] * grad[c * a_.grad_col];
    if (a_.grad_lse) {
      delta -= static_cast<const double*>(a_.grad_lse)[head * a_.grad_lse_head + query * a_.grad_lse_row];
    }
    if (a_.grad_sinks) {
      static_cast<double*>(a_.grad_sinks)[head] -=
          __builtin_exp(static_cast<const double*>(a_.sinks)[head * a_.sinks_head] - lse) * delta;
    }
    const double slope = a_.alibi_slopes ? static_cast<const double*>(a_.alibi_slopes)[head * a_.alibi_head] : 0.0;
    const double growth = a_.keep_below == 0 ? 0.0 : 65536.0 / a_.keep_below;
    const int64_t position = query + a_.shift;
    const int64_t begin = larger(0, position - a_.window_left);
    const int64_t end = smaller(a_.keys, position + a_.window_right + 1);
    for (int64_t j = begin; j < end; ++j) {
      const char* mask = static_cast<const char*>(a_.mask) +
                         (head * a_.mask_head + query * a_.mask_row + j * a_.mask_col) * mask_bytes(a_.mask_type);
      double added = 0.0;
      if (is_bool(a_.mask_type) && *mask == 0) continue;
      if (a_.mask_type == AttentionMask::float64) added = *reinterpret_cast<const double*>(mask);
      if (is_added(a_.mask_type) && a_.mask_type != AttentionMask::float64) added = added_at(a_.mask_type, mask, 0);
      if (added == -kInfinity) continue;

      const double* k = static_cast<const double*>(a_.k) + j * a_.k_row;
      const double* v = static_cast<const double*>(a_.v) + j * a_.v_row;
      double score = 0.0, dp = 0.0;
      for (int d = 0; d < a_.head_size; ++d) score += q[d * a_.q_col] * k[d * a_.k_col];
      score *= a_.scale;
      double curve = 1.0;
      if (a_.softcap != 0.0) {
        const double t = __builtin_tanh(score / a_.softcap);
        curve = 1.0 - t * t;
        score = a_.softcap * t;
      }
      const double distance = double(position < j ? j - position : position - j);
      const double weight = __builtin_exp(score + added - slope * distance - lse);
      const double kept = drops(head, query, j) ? 0.0 : growth;
      for (int c = 0; c < a_.value_size; ++c) dp += grad[c * a_.grad_col] * v[c * a_.v_col];
      const double ds = weight * (kept * dp - delta);
      if (a_.grad_mask) {
        static_cast<double*>(
            a_.grad_mask)[head * a_.grad_mask_head + query * a_.grad_mask_row + j * a_.grad_mask_col] += ds;
      }
      if (a_.grad_slopes) static_cast<double*>(a_.grad_slopes)[head] -= ds * distance;
      const double factor = a_.scale * ds * curve;
      for (int d = 0; d < a_.head_size; ++d) {
        grad_q[d] += factor * k[d * a_.k_col];
        grad_k(j)[d] += factor * q[d * a_.q_col];
      }
      for (int c = 0; c < a_.value_size; ++c) grad_v(j)[c] += kept * weight * grad[c * a_.grad_col];
    }
  }

  bool drops(int64_t head, int64_t query, int64_t key) const {
    if (a_.keep_below >= 65536) return false;
    int32_t queries[kLanes], heads[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      queries[i] = int32_t(query);
      heads[i] = int32_t(a_.first_head + head);
    }
    uint64_t kept;
    kept_by_dropout(a_.keep_below, a_.seed, a_.batch, queries, heads, 1, key, 1, &kept);
    return (kept & 1) == 0;
  }

  const AttentionBackwardArgs& a_;
};

void attention_backward_of_doubles(const AttentionBackwardArgs& args) { DoubleGradient(args).run(); }

}  // namespace
}  // namespace lamina::LAMINA_ISA
