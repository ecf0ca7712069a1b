"""embedding of tokens at the tables of named models, against eager PyTorch."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes
from lamina.reference.embedding import embedding as reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Inputs = tuple[torch.Tensor, torch.Tensor]


def workloads() -> Iterator[Workload]:
    """Every line of shapes/embedding.txt."""
    for model, batch, tokens, rows, size, dtype in read_shapes("embedding", columns=6):
        yield _workload(model, int(batch), int(tokens), int(rows), int(size), dtype)


def _workload(model: str, batch: int, tokens: int, rows: int, size: int, dtype: str) -> Workload:
    name = f"{batch}x{tokens}-of-{rows}x{size}-{dtype}"
    copied = batch * tokens * size * DTYPES[dtype].itemsize

    def make_inputs() -> Inputs:
        """indices [batch, tokens], weight [rows, size]."""
        generator = torch.Generator().manual_seed(rows)
        weight = torch.randn(rows, size, generator=generator).to(DTYPES[dtype])
        return torch.randint(0, rows, (batch, tokens), generator=generator), weight

    def eager(inputs: Inputs) -> Callable:
        return lambda: F.embedding(*inputs)

    def check(inputs: Inputs, output: torch.Tensor) -> Gate:
        wrong = (output != reference(*inputs)).double().mean().item()
        return Gate.judge(wrong, 0.0, "share of elements that differ")

    return Workload(
        id=f"embedding/{model}/{name}",
        op="embedding",
        shape=name,
        dims={"M": batch * tokens, "D": size},
        make_inputs=make_inputs,
        run=lambda inputs: lambda: lamina.ops.embedding(*inputs),
        baselines={"eager": eager},
        check=check,
        flops=lambda inputs: 0,
        bytes=lambda inputs: 2 * copied,
        precision=lambda inputs: "float32",
        tags=frozenset({"op", model, dtype} | ({"quick"} if copied <= 1 << 20 else set())),
    )
