"""reduce where models pool: over pixels in both formats, tokens and rows, against eager PyTorch."""

from collections.abc import Callable, Iterator

import torch

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.reference.reduce import REDUCTIONS
from lamina.reference.reduce import reduce as reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def workloads() -> Iterator[Workload]:
    """Every line of shapes/reduce.txt."""
    for model, sizes, form, dims, how, dtype in read_shapes("reduce", columns=6):
        yield _workload(model, sizes, form, [int(dim) for dim in dims.split(",")], how, dtype)


def _workload(model: str, sizes: str, form: str, dims: list[int], how: str, dtype: str) -> Workload:
    shape = [int(size) for size in sizes.split("x")]
    elements = torch.Size(shape).numel()
    outputs = torch.Size(size for dim, size in enumerate(shape) if dim not in dims).numel()
    name = f"{sizes}-{how}-dims{'_'.join(map(str, dims))}-{form}-{dtype}"

    def make_inputs() -> torch.Tensor:
        generator = torch.Generator().manual_seed(elements)
        x = torch.randn(shape, generator=generator).to(DTYPES[dtype])
        return x.contiguous(memory_format=torch.channels_last) if form == "last" else x

    def eager(x: torch.Tensor) -> Callable:
        return lambda: REDUCTIONS[how](x, dims)

    def check(x: torch.Tensor, output: torch.Tensor) -> Gate:
        truth = reference(x.double(), dims, how=how)
        limit = 2 * relative_error(eager(x)(), truth) + torch.finfo(x.dtype).eps
        return Gate.judge(relative_error(output, truth), limit, "relative error against the reference")

    return Workload(
        id=f"reduce/{model}/{name}",
        op="reduce",
        shape=name,
        dims={"M": outputs, "K": elements // outputs},
        make_inputs=make_inputs,
        run=lambda x: lambda: lamina.ops.reduce(x, dims, how),
        baselines={"eager": eager},
        check=check,
        flops=lambda x: elements,
        bytes=lambda x: (elements + outputs) * DTYPES[dtype].itemsize,
        precision=lambda x: "float32",
        tags=frozenset({"op", model, how, dtype, "quick"}),
    )
