"""What kernels do with finished values: activations, and codes of int8.

The operations are those of csrc/cpu/vec/activate.h and csrc/cpu/kernels/epilogue.h, in their order. Kernels that
promise the bits of the CPU are launched with enable_fp_fusion=False: a product and a sum that become one fused
operation round once and not twice.
"""

import triton
import triton.language as tl

# What is added to and taken from a float32 of at most 2^22 to round it half to even.
_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23


@triton.jit
def round_half_even(x):
    """float32 of at most 2^22 in magnitude -> the nearest whole number, float32."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def int8_codes(y, inverse):
    """round_half_even(y * inverse) in [-127, 127]; NaN gives -127."""
    code = y * inverse
    code = tl.where(code > -127.0, code, -127.0)
    code = tl.where(code < 127.0, code, 127.0)
    return round_half_even(code).to(tl.int32).to(tl.int8)


@triton.jit
def magnitude_bits(x):
    """The bits of |x| of float32 x: they are ordered as the values are, with NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of_bits(bits):
    """The bits of max|row| -> (scale, inverse) of quantize_rows; a row that is not finite has scale NaN and inverse 0,
    and its codes are left to the caller."""
    largest = bits.to(tl.float32, bitcast=True)
    bad = bits >= 0x7F800000
    tiny = largest < 1e-36
    divisor = tl.where(tiny | bad, 1.0, largest)
    scale = tl.where(tiny, 0.0, tl.div_rn(divisor, tl.full(divisor.shape, 127.0, tl.float32)))
    inverse = tl.where(tiny | bad, 0.0, tl.div_rn(tl.full(divisor.shape, 127.0, tl.float32), divisor))
    return tl.where(bad, float("nan"), scale), inverse


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """float32 -> float32. A NaN stays a NaN, -inf of a gated activation gives 0."""
    if ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu6":
        return tl.where(x > 6.0, 6.0, tl.where(x < 0.0, 0.0, x))
    elif ACTIVATION == "gelu":
        # x Phi(x), and Phi(-|x|) by formula 7.1.26 of Abramowitz and Stegun, off by 8e-8: erf branches and takes more
        # registers.
        t = 1.0 / (1.0 + 0.2316419 * tl.abs(x))
        tail = 0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
        tail = t * tail * tl.exp(-0.5 * x * x)
        return tl.where(x < -16.0, 0.0, tl.where(x > 16.0, x, tl.where(x < 0.0, x * tail, x - x * tail)))
    elif ACTIVATION == "gelu_tanh":
        gate = _sigmoid(x * (1.5957691216057308 + 0.07135481282553484 * x * x))
        return tl.where(x < -16.0, 0.0, x * gate)
    elif ACTIVATION == "quick_gelu":
        return tl.where(x < -80.0, 0.0, x * _sigmoid(1.702 * x))
    elif ACTIVATION == "silu":
        return tl.where(x < -120.0, 0.0, x * _sigmoid(x))
    elif ACTIVATION == "hardswish":
        # Below -3 the result is 0, also at -inf, where x * 0 would be NaN.
        gate = tl.where(x + 3.0 > 6.0, 6.0, tl.where(x + 3.0 < 0.0, 0.0, x + 3.0))
        return tl.where(x < -3.0, -3.0, x) * gate * 0.16666667163372040
    elif ACTIVATION == "tanh":
        return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))
    else:
        tl.static_assert(ACTIVATION == "none", "an activation that kernels do not know")
        return x
