"""concatenate where models put tensors one behind the other, against eager PyTorch."""

from collections.abc import Iterator

import torch

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes
from lamina.ops.copy import LAYOUTS


def workloads() -> Iterator[Workload]:
    """Every line of shapes/concatenate.txt."""
    for model, sizes, count, dim, layout in read_shapes("concatenate", columns=5):
        yield _workload(model, sizes, int(count), int(dim), layout)


def _workload(model: str, sizes: str, count: int, dim: int, layout: str) -> Workload:
    shape = f"{count}x{sizes}-dim{dim}-{layout}"
    elements = count * torch.Size(map(int, sizes.split("x"))).numel()

    def make_inputs() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(elements)
        tensors = torch.randn([count, *map(int, sizes.split("x"))], generator=generator).unbind()
        return [t.contiguous(memory_format=LAYOUTS[layout]) for t in tensors]

    def check(tensors: list[torch.Tensor], output: torch.Tensor) -> Gate:
        return Gate.judge(float((output != torch.cat(tensors, dim)).sum()), 0.0, "elements that differ:")

    return Workload(
        id=f"concatenate/{model}/{shape}",
        op="concatenate",
        shape=shape,
        dims={"N": elements},
        make_inputs=make_inputs,
        run=lambda tensors: lambda: lamina.ops.concatenate(tensors, dim),
        baselines={"eager": lambda tensors: lambda: torch.cat(tensors, dim)},
        check=check,
        flops=lambda tensors: 0,
        bytes=lambda tensors: 2 * elements * 4,
        precision=lambda tensors: "float32",
        tags=frozenset({"op", model, "quick"}),
    )
