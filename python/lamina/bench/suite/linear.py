"""linear: float32 linear layers of named models over a packed weight, against torch's own (MKL, oneDNN)."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.suite.int8_linear import ACTIVATIONS
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.reference.linear import linear as reference

# Float32 sums of up to 4096 products, in parts; in the activations a polynomial, too.
MAX_ERROR = 1e-6
MAX_ERROR_ACTIVATED = 2e-5


@dataclass(frozen=True)
class Inputs:
    """x: [M, K], weights: [N, K] each, bias: [N], residual: [M, N] or None, activation: a name or None.

    More weights than one are those of layers that take turns, as in a model too large for the caches.
    """

    x: torch.Tensor
    weights: Sequence[torch.Tensor]
    bias: torch.Tensor
    residual: torch.Tensor | None
    activation: str | None


def workloads() -> Iterator[Workload]:
    """Every line of shapes/linear.txt at each of its row counts."""
    for model, layer, k, n, rows, extras, layers in read_shapes("linear", columns=7):
        names = [] if extras == "none" else extras.split("+")
        for m in rows.split(","):
            yield _workload(model, layer, (int(m), int(k), int(n)), names, int(layers))


def _workload(model: str, layer: str, sizes: tuple[int, int, int], extras: Sequence[str], layers: int) -> Workload:
    m, k, n = sizes
    turns = [f"{layers}layers"] if layers > 1 else []
    shape = "-".join([f"{m}x{k}x{n}", *extras, *turns])
    activation = next((name for name in extras if name in ACTIVATIONS), None)
    flows = 4 * (m * k + m * n * (2 if "residual" in extras else 1))

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(m * 7 + k * 3 + n)
        x, bias = torch.randn(m, k, generator=generator), torch.randn(n, generator=generator)
        weight = torch.randn(n, k, generator=generator) / k**0.5
        residual = torch.randn(m, n, generator=generator) if "residual" in extras else None
        # Layers that take turns differ in where their weights lie; what the weights are makes no difference to time.
        return Inputs(x, [weight.clone() for _ in range(layers)], bias, residual, activation)

    return Workload(
        id=f"linear/{model}/{shape}",
        op="linear",
        shape=shape,
        dims={"M": m, "K": k, "N": n},
        make_inputs=make_inputs,
        run=_lamina,
        baselines={"eager": _eager},
        variants={"plain": lambda inputs: _lamina(replace(inputs, activation=None))} if activation else {},
        check=_check,
        flops=lambda inputs: 2 * m * k * n,
        bytes=lambda inputs: flows + 4 * n * k,
        resident=lambda inputs: flows + layers * 4 * n * k,
        precision=lambda inputs: "float32",
        tags=frozenset({"op", model, layer} | ({"quick"} if model in ("lenet", "bert_base") and m < 512 else set())),
    )


def _lamina(inputs: Inputs):
    options = {"activation": inputs.activation}
    if inputs.residual is not None:
        options["residual"] = inputs.residual

    def layer(weight: torch.Tensor):
        packed = lamina.ops.pack_linear_weight(weight)
        return lambda: lamina.ops.linear(inputs.x, packed, inputs.bias, **options)

    return _in_turns([layer(weight) for weight in inputs.weights])


def _eager(inputs: Inputs):
    def layer(weight: torch.Tensor):
        return _finished(inputs, lambda: F.linear(inputs.x, weight, inputs.bias))

    return _in_turns([layer(weight) for weight in inputs.weights])


def _finished(inputs: Inputs, product: Callable[[], torch.Tensor]):
    """The product followed by whatever this workload adds to it, as one writes it in PyTorch."""
    residual, activation = inputs.residual, ACTIVATIONS.get(inputs.activation)
    if residual is not None and activation is not None:
        return lambda: activation(product() + residual)
    if residual is not None:
        return lambda: product() + residual
    if activation is not None:
        return lambda: activation(product())
    return product


def _in_turns(calls: Sequence[Callable[[], torch.Tensor]]):
    if len(calls) == 1:
        return calls[0]
    following = itertools.cycle(calls)
    return lambda: next(following)()


def _check(inputs: Inputs, output: torch.Tensor) -> Gate:
    truth = reference(inputs.x, inputs.weights[0], inputs.bias, inputs.activation or "none", inputs.residual)
    limit = MAX_ERROR if inputs.activation is None else MAX_ERROR_ACTIVATED
    return Gate.judge(relative_error(output, truth), limit, "relative error against the reference")
