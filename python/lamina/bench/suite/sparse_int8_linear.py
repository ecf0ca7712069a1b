"""sparse_int8_linear at BERT's layers: block-sparse int8 against dense eager float32 and lamina's dense int8, and from
panels to panels against the same in rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.quant.weights import quantize_weight
from lamina.reference.sparse_int8_linear import sparse_int8_linear as reference

# As int8_linear's: exact sums, then float32 rounding in scale and bias.
MAX_ERROR = 1e-6


# The layers of BERT-base as a compiled model has them: inputs, outputs.
PANEL_LAYERS = {"qkv": (768, 2304), "attention": (768, 768), "ffn_up": (768, 3072), "ffn_down": (3072, 768)}


@dataclass(frozen=True)
class Inputs:
    """x: [M, K]; weight: [N, K] with whole blocks of zeros; bias: [N]."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


def workloads() -> Iterator[Workload]:
    """Every line of shapes/sparse_int8_linear.txt at each of its row counts, patterns and shares of zero blocks."""
    for model, layer, k, n, rows, patterns, zeros in read_shapes("sparse_int8_linear", columns=7):
        for m in rows.split(","):
            for pattern in patterns.split(","):
                for share in zeros.split(","):
                    yield _workload(model, layer, (int(m), int(k), int(n)), pattern, int(share))
    for layer, (k, n) in PANEL_LAYERS.items():
        yield _panels_workload(layer, k, n)


def _workload(model: str, layer: str, sizes: tuple[int, int, int], pattern: str, zeros: int) -> Workload:
    m, k, n = sizes
    shape = f"{m}x{k}x{n}-{pattern}-{zeros}"
    rows, columns = (int(size) for size in pattern.split("x"))
    kept = 1 - zeros / 100

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(m * 7 + k * 3 + n)
        x, bias = torch.randn(m, k, generator=generator), torch.randn(n, generator=generator)
        weight = torch.randn(n, k, generator=generator) / k**0.5
        blocks = torch.rand(n // rows, k // columns, generator=generator)
        keep = blocks < blocks.flatten().kthvalue(max(1, round(kept * blocks.numel()))).values
        return Inputs(x, weight * keep.repeat_interleave(rows, 0).repeat_interleave(columns, 1), bias)

    flows = 4 * m * (k + n)
    weight_bytes = int(n * k * kept * (1 + 2 / (rows * columns))) + 8 * n
    return Workload(
        id=f"sparse_int8_linear/{model}/{shape}",
        op="sparse_int8_linear",
        shape=shape,
        dims={"M": m, "K": k, "N": n, "zeros": zeros},
        make_inputs=make_inputs,
        run=lambda inputs: _lamina(inputs, pattern),
        baselines={"eager": lambda inputs: lambda: F.linear(inputs.x, inputs.weight, inputs.bias)},
        variants={"dense int8": _dense_int8},
        check=_check,
        # What is computed, not what a dense layer would compute.
        flops=lambda inputs: round(2 * m * k * n * kept),
        bytes=lambda inputs: flows + weight_bytes,
        precision=lambda inputs: "int8",
        tags=frozenset({"op", model, layer, pattern} | ({"quick"} if m == 128 and layer == "ffn_down" else set())),
    )


def _panels_workload(layer: str, k: int, n: int) -> Workload:
    """128 tokens through a layer as a chain in panels has it: codes come in, and FFN_UP gives codes."""
    rows = _workload("bert_base", layer, (128, k, n), "4x4", 90)
    options = {"activation": "gelu"} if layer == "ffn_up" else {}
    activate = F.gelu if options else lambda y: y

    def run(inputs: Inputs):
        packed = lamina.ops.pack_sparse_int8_weight(inputs.weight, pattern="4x4")
        codes = lamina.ops.quantize_panels(lamina.ops.token_panels(inputs.x))
        quantize = bool(options)
        return lambda: lamina.ops.sparse_int8_linear_panels(*codes, packed, inputs.bias, **options, quantize=quantize)

    def with_norm(inputs: Inputs):
        packed = lamina.ops.pack_sparse_int8_weight(inputs.weight, pattern="4x4")
        codes = lamina.ops.quantize_panels(lamina.ops.token_panels(inputs.x))
        norm = (torch.ones(n), torch.zeros(n), 1e-12)
        return lambda: lamina.ops.sparse_int8_linear_panels(*codes, packed, inputs.bias, norm=norm)

    def in_rows(inputs: Inputs):
        packed = lamina.ops.pack_sparse_int8_weight(inputs.weight, pattern="4x4")
        return lambda: lamina.ops.sparse_int8_linear(inputs.x, packed, inputs.bias, **options)

    def check(inputs: Inputs, output) -> Gate:
        truth = lamina.ops.token_panels(in_rows(inputs)())
        pairs = zip(output, lamina.ops.quantize_panels(truth), strict=True) if options else [(output, truth)]
        wrong = sum(int((ours != right).sum()) for ours, right in pairs)
        return Gate.judge(wrong, 0, "numbers that differ from those of the rows:")

    return replace(
        rows,
        id=f"{rows.id}-panels",
        shape=f"{rows.shape}-panels",
        run=run,
        baselines={"eager": lambda inputs: lambda: activate(F.linear(inputs.x, inputs.weight, inputs.bias))},
        variants={"rows": in_rows} | ({"norm": with_norm} if n == 768 else {}),
        check=check,
        tags=frozenset({"op", "bert_base", layer, "4x4", "panels", "quick"}),
    )


def _lamina(inputs: Inputs, pattern: str):
    packed = lamina.ops.pack_sparse_int8_weight(inputs.weight, pattern=pattern)
    return lambda: lamina.ops.sparse_int8_linear(inputs.x, packed, inputs.bias)


def _dense_int8(inputs: Inputs):
    packed = lamina.ops.pack_int8_weight(inputs.weight)
    return lambda: lamina.ops.int8_linear(inputs.x, packed, inputs.bias)


def _check(inputs: Inputs, output: torch.Tensor) -> Gate:
    truth = reference(inputs.x, *quantize_weight(inputs.weight), inputs.bias)
    return Gate.judge(relative_error(output, truth), MAX_ERROR, "relative error against the reference")
