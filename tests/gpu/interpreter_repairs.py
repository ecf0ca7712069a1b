"""What Triton's interpreter (3.6) does otherwise than a GPU, put right.

It holds bfloat16 as 16-bit integers: it truncates where GPUs round to nearest, loses the carry where it rounds, and
multiplies the integers in a dot. And with NumPy 2.4 a scalar that bounds a loop, an array of one, is no Python number.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def repair() -> None:
    """Call it before kernels are interpreted, once or more."""
    if getattr(InterpreterBuilder, "rounds_bfloat16", False):
        return
    cast, to_fp, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.create_dot

    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if target == tl.bfloat16 and source != tl.bfloat16:
            return TensorHandle(_rounded(src.data), target)
        if source == tl.bfloat16 and target != tl.bfloat16:
            return cast(self, TensorHandle(_widened(src.data), tl.float32), dst_type)
        return cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return cast_impl(self, src, dst_type)
        return to_fp(self, src, dst_type, rounding_mode)

    def create_dot(self, a, b, d, *options):
        a, b = (TensorHandle(_widened(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, d, *options)

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.rounds_bfloat16 = True
