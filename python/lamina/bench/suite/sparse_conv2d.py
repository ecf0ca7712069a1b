"""sparse_conv2d at the layers of a pruned ResNet-50, in channels_last, against dense convolutions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.suite.sparse_linear import MAX_ERROR, pruned
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.ops.sparse_conv2d import from_window_rows
from lamina.reference.sparse_conv2d import sparse_conv2d as reference


@dataclass(frozen=True)
class Inputs:
    """x: [B, C, H, H] channels_last; weight: [N, C, k, k] with its zeros; bias: [N]; stride, padding."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    stride: int
    padding: int


def workloads() -> Iterator[Workload]:
    """Every line of shapes/sparse_conv2d.txt."""
    for model, *sizes, pattern in read_shapes("sparse_conv2d", columns=10):
        yield _workload(model, *map(int, sizes), pattern)


def _workload(
    model: str, b: int, c: int, size: int, n: int, k: int, stride: int, padding: int, percent: int, pattern: str
) -> Workload:
    out = (size + 2 * padding - k) // stride + 1
    shape = f"{b}x{c}x{size}x{size}-{n}-k{k}s{stride}-{pattern}-{percent}"
    rows = 1 if pattern == "unstructured" else int(pattern[0])
    kept = n * c * k * k * (100 - percent) // 100

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(b + c + size + n + k)
        x = torch.randn(b, c, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
        weight = from_window_rows(pruned(n, k * k * c, rows, 1, percent / 100, generator), (k, k))
        return Inputs(x, weight.contiguous(), torch.randn(n, generator=generator), stride, padding)

    def run(inputs: Inputs) -> Callable:
        packed = lamina.ops.pack_sparse_conv_weight(inputs.weight, pattern)
        options = {"stride": stride, "padding": padding, "kernel_size": k}
        return lambda: lamina.ops.sparse_conv2d(inputs.x, packed, inputs.bias, **options)

    return Workload(
        id=f"sparse_conv2d/{model}/{shape}",
        op="sparse_conv2d",
        shape=shape,
        dims={"B": b, "C": c, "N": n, "K": k, "S": stride, "zeros": percent, "rows": rows},
        make_inputs=make_inputs,
        run=run,
        baselines={"eager": _eager},
        variants={"dense": _dense},
        check=_check,
        # Of the values that are not zero.
        flops=lambda inputs: 2 * b * out * out * kept,
        bytes=lambda inputs: 4 * (inputs.x.numel() + kept + b * n * out * out) + 2 * kept // rows,
        precision=lambda inputs: "float32",
        tags=frozenset({"op", model, pattern}),
    )


def _eager(inputs: Inputs) -> Callable:
    weight = inputs.weight.contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(inputs.x, weight, inputs.bias, inputs.stride, inputs.padding)


def _dense(inputs: Inputs) -> Callable:
    return lambda: lamina.ops.conv2d(inputs.x, inputs.weight, inputs.bias, inputs.stride, inputs.padding)


def _check(inputs: Inputs, output: torch.Tensor) -> Gate:
    strides = (inputs.stride,) * 2, (inputs.padding,) * 2
    truth = reference(inputs.x, inputs.weight, inputs.bias, *strides)
    return Gate.judge(relative_error(output, truth), MAX_ERROR[inputs.x.dtype], "relative error against the reference")
