"""int8_conv2d on a GPU at the sizes of ResNet-50, against bfloat16 in channels_last."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lamina
from lamina.bench import gpu
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.reference.int8_conv2d import int8_conv2d as reference

# Sums are exact; the one rounding to bfloat16 is left.
MAX_ERROR = 2**-8


@dataclass(frozen=True)
class Inputs:
    """x: [B, C, H, W] channels_last; conv: bfloat16; int8: the layer made of it."""

    x: torch.Tensor
    conv: torch.nn.Conv2d
    int8: torch.nn.Module


def workloads() -> Iterator[Workload]:
    """Every line of shapes/gpu_int8_conv2d.txt."""
    for name, *sizes in read_shapes("gpu_int8_conv2d", columns=7):
        yield _workload(name, *map(int, sizes))


def _workload(name: str, b: int, c: int, side: int, n: int, kernel: int, stride: int) -> Workload:
    shape = f"{b}x{c}x{side}x{side}-n{n}-k{kernel}" + (f"-s{stride}" if stride > 1 else "")
    out = (side - 1) // stride + 1

    def make_inputs() -> Inputs:
        with torch.inference_mode(False), torch.no_grad():
            torch.manual_seed(c + n)
            conv = torch.nn.Conv2d(c, n, kernel, stride, kernel // 2, device=gpu.DEVICE, dtype=torch.bfloat16).eval()
            conv = conv.to(memory_format=torch.channels_last)
            x = torch.randn(b, c, side, side, device=gpu.DEVICE, dtype=torch.bfloat16)
            return Inputs(
                x.contiguous(memory_format=torch.channels_last), conv, lamina.nn.Int8Conv2d.from_float(conv, "relu")
            )

    return Workload(
        id=f"gpu_int8_conv2d/{name}/{shape}",
        op="gpu_int8_conv2d",
        shape=shape,
        dims={"B": b, "C": c, "N": n, "SIDE": side},
        make_inputs=make_inputs,
        run=lambda inputs: lambda: inputs.int8(inputs.x),
        baselines={"eager": _eager},
        check=_check,
        flops=lambda inputs: 2 * b * n * out * out * c * kernel * kernel,
        bytes=lambda inputs: 2 * b * (c * side * side + n * out * out) + n * c * kernel * kernel,
        precision=lambda inputs: "int8",
        tags=frozenset({"op", "gpu", name, "quick"}),
        device="cuda",
    )


def _eager(inputs: Inputs) -> Callable[[], torch.Tensor]:
    return lambda: F.relu(inputs.conv(inputs.x))


def _check(inputs: Inputs, output: torch.Tensor) -> Gate:
    layer, one = inputs.int8, slice(0, 1)
    (y, x), (codes, scale) = layer.padding, layer._saved()
    geometry = layer.stride, (y, y, x, x), layer.dilation
    truth = reference(inputs.x[one], codes, scale, inputs.conv.bias, *geometry, activation="relu")
    return Gate.judge(relative_error(output[one], truth), MAX_ERROR, "relative error against the reference")
