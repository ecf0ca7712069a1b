"""copy where models change a layout, against eager PyTorch."""

from collections.abc import Callable, Iterator

import torch

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes
from lamina.ops.copy import LAYOUTS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def workloads() -> Iterator[Workload]:
    """Every line of shapes/copy.txt."""
    for line in read_shapes("copy", columns=5):
        yield _workload(*line)


def _workload(model: str, sizes: str, order: str, dtype: str, layout: str) -> Workload:
    shape = f"{sizes}-{order}-{dtype}-{layout}"
    elements = torch.Size(map(int, sizes.split("x"))).numel()

    def make_inputs() -> torch.Tensor:
        generator = torch.Generator().manual_seed(elements)
        x = torch.randn([int(size) for size in sizes.split("x")], generator=generator)
        return x.to(DTYPES[dtype]).permute([int(dim) for dim in order])

    def eager(x: torch.Tensor) -> Callable:
        return lambda: x.contiguous(memory_format=LAYOUTS[layout])

    def check(x: torch.Tensor, output: torch.Tensor) -> Gate:
        return Gate.judge(float((output != x).sum()), 0.0, "elements that differ:")

    return Workload(
        id=f"copy/{model}/{shape}",
        op="copy",
        shape=shape,
        dims={"N": elements},
        make_inputs=make_inputs,
        run=lambda x: lambda: lamina.ops.copy(x, layout=layout),
        baselines={"eager": eager},
        check=check,
        flops=lambda x: 0,
        bytes=lambda x: 2 * elements * DTYPES[dtype].itemsize,
        precision=lambda x: "float32",
        tags=frozenset({"op", model, dtype, "quick"}),
    )
