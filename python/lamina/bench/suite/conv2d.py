"""conv2d at the layers of named models, in channels_last, against eager PyTorch in the better of its two layouts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error

# Relative error (Euclidean) beside eager's own: F(2x2) is about as exact as the direct sum, F(4x4) loses a digit.
_FACTOR = {0: 2, 2: 4, 4: 30}


@dataclass(frozen=True)
class Inputs:
    """x: [B, C, H, H] channels_last; weight: [N, C / groups, k, k]; options: stride, padding, dilation, groups."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    options: tuple[int, int, int, int]


def workloads() -> Iterator[Workload]:
    """Every line of shapes/conv2d.txt."""
    for model, *sizes in read_shapes("conv2d", columns=10):
        yield _workload(model, *map(int, sizes))


def _workload(
    model: str, b: int, c: int, size: int, n: int, k: int, stride: int, padding: int, groups: int, tile: int
) -> Workload:
    out = (size + 2 * padding - k) // stride + 1
    shape = f"{b}x{c}x{size}x{size}-{n}-k{k}s{stride}" + (f"-g{groups}" if groups > 1 else "")
    shape += f"-f{tile}" if tile else ""

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(b + c + size + n + k)
        x = torch.randn(b, c, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(n, c // groups, k, k, generator=generator) / (c // groups * k * k) ** 0.5
        return Inputs(x, weight, torch.randn(n, generator=generator), (stride, padding, 1, groups))

    def run(inputs: Inputs) -> Callable:
        return lambda: lamina.ops.conv2d(inputs.x, inputs.weight, inputs.bias, *inputs.options, winograd=tile)

    def check(inputs: Inputs, output: torch.Tensor) -> Gate:
        right = F.conv2d(inputs.x.double(), inputs.weight.double(), inputs.bias.double(), *inputs.options)
        limit = _FACTOR[tile] * relative_error(_eager(inputs)(), right) + torch.finfo(torch.float32).eps
        return Gate.judge(relative_error(output, right), limit, "relative error against float64")

    return Workload(
        id=f"conv2d/{model}/{shape}",
        op="conv2d",
        shape=shape,
        dims={"B": b, "C": c, "N": n, "K": k, "S": stride, "G": groups, "F": tile},
        make_inputs=make_inputs,
        run=run,
        baselines={"eager": _eager, "eager NCHW": _eager_nchw},
        check=check,
        # Of the direct sum: Winograd does the same work in fewer operations, and may pass the peak.
        flops=lambda inputs: 2 * b * n * out * out * (c // groups) * k * k,
        bytes=lambda inputs: 4 * (inputs.x.numel() + inputs.weight.numel() + b * n * out * out),
        precision=lambda inputs: "float32",
        tags=frozenset({"op", model} | ({"quick"} if b == 1 and k == 3 else set())),
    )


def _eager(inputs: Inputs) -> Callable:
    weight = inputs.weight.contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(inputs.x, weight, inputs.bias, *inputs.options)


def _eager_nchw(inputs: Inputs) -> Callable:
    x = inputs.x.contiguous()
    return lambda: F.conv2d(x, inputs.weight, inputs.bias, *inputs.options)
