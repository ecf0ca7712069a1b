// What attention and its gradient ask of their inputs.
#pragma once

#include "cpu/kernels/attention.h"
#include "ops/attention.h"
#include "ops/tensor.h"

namespace lamina {

int64_t element_size(DType dtype);

// A mask, or its gradient, seen as [B, Hq, L, S]: broadcast dimensions have stride 0.
struct AttentionMaskView {
  AttentionMask type = AttentionMask::none;
  char* data = nullptr;
  int64_t element_size = 0;
  int64_t strides[4] = {0, 0, 0, 0};
};

AttentionMaskView broadcast_mask(const char* op, const TensorView& mask, const TensorView& query, int64_t keys);

void check_attention_inputs(const char* op, const TensorView& query, const TensorView& key, const TensorView& value,
                            const TensorView& out);
void check_attention_options(const char* op, const AttentionOptions& options, const TensorView& query);

// Dropout keeps a weight whose 16 random bits are below this; 65536 keeps all of them.
uint32_t keep_below(double dropout_p);

}  // namespace lamina
