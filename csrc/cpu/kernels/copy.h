// Contract of copy: elements from any strides to any other, converted on the way or not.
#pragma once

#include <stdint.h>

#include "cpu/dispatch.h"
#include "cpu/dtype.h"

namespace lamina {

// How an element is read or written. A copy between equal dtypes is one of bytes.
enum class CopyFormat : uint8_t { bytes1, bytes2, bytes4, bytes8, f32, b16, f16, boolean, int8, int32, int64 };

constexpr int kCopyDims = 16;

// A box of elements; sizes and strides (in elements) from the innermost dimension of the output outwards.
struct CopyArgs {
  const void* x;
  void* out;
  CopyFormat x_format, out_format;  // bytes on both sides, or a conversion that copies_from() knows
  int x_bytes, out_bytes;           // of an element
  int dims;                         // at least 2
  int64_t sizes[kCopyDims], x_strides[kCopyDims], out_strides[kCopyDims];
  int x_inner;  // the dimension in which x is contiguous, where it is not the innermost one of the output; else 0
};

extern const KernelTable<void(const CopyArgs&)> copy_table;

// Rows [begin, end) of several boxes, row by row: what lies side by side in the output is written side by side. Boxes
// of bytes and two dimensions, of which the inner one is contiguous on both sides.
struct CopyRowsArgs {
  const CopyArgs* boxes;
  int count;
  int64_t begin, end;
};

extern const KernelTable<void(const CopyRowsArgs&)> copy_rows_table;

// Between float32, int32, int64 and bool in any direction; between floating-point numbers and bool; from int8 to these.
constexpr bool copies_from(CopyFormat x, CopyFormat out) {
  const bool to_float = out == CopyFormat::f32 || out == CopyFormat::b16 || out == CopyFormat::f16;
  const bool to_integer = out == CopyFormat::int32 || out == CopyFormat::int64;
  switch (x) {
    case CopyFormat::f32:
    case CopyFormat::boolean: return to_float || to_integer || out == CopyFormat::boolean;
    case CopyFormat::b16:
    case CopyFormat::f16:
    case CopyFormat::int8: return to_float || out == CopyFormat::boolean;
    case CopyFormat::int32:
    case CopyFormat::int64: return out == CopyFormat::f32 || to_integer || out == CopyFormat::boolean;
    default: return false;
  }
}

}  // namespace lamina
