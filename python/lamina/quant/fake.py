"""Fake quantization: values go through int8 codes and come back as floats; gradients go straight through.

The codes are those of the kernels, so that what is trained is what runs later.
"""

import torch
from torch import Tensor

from lamina.quant.weights import (
    dequantize_weight,
    dequantize_weight_groups,
    quantize_weight,
    quantize_weight_groups,
)


def fake_quantize_weight(weight: Tensor) -> Tensor:
    """weight [N, K] -> float32 [N, K] that an int8 weight with one scale per channel stands for.

    The gradient is passed on unchanged. Raises ValueError for NaN or infinity.

    >>> y = F.linear(x, fake_quantize_weight(layer.weight))
    """
    return _Through.apply(weight, dequantize_weight(*quantize_weight(weight)))


def fake_quantize_groups(weight: Tensor, group_size: int) -> Tensor:
    """weight [N, K] -> float32 [N, K] that an int4 weight with one scale per group of inputs stands for; as above."""
    return _Through.apply(weight, dequantize_weight_groups(*quantize_weight_groups(weight, group_size), group_size))


def fake_quantize_rows(x: Tensor) -> Tensor:
    """x [..., K] -> float32 [..., K] that int8 codes with one scale per row stand for; a row with NaN becomes NaN.

    The gradient is passed on unchanged: the largest value of a row has code 127, so nothing is clipped.
    """
    from lamina.ops.quantize_rows import quantize_rows

    codes, scales = quantize_rows(x.detach())
    return _Through.apply(x, codes.float() * scales[..., None])


def fake_quantize_static(x: Tensor, scale: Tensor) -> Tensor:
    """x [..., K], scale float32 [] -> float32 [..., K] that int8 codes with this scale stand for.

    The gradient of x is 0 where it is clipped; the scale's is that of LSQ: round(v) - v inside, +-127 outside, with
    v = x / scale, divided by sqrt(127 * elements) so that steps do not grow with the batch.
    """
    return _Static.apply(x, scale)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, quantized):
        ctx.dtype = x.dtype
        return quantized

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


class _Static(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        from lamina.ops.quantize_rows import quantize_rows

        codes, _ = quantize_rows(x, scale)
        ctx.save_for_backward(x, scale, codes)
        return codes.float() * scale

    @staticmethod
    def backward(ctx, grad):
        x, scale, codes = ctx.saved_tensors
        steps = x.float() / scale
        inside = steps.abs() <= 127.5
        scale_grad = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, codes - steps, codes.float())
            scale_grad = (grad * slope).sum() / max(127.0 * x.numel(), 1.0) ** 0.5
        return (grad * inside).to(x.dtype), scale_grad
