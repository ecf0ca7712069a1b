"""weight_only_linear at the row counts of decoding: int8 and int4 weights against eager and torch's dynamic int8."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.modules import caller
from lamina.bench.peers import quantize_dynamic
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.quant.weights import quantize_weight, quantize_weight_groups
from lamina.reference.weight_only_linear import dequantize
from lamina.reference.weight_only_linear import weight_only_linear as reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Only the weight is rounded, and the truth has it: float32 sums of up to 11008 products are left, or one bfloat16.
MAX_ERROR = {torch.float32: 3e-6, torch.bfloat16: 4e-3}

PACK = {"int8": lamina.ops.pack_int8_weight, "int4": lamina.ops.pack_int4_weight}
GROUP = 32


@dataclass(frozen=True)
class Inputs:
    """x: [M, K], weights: one [N, K] for each layer that takes a turn, bias: [N], all of one dtype."""

    x: torch.Tensor
    weights: Sequence[torch.Tensor]
    bias: torch.Tensor


def workloads() -> Iterator[Workload]:
    """Every line of shapes/weight_only_linear.txt at each of its row counts, with both kinds of weights."""
    for model, layer, k, n, rows, dtype, layers in read_shapes("weight_only_linear", columns=7):
        for m in rows.split(","):
            for kind in PACK:
                yield _workload(model, layer, (int(m), int(k), int(n)), DTYPES[dtype], int(layers), kind)


def _workload(
    model: str, layer: str, sizes: tuple[int, int, int], dtype: torch.dtype, layers: int, kind: str
) -> Workload:
    m, k, n = sizes
    turns = [f"{layers}layers"] if layers > 1 else []
    name = [] if dtype == torch.float32 else ["bfloat16"]
    shape = "-".join([f"{m}x{k}x{n}", kind, *name, *turns])
    weight_bytes = n * k + 4 * n if kind == "int8" else n * k // 2 + 2 * n * -(-k // GROUP)
    flows = dtype.itemsize * m * (k + n)

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(m * 7 + k * 3 + n)
        x, bias = torch.randn(m, k, generator=generator), torch.randn(n, generator=generator)
        weight = torch.randn(n, k, generator=generator) / k**0.5
        # Layers that take turns differ in where their weights lie; what the weights are makes no difference to time.
        return Inputs(x.to(dtype), [weight.to(dtype).clone() for _ in range(layers)], bias.to(dtype))

    baselines = {"eager": _eager}
    if dtype == torch.float32:  # torch's dynamic int8 takes nothing else
        baselines["quantize_dynamic"] = _quantize_dynamic
    return Workload(
        id=f"weight_only_linear/{model}/{shape}",
        op="weight_only_linear",
        shape=shape,
        dims={"M": m, "K": k, "N": n},
        make_inputs=make_inputs,
        run=lambda inputs: _lamina(inputs, kind),
        baselines=baselines,
        variants={"int8": lambda inputs: _lamina(inputs, "int8")} if kind == "int4" else {},
        check=lambda inputs, output: _check(inputs, output, kind),
        flops=lambda inputs: 2 * m * k * n,
        bytes=lambda inputs: flows + weight_bytes,
        resident=lambda inputs: flows + layers * weight_bytes,
        precision=lambda inputs: "int8",
        tags=frozenset({"op", model, layer, kind} | ({"quick"} if m in (1, 128) and n * k < 1e7 else set())),
    )


def _lamina(inputs: Inputs, kind: str):
    def layer(weight: torch.Tensor):
        packed = PACK[kind](weight)
        return lambda: lamina.ops.weight_only_linear(inputs.x, packed, inputs.bias)

    return _in_turns([layer(weight) for weight in inputs.weights])


def _eager(inputs: Inputs):
    def layer(weight: torch.Tensor):
        return lambda: F.linear(inputs.x, weight, inputs.bias)

    return _in_turns([layer(weight) for weight in inputs.weights])


def _quantize_dynamic(inputs: Inputs):
    def layer(weight: torch.Tensor):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        linear.bias = torch.nn.Parameter(inputs.bias, requires_grad=False)
        return caller(quantize_dynamic(linear.eval()), (inputs.x,))

    return _in_turns([layer(weight) for weight in inputs.weights])


def _in_turns(calls: Sequence[Callable[[], torch.Tensor]]):
    if len(calls) == 1:
        return calls[0]
    following = itertools.cycle(calls)
    return lambda: next(following)()


def _check(inputs: Inputs, output: torch.Tensor, kind: str) -> Gate:
    quantized = (
        quantize_weight(inputs.weights[0]) if kind == "int8" else quantize_weight_groups(inputs.weights[0], GROUP)
    )
    truth = reference(inputs.x, dequantize(*quantized, 0 if kind == "int8" else GROUP), inputs.bias)
    return Gate.judge(relative_error(output, truth), MAX_ERROR[inputs.x.dtype], "relative error against the reference")
