"""int8_pool2d where networks pool, against eager float32 pooling."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes
from lamina.reference.int8_pool2d import int8_pool2d as reference


def workloads() -> Iterator[Workload]:
    """Every line of shapes/int8_pool2d.txt."""
    for model, kind, *sizes in read_shapes("int8_pool2d", columns=8):
        yield _workload(model, kind, *map(int, sizes))


def _workload(model: str, kind: str, batch: int, c: int, size: int, kernel: int, stride: int, padding: int) -> Workload:
    shape = f"{batch}x{c}x{size}x{size}-{kind}-k{kernel}"
    out = kernel if kind == "adaptive_avg" else (size + 2 * padding - kernel) // stride + 1
    window = size**2 if kind == "adaptive_avg" else out**2 * kernel**2

    def make_inputs() -> torch.Tensor:
        generator = torch.Generator().manual_seed(c + size)
        codes = torch.randint(-127, 128, (batch, c, size, size), generator=generator, dtype=torch.int8)
        return codes.contiguous(memory_format=torch.channels_last)

    def eager(codes: torch.Tensor) -> Callable:
        x = codes.float()
        if kind == "adaptive_avg":
            return lambda: F.adaptive_avg_pool2d(x, kernel)
        pool = F.max_pool2d if kind == "max" else F.avg_pool2d
        return lambda: pool(x, kernel, stride, padding)

    def check(codes: torch.Tensor, output: torch.Tensor) -> Gate:
        truth = reference(codes, kind, (kernel, kernel), (stride, stride), (padding, padding))
        return Gate.judge((output - truth).abs().max().item(), 0.5001, "distance of codes from the mean")

    return Workload(
        id=f"int8_pool2d/{model}/{shape}",
        op="int8_pool2d",
        shape=shape,
        dims={"B": batch, "C": c, "K": kernel},
        make_inputs=make_inputs,
        run=lambda codes: lambda: lamina.ops.int8_pool2d(codes, kind, kernel, stride, padding),
        baselines={"eager": eager},
        check=check,
        flops=lambda codes: batch * c * window,
        bytes=lambda codes: batch * c * (size**2 + out**2),
        precision=lambda codes: "int8",
        tags=frozenset({"op", model, "quick"}),
    )
