"""layer_norm at the rows of named models, with and without the sum before it, against eager PyTorch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.reference.layer_norm import layer_norm as reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = ("plain", "add", "add_sum")


@dataclass(frozen=True)
class Inputs:
    """x and residual (None for "plain"): [rows, size]; weight and, for layer_norm, bias: [size], of the same dtype."""

    x: torch.Tensor
    residual: torch.Tensor | None
    parameters: tuple[torch.Tensor, ...]
    returns_sum: bool


def workloads() -> Iterator[Workload]:
    """Every line of shapes/layer_norm.txt, and one in panels."""
    yield from norm_workloads("layer_norm", 2, lamina.ops.layer_norm, F.layer_norm, reference)
    yield _panels_workload(128, 768)


def _panels_workload(rows: int, size: int) -> Workload:
    """A norm of panels, with the codes that the int8 layer behind it takes, against norm and codes of rows."""
    plain = _workload(
        "layer_norm", "bert_base", rows, size, "float32", "plain", 2, lamina.ops.layer_norm, F.layer_norm, reference
    )
    shape = f"{rows}x{size}-panels"

    def run(inputs: Inputs) -> Callable:
        panels = lamina.ops.token_panels(inputs.x)
        return lambda: lamina.ops.layer_norm_panels(panels, *inputs.parameters)

    def in_rows(inputs: Inputs) -> Callable:
        return lambda: lamina.ops.quantize_rows(lamina.ops.layer_norm(inputs.x, (size,), *inputs.parameters))

    return replace(
        plain,
        id=f"layer_norm/bert_base/{shape}",
        shape=shape,
        run=run,
        variants={"rows": in_rows},
        check=lambda inputs, output: plain.check(inputs, lamina.ops.token_rows(output[0], (rows,))),
        bytes=lambda inputs: rows * size * 9,
        tags=frozenset({"op", "bert_base", "float32", "panels", "quick"}),
    )


def norm_workloads(op: str, parameters: int, ours: Callable, torchs: Callable, truth: Callable) -> Iterator[Workload]:
    """The workloads of shapes/<op>.txt for a norm with so many parameters and signatures like layer_norm's."""
    for model, rows, size, dtype, kind in read_shapes(op, columns=5):
        if dtype not in DTYPES or kind not in KINDS:
            raise ValueError(
                f"shapes/{op}.txt has {dtype} {kind}; dtypes: {', '.join(DTYPES)}; kinds: {', '.join(KINDS)}"
            )
        yield _workload(op, model, int(rows), int(size), dtype, kind, parameters, ours, torchs, truth)


def _workload(
    op: str,
    model: str,
    rows: int,
    size: int,
    dtype: str,
    kind: str,
    parameters: int,
    ours: Callable,
    torchs: Callable,
    truth: Callable,
) -> Workload:
    shape = f"{rows}x{size}-{dtype}-{kind}"
    # Read x and the residual, write the norm and the sum.
    passes = {"plain": 2, "add": 3, "add_sum": 4}[kind]

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(rows + size)

        def tensor(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(DTYPES[dtype])

        residual = None if kind == "plain" else tensor(rows, size)
        return Inputs(tensor(rows, size), residual, tuple(tensor(size) for _ in range(parameters)), kind == "add_sum")

    def run(inputs: Inputs) -> Callable:
        if inputs.residual is None:
            return lambda: ours(inputs.x, (size,), *inputs.parameters)
        options = {"residual": inputs.residual, "return_sum": inputs.returns_sum}
        return lambda: ours(inputs.x, (size,), *inputs.parameters, **options)

    def eager(inputs: Inputs) -> Callable:
        def call():
            total = inputs.x if inputs.residual is None else inputs.x + inputs.residual
            norm = torchs(total, (size,), *inputs.parameters)
            return (norm, total) if inputs.returns_sum else norm

        return call

    def check(inputs: Inputs, output) -> Gate:
        total = inputs.x.double() if inputs.residual is None else inputs.x.double() + inputs.residual.double()
        right = truth(total, (size,), *(p.double() for p in inputs.parameters))
        yardstick = eager(inputs)()
        if inputs.returns_sum:
            output, right = torch.cat(output), torch.cat([right, total])
            yardstick = torch.cat(yardstick)
        limit = 2 * relative_error(yardstick, right) + torch.finfo(inputs.x.dtype).eps
        return Gate.judge(relative_error(output, right), limit, "relative error against the reference")

    return Workload(
        id=f"{op}/{model}/{shape}",
        op=op,
        shape=shape,
        dims={"M": rows, "D": size, "ADD": int(kind != "plain")},
        make_inputs=make_inputs,
        run=run,
        baselines={"eager": eager},
        check=check,
        # Sum, distance, square, scale, weight and bias: what a row of any norm takes, by order.
        flops=lambda inputs: 8 * rows * size,
        bytes=lambda inputs: passes * rows * size * DTYPES[dtype].itemsize,
        precision=lambda inputs: "float32",
        tags=frozenset({"op", model, dtype, kind} | ({"quick"} if rows <= 128 else set())),
    )
