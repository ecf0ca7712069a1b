"""pool2d where networks pool, against eager PyTorch."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.ops.copy import LAYOUTS
from lamina.reference.pool2d import pool2d as reference


def workloads() -> Iterator[Workload]:
    """Every line of shapes/pool2d.txt."""
    for model, kind, *sizes, layout in read_shapes("pool2d", columns=9):
        yield _workload(model, kind, layout, *map(int, sizes))


def _workload(
    model: str, kind: str, layout: str, batch: int, c: int, size: int, kernel: int, stride: int, padding: int
) -> Workload:
    shape = f"{batch}x{c}x{size}x{size}-{kind}-k{kernel}-{layout}"
    out = kernel if kind == "adaptive_avg" else (size + 2 * padding - kernel) // stride + 1
    window = size**2 if kind == "adaptive_avg" else out**2 * kernel**2

    def make_inputs() -> torch.Tensor:
        generator = torch.Generator().manual_seed(c + size)
        return torch.randn(batch, c, size, size, generator=generator).contiguous(memory_format=LAYOUTS[layout])

    def eager(x: torch.Tensor) -> Callable:
        if kind == "adaptive_avg":
            return lambda: F.adaptive_avg_pool2d(x, kernel)
        pool = F.max_pool2d if kind == "max" else F.avg_pool2d
        return lambda: pool(x, kernel, stride, padding)

    def check(x: torch.Tensor, output: torch.Tensor) -> Gate:
        truth = reference(x.double(), kind, (kernel, kernel), (stride, stride), (padding, padding))
        return Gate.judge(relative_error(output, truth), 1e-6, "relative error against the reference")

    return Workload(
        id=f"pool2d/{model}/{shape}",
        op="pool2d",
        shape=shape,
        dims={"B": batch, "C": c, "K": kernel},
        make_inputs=make_inputs,
        run=lambda x: lambda: lamina.ops.pool2d(x, kind, kernel, stride, padding),
        baselines={"eager": eager},
        check=check,
        flops=lambda x: batch * c * window,
        bytes=lambda x: batch * c * (size**2 + out**2) * 4,
        precision=lambda x: "float32",
        tags=frozenset({"op", model, "quick"}),
    )
