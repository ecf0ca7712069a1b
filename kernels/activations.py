"""The activations that kernels fuse, float32 in and out, by their names in lamina.ops.

Each is within the bounds that the CPU's keep (3e-6), gives 0 at minus infinity where torch has 0 times infinity, and
lets NaN through.
"""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """`x` itself for "none"."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu6":
        x = tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))
    elif ACTIVATION == "gelu":
        # x Phi(x), and Phi(-|x|) by formula 7.1.26 of Abramowitz and Stegun, off by 8e-8: erf branches and takes more
        # registers.
        t = 1.0 / (1.0 + 0.2316419 * tl.abs(x))
        tail = 0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
        tail = t * tail * tl.exp(-0.5 * x * x)
        x = tl.where(x < -16.0, 0.0, tl.where(x > 16.0, x, tl.where(x < 0.0, x * tail, x - x * tail)))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(z)) is sigmoid(2 z).
        x = tl.where(x < -16.0, 0.0, x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "quick_gelu":
        x = tl.where(x < -16.0, 0.0, x * _sigmoid(1.702 * x))
    elif ACTIVATION == "silu":
        x = tl.where(x < -16.0, 0.0, x * _sigmoid(x))
    elif ACTIVATION == "hardswish":
        x = tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, x, x * (x + 3.0) * 0.16666666666666666))
    elif ACTIVATION == "tanh":
        x = 2.0 * _sigmoid(2.0 * x) - 1.0
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
    return x
