"""group_norm where networks have it, with its activation, against eager PyTorch."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.reference.group_norm import group_norm as reference
from lamina.reference.int8_linear import ACTIVATIONS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def workloads() -> Iterator[Workload]:
    """Every line of shapes/group_norm.txt."""
    for model, sizes, groups, form, activation, dtype in read_shapes("group_norm", columns=6):
        yield _workload(model, sizes, int(groups), form, activation, dtype)


def _workload(model: str, sizes: str, groups: int, form: str, activation: str, dtype: str) -> Workload:
    shape = [int(size) for size in sizes.split("x")]
    elements = torch.Size(shape).numel()
    name = f"{sizes}-groups{groups}-{form}-{activation}-{dtype}"

    def make_inputs() -> Inputs:
        """x [N, C, H, W], weight and bias [C], of one dtype."""
        generator = torch.Generator().manual_seed(elements)
        x, weight, bias = (torch.randn(s, generator=generator).to(DTYPES[dtype]) for s in (shape, shape[1], shape[1]))
        return x.contiguous(memory_format=torch.channels_last) if form == "last" else x, weight, bias

    def eager(inputs: Inputs) -> Callable:
        x, *affine = inputs
        act = ACTIVATIONS[activation]
        return lambda: act(F.group_norm(x, groups, *affine))

    def check(inputs: Inputs, output: torch.Tensor) -> Gate:
        x, weight, bias = (t.double() for t in inputs)
        truth = reference(x, groups, weight, bias, activation=activation)
        limit = 2 * relative_error(eager(inputs)(), truth) + 8 * torch.finfo(inputs[0].dtype).eps
        return Gate.judge(relative_error(output, truth), limit, "relative error against the reference")

    return Workload(
        id=f"group_norm/{model}/{name}",
        op="group_norm",
        shape=name,
        dims={"B": shape[0], "C": shape[1], "G": groups},
        make_inputs=make_inputs,
        run=lambda inputs: lambda: lamina.ops.group_norm(inputs[0], groups, *inputs[1:], activation=activation),
        baselines={"eager": eager},
        check=check,
        # Sum, distance, square, distance again, scale and bias.
        flops=lambda inputs: 7 * elements,
        bytes=lambda inputs: 2 * elements * DTYPES[dtype].itemsize,
        precision=lambda inputs: "float32",
        tags=frozenset({"op", model, form, dtype, "quick"}),
    )
