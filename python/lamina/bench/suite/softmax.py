"""softmax where models have it outside of attention, against eager PyTorch."""

from collections.abc import Callable, Iterator

import torch

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.reference.softmax import softmax as reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def workloads() -> Iterator[Workload]:
    """Every line of shapes/softmax.txt."""
    for model, sizes, dim, dtype in read_shapes("softmax", columns=4):
        yield _workload(model, sizes, int(dim), dtype)


def _workload(model: str, sizes: str, dim: int, dtype: str) -> Workload:
    shape = [int(size) for size in sizes.split("x")]
    elements = torch.Size(shape).numel()

    def make_inputs() -> torch.Tensor:
        generator = torch.Generator().manual_seed(elements)
        return (3 * torch.randn(shape, generator=generator)).to(DTYPES[dtype])

    def eager(x: torch.Tensor) -> Callable:
        return lambda: torch.softmax(x, dim)

    def check(x: torch.Tensor, output: torch.Tensor) -> Gate:
        truth = reference(x.double(), dim)
        limit = 2 * relative_error(eager(x)(), truth) + torch.finfo(x.dtype).eps
        return Gate.judge(relative_error(output, truth), limit, "relative error against the reference")

    return Workload(
        id=f"softmax/{model}/{sizes}-dim{dim}-{dtype}",
        op="softmax",
        shape=f"{sizes}-dim{dim}-{dtype}",
        dims={"M": elements // shape[dim], "D": shape[dim]},
        make_inputs=make_inputs,
        run=lambda x: lambda: lamina.ops.softmax(x, dim),
        baselines={"eager": eager},
        check=check,
        # The largest, the distance, a power of some 14 operations, the sum, the quotient.
        flops=lambda x: 18 * elements,
        bytes=lambda x: 2 * elements * DTYPES[dtype].itemsize,
        precision=lambda x: "float32",
        tags=frozenset({"op", model, dtype} | ({"quick"} if elements <= 1 << 18 else set())),
    )
