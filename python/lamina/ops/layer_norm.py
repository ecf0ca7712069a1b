"""layer_norm: layer norm of a sum, in one pass over memory."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina import _C
from lamina.ops.library import define
from lamina.ops.token_panels import new_codes

_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def new_result(input: Tensor, residual: Tensor | None) -> Tensor:
    """Contiguous, of the shape of both and the dtype of their sum."""
    wider = input if residual is None or residual.dtype is not torch.float32 else residual
    if wider.is_contiguous():
        return torch.empty_like(wider)
    return torch.empty_like(wider, memory_format=torch.contiguous_format)


def runs_here(*tensors: Tensor | None) -> bool:
    """Whether lamina's kernels take a norm of these (the first is input); what they don't take is torch's."""
    grad = torch.is_grad_enabled()
    for t in tensors:
        if t is not None and (
            (t.dtype is not torch.float32 and t.dtype is not torch.bfloat16)
            or not t.is_cpu
            or (grad and t.requires_grad)
        ):
            return _runs_on_gpu(grad, *tensors)
    return True


def _runs_on_gpu(grad: bool, input: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> bool:
    if any(t is not None and (not t.is_cuda or (grad and t.requires_grad)) for t in (input, residual, *parameters)):
        return False
    if any(t is not None and t.dtype not in _GPU_DTYPES for t in (input, residual, *parameters)):
        return False
    # float16 and bfloat16 make float32, which no kernel has as an output of theirs.
    return residual is None or residual.dtype is input.dtype or torch.float32 in (residual.dtype, input.dtype)


def same_shape(input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the shape of their sum."""
    return (input, residual) if input.shape == residual.shape else torch.broadcast_tensors(input, residual)


def check_return_sum(op: str, residual: Tensor | None) -> None:
    if residual is None:
        raise ValueError(f"{op}: return_sum goes with a residual, but there is none to add")


def as_rows(
    op: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(input [M, K], weight [K], bias [K], residual [M, K]) for a kernel on a GPU, checked."""
    inner = tuple(normalized_shape)
    if not inner:
        raise ValueError(f"{op}: normalized_shape is empty, but must name at least one dimension")
    if input.ndim < len(inner) or tuple(input.shape[input.ndim - len(inner) :]) != inner:
        raise ValueError(f"{op}: input is {list(input.shape)}, but must end in normalized_shape, {list(inner)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and tuple(t.shape) != inner:
            raise ValueError(f"{op}: {name} is {list(t.shape)}, but must have the shape of the rows, {list(inner)}")
    for name, t in (("input", input), ("weight", weight), ("bias", bias), ("residual", residual)):
        if t is not None and t.dtype not in _GPU_DTYPES:
            raise ValueError(f"{op}: {name} is {t.dtype}, but must be float32, bfloat16 or float16")
    if residual is not None and residual.shape != input.shape:
        raise ValueError(
            f"{op}: residual is {list(residual.shape)}, but must have the shape of input, {list(input.shape)}"
        )
    if (
        residual is not None
        and residual.dtype is not input.dtype
        and torch.float32 not in (residual.dtype, input.dtype)
    ):
        raise ValueError(f"{op}: residual is {residual.dtype}, but must be float32 or, like input, {input.dtype}")
    k = math.prod(inner)
    shape = (math.prod(input.shape[: input.ndim - len(inner)]), k)
    flat = [None if t is None else t.reshape(k).contiguous() for t in (weight, bias)]
    return input.reshape(shape), *flat, None if residual is None else residual.reshape(shape)


def _cpu(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    out = new_result(input, residual)
    _C.layer_norm(input, normalized_shape, weight, bias, eps, residual, out, None)
    return out


def _cuda(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    from lamina.kernels.layer_norm import layer_norm as launch

    rows, weight, bias, added = as_rows("layer_norm", input, normalized_shape, weight, bias, residual)
    out = new_result(input, residual)
    launch(rows, weight, bias, eps, added, out.view(rows.shape))
    return out


def _fake(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor:
    return new_result(input, residual)


def _sum_cpu(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor,
) -> tuple[Tensor, Tensor]:
    out, total = new_result(input, residual), new_result(input, residual)
    _C.layer_norm(input, normalized_shape, weight, bias, eps, residual, out, total)
    return out, total


def _sum_cuda(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor,
) -> tuple[Tensor, Tensor]:
    from lamina.kernels.layer_norm import layer_norm as launch

    rows, weight, bias, added = as_rows("layer_norm", input, normalized_shape, weight, bias, residual)
    out, total = new_result(input, residual), new_result(input, residual)
    launch(rows, weight, bias, eps, added, out.view(rows.shape), total.view(rows.shape))
    return out, total


def _sum_fake(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor,
) -> tuple[Tensor, Tensor]:
    return new_result(input, residual), new_result(input, residual)


_op = define(
    "layer_norm(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-5, "
    "Tensor? residual=None) -> Tensor",
    cpu=_cpu,
    fake=_fake,
    cuda=_cuda,
)
_with_sum = define(
    "layer_norm.with_sum(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, "
    "Tensor residual) -> (Tensor norm, Tensor sum)",
    cpu=_sum_cpu,
    fake=_sum_fake,
    cuda=_sum_cuda,
)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`torch.nn.functional.layer_norm` of `input + residual`: (v - mean) / sqrt(variance + eps) * weight + bias.

    The sum is added, measured and scaled while a row is in cache, in float32 whatever the storage; bfloat16 is rounded
    once, at the end. The variance is taken of distances from the mean and corrected for the mean's own rounding (Chan,
    Golub, LeVeque 1983), so that rows far from zero keep their digits. A row that holds NaN or infinity gives NaN. The
    same inputs give the same bits on every run and for every number of threads.

    What the kernels do not cover goes to torch's own op: calls that need gradients, dtypes other than float32 and
    bfloat16 (on a GPU also float16), other devices than the CPU and NVIDIA GPUs.

    Args:
        input: [..., *normalized_shape] float32 or bfloat16, any strides.
        normalized_shape: the last dimensions, over which a row reaches.
        weight: normalized_shape, float32 or bfloat16; ones by default.
        bias: the same; zeros by default.
        eps: added to the variance.
        residual: broadcasts with input; added before the norm.
        return_sum: return (norm, input + residual), as models need that normalise before a layer and not after it.

    Returns what torch returns: contiguous, of the shape and dtype of input + residual. Raises ValueError when shapes or
    dtypes do not fit.

    >>> y = lamina.ops.layer_norm(attended, (768,), norm.weight, norm.bias, residual=x)
    """
    if return_sum:
        check_return_sum("layer_norm", residual)
    if runs_here(input, residual, weight, bias):
        if residual is not None:
            input, residual = same_shape(input, residual)
            if return_sum:
                return _with_sum(input, normalized_shape, weight, bias, eps, residual)
        return _op(input, normalized_shape, weight, bias, eps, residual)
    total = input if residual is None else input + residual
    norm = F.layer_norm(total, normalized_shape, weight, bias, eps)
    return (norm, total) if return_sum else norm


class NormCodes(NamedTuple):
    """A norm, the sum that it is of, and what `quantize_rows` makes of its rows.

    norm, sum: as `layer_norm` returns them; codes: int8 of their shape; scales: float32 [...], one for each row.
    """

    norm: Tensor
    sum: Tensor
    codes: Tensor
    scales: Tensor


def new_norm_codes(input: Tensor, normalized_shape: Sequence[int], residual: Tensor | None) -> NormCodes:
    """Empty; without a residual the sum is empty too, since it would be input."""
    norm = new_result(input, residual)
    total = norm.new_empty(0) if residual is None else new_result(input, residual)
    lead = norm.shape[: norm.ndim - len(normalized_shape)]
    return NormCodes(
        norm, total, norm.new_empty(norm.shape, dtype=torch.int8), norm.new_empty(lead, dtype=torch.float32)
    )


def launch_with_codes(launch: Callable, rows: Tensor, results: NormCodes, *operands) -> None:
    """launch(rows, *operands, norm, sum, codes, scales) of a kernel on a GPU."""
    out, total, codes, scales = results
    launch(
        rows,
        *operands,
        out.view(rows.shape),
        total.view(rows.shape) if total.shape == out.shape else None,
        codes.view(rows.shape),
        scales.view(-1),
    )


def _codes_cpu(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = new_norm_codes(input, normalized_shape, residual)
    norm, total, codes, scales = results
    _C.layer_norm(input, normalized_shape, weight, bias, eps, residual, norm, None if residual is None else total)
    shape = (scales.numel(), math.prod(normalized_shape))
    _C.quantize_rows(norm.view(shape), None, codes.view(shape), scales.view(-1))
    return results


def _codes_cuda(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from lamina.kernels.layer_norm import layer_norm as launch

    rows, weight, bias, added = as_rows("layer_norm", input, normalized_shape, weight, bias, residual)
    results = new_norm_codes(input, normalized_shape, residual)
    launch_with_codes(launch, rows, results, weight, bias, eps, added)
    return results


def _codes_fake(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return new_norm_codes(input, normalized_shape, residual)


_with_codes = define(
    "layer_norm.with_codes(Tensor input, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? residual) -> (Tensor norm, Tensor sum, Tensor codes, Tensor scales)",
    cpu=_codes_cpu,
    fake=_codes_fake,
    cuda=_codes_cuda,
)


def layer_norm_codes(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> NormCodes:
    """`layer_norm` with its sum, and the codes that the int8 layers behind it take: on a GPU one pass over memory.

    Args as in `layer_norm`. Returns NormCodes; without a residual its sum is empty. No gradient. Raises ValueError when
    shapes or dtypes do not fit.

    >>> norm, total, codes, scales = lamina.ops.layer_norm_codes(y, (768,), norm.weight, norm.bias, residual=x)
    >>> y = lamina.ops.int8_linear(codes, packed, x_scale=scales)
    """
    if residual is not None:
        input, residual = same_shape(input, residual)
    return NormCodes(*_with_codes(input, normalized_shape, weight, bias, eps, residual))


def _panels_cpu(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    if input.ndim != 3:
        raise ValueError(f"layer_norm_panels: input has shape {list(input.shape)}, but must be [panels, K, 32]")
    out = input.new_empty(input.shape)
    codes, scales = new_codes(input, input.shape[1])
    _C.layer_norm_panels(input, weight, bias, eps, out, codes, scales)
    return out, codes, scales


def _panels_fake(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(input.ndim == 3, lambda: "layer_norm_panels: input must be [panels, K, 32]")
    return input.new_empty(input.shape), *new_codes(input, input.shape[1])


_panels = define(
    "layer_norm.panels(Tensor input, Tensor? weight=None, Tensor? bias=None, float eps=1e-5) -> "
    "(Tensor norm, Tensor codes, Tensor scales)",
    cpu=_panels_cpu,
    fake=_panels_fake,
)


def layer_norm_panels(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_norm` of each token of panels, and its codes for the int8 layer behind it: see `token_panels`.

    Args:
        input: float32 [panels, K, 32], any distance from panel to panel, features one behind the other.
        weight: [K] float32 or bfloat16; ones by default.
        bias: the same; zeros by default.
        eps: added to the variance.

    Returns (norm, codes, scales): float32 of input's shape, contiguous, and what `quantize_panels` makes of it. Raises
    ValueError when shapes or dtypes do not fit.

    >>> y, *codes = lamina.ops.layer_norm_panels(panels, norm.weight, norm.bias, norm.eps)
    """
    return _panels(input, weight, bias, eps)
