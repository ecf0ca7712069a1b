"""Every tolerance of the project, computed from what an op does and never guessed.

Four kinds of op, one assertion each:

    assert_exact       integers, packing, masks, repeats: the same bits
    assert_sum         a sum of `terms` products: |actual - truth| <= magnitude (terms eps_acc + eps_out) + eps_out
    assert_composite   attention, norms: no worse than `factor` times eager PyTorch of the same dtype
    assert_lossy       a quantized layer or model: signal-to-quantization-noise ratio in dB

and `assert_activation` for the fused activations, whose error bounds stand in csrc/cpu/vec/math.h.
Truth is float64. NaN and infinities must be where the truth has them. Failures print the worst index and its values.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Sums and epilogues run in float32.
EPS_ACC = torch.finfo(torch.float32).eps

# Relative error of the vectorised 2^x in float32, csrc/cpu/vec/math.h.
EXP2_ERROR = 2.4e-7

# Float32 products on tensor cores in three products of tf32: an operand is cut into two parts of 11 bits, truncated,
# which leaves 2^-20 of it, twice, and the product of the two small parts is left out.
TF32X3_ERROR = 3 * 2.0**-20

# Absolute error of a sigmoid or tanh gate of a recurrent cell, csrc/cpu/vec/gates.h.
GATE_ERROR = 3e-7

# weight_only_linear with VNNI: a row is rounded to multiples of a power of two of which its largest value is at least
# 8355711 / 2, so that rounding moves a value by at most this part of the largest.
FIXED_POINT_ERROR = 1 / 8355711

# |actual - truth| <= absolute + relative * |x| of each fused activation, beside the rounding to the output's dtype.
#
# gelu, gelu_tanh, silu, quick_gelu: max(x, 0) - |x| g(-|x|) with g by table, csrc/cpu/vec/gate_tables.h. The fit is off
#   by what is said there; the float32 argument, the cubic and the sum add 2 eps of |x|.
ACTIVATION_ERROR = {
    "none": (0.0, 0.0),
    "relu": (0.0, 0.0),
    "relu6": (0.0, 0.0),
    "gelu": (1.5e-6, 2 * EPS_ACC),
    "gelu_tanh": (1.3e-6, 2 * EPS_ACC),
    "silu": (2.9e-6, 2 * EPS_ACC),
    # silu(1.702 x) / 1.702.
    "quick_gelu": (1.7e-6, 2 * EPS_ACC),
    # x, x + 3, two products and the rounded 1/6: five roundings of values up to |x|, or of subnormals of bfloat16.
    "hardswish": (2.0**-133, 5 * EPS_ACC),
    # 1 - 2 s: twice the error of the sigmoid s, sigma (1 - sigma) <= 1/4 of that of 2^-z, and four roundings below 1.
    "tanh": (0.5 * EXP2_ERROR + 4 * EPS_ACC, 0.0),
}

# The steepest slope of each, by which an error before the activation grows: gelu 1.129, silu 1.0999, hardswish 1.5.
ACTIVATION_SLOPE = {
    "none": 1.0,
    "relu": 1.0,
    "relu6": 1.0,
    "gelu": 1.13,
    "gelu_tanh": 1.13,
    "quick_gelu": 1.10,
    "silu": 1.10,
    "hardswish": 1.5,
    "tanh": 1.0,
}

# |actual - truth| <= absolute + relative * |truth| of the instructions of elementwise in float32, csrc/cpu/vec/
# functions.h; what is not here is torch's arithmetic, rounded once. The activations that kernels fuse stand above.
INSTRUCTION_ERROR = {
    "exp": (2.0**-126, 2.5e-7),
    "log": (0.0, 3e-7),
    "sin": (2e-7, 0.0),
    "cos": (2e-7, 0.0),
    "erf": (0.0, 4e-7),
    "pow": (0.0, 5e-7),
    "sigmoid": (2.0**-126, 3e-7),
    "tanh": (0.0, 2.5e-7),
    "rsqrt": (0.0, 1.5 * EPS_ACC),
    "cube": (0.0, EPS_ACC),
    **{name: ACTIVATION_ERROR[name] for name in ("gelu", "gelu_tanh", "silu", "hardswish")},
}


def instruction_error(name: str, largest: float) -> float:
    """The most that an instruction whose result (of an activation: argument) is up to `largest` is off by."""
    absolute, relative = INSTRUCTION_ERROR.get(name, (0.0, 0.0))
    return absolute + relative * largest


# Signal-to-quantization-noise ratios that int8 must reach. A uniform quantizer of b bits over [-a, a] has noise
# (2a / 2^b)^2 / 12. For normal data and a = max of a row of 64 to 4096 values, a is 2.5 to 3.9 standard deviations: 39
# to 43 dB for one operand, 3 dB less for a product of two. One Linear keeps 35 dB; a model of a dozen layers in a row
# whose noises add up keeps 10 log10(12) = 11 dB less.
INT8_LAYER_SQNR_DB = 35.0
INT8_MODEL_SQNR_DB = 24.0


def int8_model_sqnr_db(layers: int) -> float:
    """The same for a model of so many quantized layers, where they are more than a dozen."""
    return min(INT8_MODEL_SQNR_DB, INT8_LAYER_SQNR_DB - 10 * math.log10(max(layers, 1)))


# int4 in groups of 32: a step is an eighth of the largest of a group, 2.1 standard deviations of normal data. Its
# noise of (2.1 / 8)^2 / 12 leaves 22.4 dB, less what values beyond code 7 lose. Weights only, so a layer keeps it.
INT4_LAYER_SQNR_DB = 20.5


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def assert_exact(actual: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor], what: str = "") -> None:
    """The same dtype, shape and bits; a NaN equals any NaN. Of several tensors, one by one."""
    if not isinstance(actual, Tensor):
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_exact(a, e, f"{what or 'tensor'} [{i}]")
        return
    _same_form(actual, expected, what)
    same = _bits(actual) == _bits(expected)
    if actual.is_floating_point():
        same |= actual.isnan() & expected.isnan()
    if not bool(same.all()):
        wrong = (~same).nonzero()
        where = tuple(wrong[0].tolist())
        raise AssertionError(
            f"{what or 'tensors'}: {len(wrong)} of {actual.numel()} elements differ, the first at {where}: "
            f"{_show(actual, where)}, expected {_show(expected, where)}"
        )


def assert_sum(
    actual: Tensor,
    truth64: Tensor,
    *,
    terms: int,
    magnitude: Tensor | float,
    extra: Tensor | float = 0.0,
    what: str = "",
) -> None:
    """For sums of `terms` products that are at most `magnitude` in total (a number, or a tensor like the truth).

    `extra` is the error of what follows the sum (an activation). The tolerance must be below the signal, the largest
    value of the truth: else the test could not fail. A truth of zeros must be met exactly.
    """
    out = eps(actual.dtype)
    finite = truth64[truth64.isfinite()].abs()
    signal = finite.max().item() if finite.numel() else 0.0
    tolerance = torch.as_tensor(magnitude, dtype=torch.float64) * (terms * EPS_ACC + out) + out + extra
    tolerance = tolerance.expand_as(truth64)
    if signal == 0.0:
        tolerance = torch.zeros_like(truth64)
    else:
        widest = tolerance[truth64.isfinite()].max().item()
        assert widest < signal, f"{what}: the tolerance {widest:.1e} is not below the signal {signal:.1e}"
    _assert_within(actual, truth64, tolerance, what or "sum")


# Winograd's minimal filtering, csrc/cpu/kernels/conv_winograd.cpp: B^T, G and A^T of F(2x2, 3x3) and F(4x4, 3x3).
_WINOGRAD = {
    2: (
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
        [[1, 1, 1, 0], [0, 1, -1, -1]],
    ),
    4: (
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ],
        [
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ],
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    ),
}

# Roundings that a term meets in the three transforms: two dimensions of at most three sums of the input, one of the
# weight, two dimensions of at most five sums of the output.
WINOGRAD_ROUNDINGS = 17


def winograd_magnitude(x64: Tensor, weight64: Tensor, tile: int) -> Tensor:
    """What the terms of a 3 x 3 convolution of padded x [B, C, H, W] amount to in Winograd's form, at each output.

    The transforms with the absolute values of everything: what cancels in the truth does not cancel in rounding errors.
    """
    b_t, g, a_t = (torch.tensor(matrix, dtype=torch.float64).abs() for matrix in _WINOGRAD[tile])
    height, width = x64.shape[2] - 2, x64.shape[3] - 2
    x64 = torch.nn.functional.pad(x64.abs(), (0, -width % tile, 0, -height % tile))
    tiles = x64.unfold(2, tile + 2, tile).unfold(3, tile + 2, tile)
    of_inputs = torch.einsum("iy,jx,bcpqyx->bcpqij", b_t, b_t, tiles)
    of_weights = torch.einsum("iy,jx,ncyx->ncij", g, g, weight64.abs())
    products = torch.einsum("bcpqij,ncij->bnpqij", of_inputs, of_weights)
    outputs = torch.einsum("yi,xj,bnpqij->bnpyqx", a_t, a_t, products)
    return outputs.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def assert_composite(
    actual: Tensor, eager: Tensor, truth64: Tensor, *, factor: float = 2.0, floor: float | None = None, what: str = ""
) -> None:
    """err(actual) <= factor * err(eager of the same dtype) + floor, with err the largest absolute error.

    The floor defaults to one rounding of the largest value: where eager happens to be exact, that much is still fair.
    """
    assert eager.dtype == actual.dtype, f"{what}: the yardstick is {eager.dtype}, the result {actual.dtype}"
    finite = truth64[truth64.isfinite()].abs()
    if floor is None:
        floor = eps(actual.dtype) * (finite.max().item() if finite.numel() else 0.0)
    # Where eager has no finite answer (a row without keys) it cannot be the yardstick.
    judged = truth64.isfinite() & eager.isfinite()
    yardstick = (eager.double() - truth64)[judged].abs()
    limit = factor * (yardstick.max().item() if yardstick.numel() else 0.0) + floor
    _assert_within(actual, truth64, torch.full_like(truth64, limit), what or "composite")


def assert_lossy(actual: Tensor, truth: Tensor, *, min_sqnr_db: float, what: str = "") -> None:
    """10 log10(|truth|^2 / |actual - truth|^2) is at least `min_sqnr_db`."""
    assert actual.shape == truth.shape, f"{what}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    ratio = sqnr_db(actual, truth)
    assert ratio >= min_sqnr_db, f"{what or 'lossy'}: SQNR is {ratio:.1f} dB, below {min_sqnr_db:.1f} dB"


def sqnr_db(actual: Tensor, truth: Tensor) -> float:
    noise = (actual.double() - truth.double()).square().sum().item()
    signal = truth.double().square().sum().item()
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf


def assert_rounded(actual: Tensor, truth64: Tensor, *, scale: Tensor, error: Tensor | float, what: str = "") -> None:
    """int8 codes of a value that is known to `error`: within half a step of truth / scale, plus that and two roundings
    (of 1 / scale and of the product); beyond the range, its end."""
    assert actual.dtype == torch.int8
    wanted = truth64 / scale.double()
    slack = torch.as_tensor(error, dtype=torch.float64) / scale.double() + 2 * EPS_ACC * wanted.abs()
    clamped = wanted.clamp(-127, 127)
    _assert_within(actual, clamped, torch.where(wanted.abs() > 128, 0.0, 0.5 + slack), what or "codes")


def assert_activation(actual: Tensor, x64: Tensor, truth64: Tensor, name: str) -> None:
    """`actual` = activation `name` of exactly `x64`, within the documented bound and one rounding."""
    tolerance = activation_error(name, x64) + eps(actual.dtype) * truth64.abs().nan_to_num(0.0, 0.0, 0.0)
    _assert_within(actual, truth64, tolerance, name)


def assert_instruction(actual: Tensor, name: str, x64: Tensor, truth64: Tensor) -> None:
    """`actual` = instruction `name` of elementwise, in float32, of exactly `x64`: within its bound and one rounding."""
    rounded = truth64.float().double()  # beyond the range of float32 the truth is infinite
    if name in ACTIVATION_ERROR:
        # As the kernels that fuse them have it, an activation of -inf is 0.
        assert_activation(actual, x64, rounded.where(x64 != -math.inf, actual.double()), name)
        return
    absolute, relative = INSTRUCTION_ERROR[name]
    size = truth64.abs().where(rounded.isfinite(), torch.zeros_like(truth64))
    _assert_within(actual, rounded, absolute + (relative + EPS_ACC) * size + 2.0**-126, name)


def activation_error(name: str, x64: Tensor) -> Tensor:
    """The documented bound of a fused activation at `x64`; 0 where x is not finite, since there is nothing to round."""
    absolute, relative = ACTIVATION_ERROR[name]
    return torch.where(x64.isfinite(), absolute + relative * x64.abs(), 0.0)


def _assert_within(actual: Tensor, truth64: Tensor, tolerance: Tensor, what: str) -> None:
    assert actual.shape == truth64.shape, f"{what}: shape {list(actual.shape)}, expected {list(truth64.shape)}"
    got = actual.double()
    same = (got == truth64) | (got.isnan() & truth64.isnan())
    excess = torch.where(same, 0.0, (got - truth64).abs() - tolerance)
    excess = excess.nan_to_num(math.inf)  # NaN or infinity on one side only
    if actual.numel() and excess.max().item() > 0:
        where = tuple(int(i) for i in torch.unravel_index(excess.argmax(), truth64.shape))
        raise AssertionError(
            f"{what}: {int((excess > 0).sum())} of {actual.numel()} elements are off, the worst at {where}: "
            f"{_show(actual, where)}, expected {_show(truth64, where)} within {tolerance[where].item():.3e}"
        )


def _same_form(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"


_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().contiguous()
    return tensor.view(_INTEGER_OF_SIZE[tensor.element_size()]) if tensor.is_floating_point() else tensor


def _show(tensor: Tensor, where: tuple) -> str:
    return f"{tensor[where].item():.9g}" if tensor.is_floating_point() else str(tensor[where].item())
