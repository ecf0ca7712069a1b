"""elementwise at programs that models have between their layers, against the same instructions in eager PyTorch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.reference.elementwise import elementwise as reference


@dataclass(frozen=True)
class Program:
    """inputs: of each, "full", "channel" (one value of each channel of an image, or of each column) or "column" (one of
    each row); torchs: what a model writes."""

    inputs: tuple[str, ...]
    instructions: tuple[tuple, ...]
    torchs: Callable
    constants: tuple[float, ...] = ()


ROOT_2_OVER_PI = 0.7978845608028654

PROGRAMS = {
    "add_relu": Program(("full", "full"), (("add", 0, 1), ("relu", 2)), lambda x, y: F.relu(x + y)),
    "scale_shift": Program(
        ("full", "channel", "channel"), (("mul", 0, 1), ("add", 3, 2)), lambda x, scale, shift: x * scale + shift
    ),
    "bias_gelu_add": Program(
        ("full", "channel", "full"),
        (("add", 0, 1), ("gelu", 3), ("add", 4, 2)),
        lambda x, bias, y: F.gelu(x + bias) + y,
    ),
    "gelu_by_hand": Program(
        ("full",),
        (
            *(("cube", 0), ("mul", 5, 1), ("add", 0, 6), ("mul", 7, 2)),
            *(("tanh", 8), ("add", 9, 3), ("mul", 0, 4), ("mul", 11, 10)),
        ),
        lambda x: 0.5 * x * (1 + torch.tanh(ROOT_2_OVER_PI * (x + 0.044715 * torch.pow(x, 3)))),
        (0.044715, ROOT_2_OVER_PI, 1.0, 0.5),
    ),
    "gated": Program(("full", "full"), (("silu", 0), ("mul", 2, 1)), lambda x, y: F.silu(x) * y),
    "rotate": Program(
        ("full", "channel", "full", "channel"),
        (("mul", 0, 1), ("mul", 2, 3), ("add", 4, 5)),
        lambda x, cos, y, sin: x * cos + y * sin,
    ),
    "hardswish": Program(
        ("full",),
        (("add", 0, 1), ("maximum", 4, 2), ("minimum", 5, 3), ("mul", 0, 6), ("div", 7, 3)),
        lambda x: x * torch.clamp(x + 3, 0, 6) / 6,
        (3.0, 0.0, 6.0),
    ),
    "between": Program(
        ("full", "channel", "channel"),
        (("ge", 0, 1), ("lt", 0, 2), ("logical_and", 3, 4)),
        lambda x, low, high: (x >= low) & (x < high),
    ),
}


def workloads() -> Iterator[Workload]:
    """Every line of shapes/elementwise.txt."""
    for model, name, shape in read_shapes("elementwise", columns=3):
        yield _workload(model, name, shape)


def _workload(model: str, name: str, shape: str) -> Workload:
    program = PROGRAMS[name]
    sizes = tuple(map(int, shape.split("x")))
    shapes = {
        "full": sizes,
        "channel": (sizes[1], *[1] * (len(sizes) - 2)) if len(sizes) == 4 else sizes[-1:],
        "column": (*sizes[:-1], 1),
    }
    full = sum(kind == "full" for kind in program.inputs)
    elements = torch.Size(sizes).numel()

    def make_inputs() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(elements)
        return [torch.randn(shapes[kind], generator=generator) for kind in program.inputs]

    def check(inputs: list[torch.Tensor], output: torch.Tensor) -> Gate:
        truth = reference([x.double() for x in inputs], program.instructions, program.constants)
        return Gate.judge(relative_error(output, truth), 3e-6, "relative error against the reference")

    return Workload(
        id=f"elementwise/{model}/{shape}-{name}",
        op="elementwise",
        shape=f"{shape}-{name}",
        dims={"N": elements, "INSTRUCTIONS": len(program.instructions)},
        make_inputs=make_inputs,
        run=lambda inputs: lambda: lamina.ops.elementwise(inputs, program.instructions, program.constants),
        baselines={"eager": lambda inputs: lambda: program.torchs(*inputs)},
        check=check,
        flops=lambda inputs: elements * len(program.instructions),
        bytes=lambda inputs: (full + 1) * elements * 4,
        precision=lambda inputs: "float32",
        tags=frozenset({"op", model, "quick"}),
    )
