"""token_panels at the ends of a chain of sparse layers: rows to panels, their codes, and back; against eager."""

from collections.abc import Iterator

import torch

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes
from lamina.reference import token_panels as reference


def workloads() -> Iterator[Workload]:
    """Every line of shapes/token_panels.txt."""
    for model, *sizes in read_shapes("token_panels", columns=4):
        yield _workload(model, *map(int, sizes))


def _workload(model: str, sequences: int, length: int, k: int) -> Workload:
    tokens = sequences * length

    def make_inputs() -> torch.Tensor:
        return torch.randn(sequences, length, k, generator=torch.Generator().manual_seed(tokens + k))

    return Workload(
        id=f"token_panels/{model}/{sequences}x{length}x{k}",
        op="token_panels",
        shape=f"{sequences}x{length}x{k}",
        dims={"B": sequences, "M": length, "K": k},
        make_inputs=make_inputs,
        run=lambda x: lambda: lamina.ops.token_panels(x),
        baselines={"eager": lambda x: lambda: reference.token_panels(x)},
        variants={"codes": _codes, "back": _back},
        check=_check,
        flops=lambda x: tokens * k,
        bytes=lambda x: 8 * tokens * k,
        precision=lambda x: "float32",
        tags=frozenset({"op", model, "quick"}),
    )


def _codes(x: torch.Tensor):
    panels = lamina.ops.token_panels(x)
    return lambda: lamina.ops.quantize_panels(panels)


def _back(x: torch.Tensor):
    panels = lamina.ops.token_panels(x)
    return lambda: lamina.ops.token_rows(panels, x.shape[:-1])


def _check(x: torch.Tensor, output: torch.Tensor) -> Gate:
    pairs = [
        (output, reference.token_panels(x)),
        (lamina.ops.token_rows(output, x.shape[:-1]), x),
        *zip(lamina.ops.quantize_panels(output), reference.quantize_panels(output), strict=True),
    ]
    wrong = sum(int((ours != truth).sum()) for ours, truth in pairs)
    return Gate.judge(wrong, 0, "numbers that differ from the reference:")
