"""weight_only_linear at the row counts of decoding on a GPU against bfloat16."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lamina
from lamina.bench import gpu
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.quant.weights import (
    dequantize_weight,
    dequantize_weight_groups,
    quantize_weight,
    quantize_weight_groups,
)

KINDS = ("int8", "int4")
GROUP = 32
# Only the weight is rounded, and the truth has it: one rounding to bfloat16 is left, and that of the dequantized weight
# where a kernel multiplies bfloat16.
MAX_ERROR = 2**-7


@dataclass(frozen=True)
class Inputs:
    """x: [M, K], weights: [N, K] of the layers that take turns, bias: [N], bfloat16."""

    x: torch.Tensor
    weights: Sequence[torch.Tensor]
    bias: torch.Tensor


def workloads() -> Iterator[Workload]:
    """Every line of shapes/gpu_weight_only_linear.txt at each of its row counts, with both kinds of weights."""
    for name, k, n, rows, layers in read_shapes("gpu_weight_only_linear", columns=5):
        for m in rows.split(","):
            for kind in KINDS:
                yield _workload(name, int(m), int(k), int(n), int(layers), kind)


def _workload(name: str, m: int, k: int, n: int, layers: int, kind: str) -> Workload:
    shape = f"{m}x{k}x{n}-{kind}-{layers}layers"
    weight_bytes = n * k + 4 * n if kind == "int8" else n * k // 2 + 2 * n * -(-k // GROUP)

    def make_inputs() -> Inputs:
        generator = torch.Generator(gpu.DEVICE).manual_seed(m + k + n)

        def tensor(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=gpu.DEVICE, dtype=torch.bfloat16)

        weight = tensor(n, k) / k**0.5
        return Inputs(tensor(m, k), [weight.clone() for _ in range(layers)], tensor(n))

    return Workload(
        id=f"gpu_weight_only_linear/{name}/{shape}",
        op="gpu_weight_only_linear",
        shape=shape,
        dims={"M": m, "K": k, "N": n},
        make_inputs=make_inputs,
        run=lambda inputs: _lamina(inputs, kind),
        baselines={"eager": _eager},
        check=lambda inputs, output: _check(inputs, output, kind),
        flops=lambda inputs: 2 * m * k * n,
        bytes=lambda inputs: weight_bytes + 2 * m * (k + n),
        resident=lambda inputs: layers * weight_bytes,
        precision=lambda inputs: "bf16",
        tags=frozenset({"op", "gpu", name, kind, "quick"}),
        device="cuda",
    )


def _in_turns(calls: Sequence[Callable[[], torch.Tensor]]) -> Callable[[], torch.Tensor]:
    following = itertools.cycle(calls)
    return lambda: next(following)()


def _lamina(inputs: Inputs, kind: str) -> Callable[[], torch.Tensor]:
    # All layers have one weight, so that it is packed once; where it lies is what makes a difference.
    pack = lamina.ops.pack_int8_weight if kind == "int8" else lamina.ops.pack_int4_weight
    first = pack(inputs.weights[0], **({} if kind == "int8" else {"group_size": GROUP}))
    packed = [type(first)(*map(_copied, first)) for _ in inputs.weights]
    function = lamina.ops.weight_only_linear
    return _in_turns([lambda p=p: function(inputs.x, p, inputs.bias) for p in packed])


def _copied(part: object) -> object:
    return part.clone() if isinstance(part, torch.Tensor) else part


def _eager(inputs: Inputs) -> Callable[[], torch.Tensor]:
    return _in_turns([lambda w=w: F.linear(inputs.x, w, inputs.bias) for w in inputs.weights])


def _check(inputs: Inputs, output: torch.Tensor, kind: str) -> Gate:
    weight = inputs.weights[0]
    if kind == "int8":
        rounded = dequantize_weight(*quantize_weight(weight))
    else:
        rounded = dequantize_weight_groups(*quantize_weight_groups(weight, GROUP), GROUP)
    truth = inputs.x.double() @ rounded.double().T + inputs.bias.double()
    return Gate.judge(relative_error(output, truth), MAX_ERROR, "relative error against the reference")
