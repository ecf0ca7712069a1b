// The attention kernels with int8 scores (see attention_codes.h), where vpdpbusd is.
#pragma once

#include "cpu/kernels/attention_block.h"
#include "cpu/kernels/attention_math.h"

namespace lamina::LAMINA_ISA {
namespace {

// In assembly: g++ 12 spills the accumulators of a large tile of the intrinsic.
LAMINA_INLINE F32 int8_multiply_add(F32 a, F32 b, F32 c) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(c.r) : "v"(a.r), "v"(b.r));
  return c;
}

template <class Math>
void attention_int8(const AttentionArgs& args) {
  if (args.packed->k_keys == 0) {
    Int8Keys(args).pack<typename Math::Storage>(args);
    args.packed->k_keys = args.keys;
  }
  for (int64_t row = args.first_row; row < args.first_row + args.rows; row += kRows) {
    const int rows = int(smaller(int64_t{kRows}, args.first_row + args.rows - row));
    if (rows > kShortRows) {
      run_block<Math>(args, row, rows);
      continue;
    }
    // Few rows read K but once, and lie otherwise.
    AttentionArgs plain = args;
    plain.packed = nullptr;
    run_block<typename Math::Wide>(plain, row, rows);
  }
}

}  // namespace
}  // namespace lamina::LAMINA_ISA
