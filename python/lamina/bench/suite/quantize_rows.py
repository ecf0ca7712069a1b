"""quantize_rows at the inputs of named models' layers: symmetric int8 per row against the same in eager PyTorch."""

from collections.abc import Iterator

import torch

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes
from lamina.reference.quantize_rows import quantize_rows as reference


def workloads() -> Iterator[Workload]:
    """Every line of shapes/quantize_rows.txt."""
    for model, rows, k in read_shapes("quantize_rows", columns=3):
        yield _workload(model, int(rows), int(k))


def _workload(model: str, m: int, k: int) -> Workload:
    def make_inputs() -> torch.Tensor:
        return torch.randn(m, k, generator=torch.Generator().manual_seed(m + k))

    return Workload(
        id=f"quantize_rows/{model}/{m}x{k}",
        op="quantize_rows",
        shape=f"{m}x{k}",
        dims={"M": m, "K": k},
        make_inputs=make_inputs,
        run=lambda x: lambda: lamina.ops.quantize_rows(x),
        baselines={"eager": lambda x: lambda: reference(x)},
        check=_check,
        flops=lambda x: 4 * m * k,  # magnitude, maximum, product, rounding
        bytes=lambda x: 5 * m * k + 4 * m,
        precision=lambda x: "float32",
        tags=frozenset({"op", model, "quick"}),
    )


def _check(x: torch.Tensor, output: tuple[torch.Tensor, torch.Tensor]) -> Gate:
    wrong = sum(int((ours != truth).sum()) for ours, truth in zip(output, reference(x), strict=True))
    return Gate.judge(wrong, 0, "codes and scales that differ from the reference:")
