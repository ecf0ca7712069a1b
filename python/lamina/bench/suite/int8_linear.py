"""int8_linear at the Linear layers of named models: dynamic int8 against eager float32 and torch's own dynamic int8."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.modules import caller
from lamina.bench.peers import quantize_dynamic
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.quant.weights import quantize_weight
from lamina.reference.int8_linear import int8_linear as reference

# The codes are defined exactly and the integer sums are exact: what is left is float32 rounding in scale and bias.
MAX_ERROR = 1e-6


@dataclass(frozen=True)
class Inputs:
    """x: [M, K], weight: [N, K], bias: [N], float32."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


def workloads() -> Iterator[Workload]:
    """Every line of shapes/int8_linear.txt at each of its row counts."""
    for model, layer, k, n, rows in read_shapes("int8_linear", columns=5):
        for m in rows.split(","):
            yield _workload(model, layer, int(m), int(k), int(n))


def _workload(model: str, layer: str, m: int, k: int, n: int) -> Workload:
    shape = f"{m}x{k}x{n}"

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(m * 7 + k * 3 + n)
        return Inputs(
            x=torch.randn(m, k, generator=generator),
            weight=torch.randn(n, k, generator=generator) / k**0.5,
            bias=torch.randn(n, generator=generator),
        )

    return Workload(
        id=f"int8_linear/{model}/{shape}",
        op="int8_linear",
        shape=shape,
        dims={"M": m, "K": k, "N": n},
        make_inputs=make_inputs,
        run=_lamina,
        baselines={"eager": _eager, "quantize_dynamic": _quantize_dynamic},
        check=_check,
        flops=lambda inputs: 2 * m * k * n,
        bytes=lambda inputs: 4 * m * k + n * k + 4 * n + 4 * m * n,
        precision=lambda inputs: "int8",
        tags=frozenset({"op", model, layer} | ({"quick"} if m in (1, 128, 197) else set())),
        module=lambda inputs: (_module(inputs), (inputs.x,)),
    )


def _module(inputs: Inputs) -> torch.nn.Linear:
    linear = torch.nn.Linear(inputs.weight.shape[1], inputs.weight.shape[0])
    linear.weight = torch.nn.Parameter(inputs.weight, requires_grad=False)
    linear.bias = torch.nn.Parameter(inputs.bias, requires_grad=False)
    return linear.eval()


def _lamina(inputs: Inputs):
    packed = lamina.ops.pack_int8_weight(inputs.weight)
    return lambda: lamina.ops.int8_linear(inputs.x, packed, inputs.bias)


def _eager(inputs: Inputs):
    return lambda: F.linear(inputs.x, inputs.weight, inputs.bias)


def _quantize_dynamic(inputs: Inputs):
    return caller(quantize_dynamic(_module(inputs)), (inputs.x,))


def _check(inputs: Inputs, output: torch.Tensor) -> Gate:
    truth = reference(inputs.x, *quantize_weight(inputs.weight), inputs.bias)
    return Gate.judge(relative_error(output, truth), MAX_ERROR, "relative error against the reference")
