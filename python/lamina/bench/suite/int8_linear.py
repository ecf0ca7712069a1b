"""int8_linear at the Linear layers of named models: dynamic int8 against eager PyTorch and torch's own dynamic int8."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

import lamina
from lamina.bench.modules import caller
from lamina.bench.peers import quantize_dynamic
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.quant.weights import quantize_weight
from lamina.reference.int8_linear import int8_linear as reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
# The codes are defined exactly and the integer sums are exact: what is left is float32 rounding in scale and bias, a
# polynomial in the activations, and the one rounding of the output in bfloat16.
MAX_ERROR = 1e-6
MAX_ERROR_ACTIVATED = 2e-5
MAX_ERROR_BFLOAT16 = 2**-8


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
    """Every line of shapes/int8_linear.txt at each of its row counts."""
    for model, layer, k, n, rows, dtype, extras, layers in read_shapes("int8_linear", columns=8):
        names = [] if extras == "none" else extras.split("+")
        activations = [name for name in names if name in ACTIVATIONS]
        if dtype not in DTYPES or len(activations) > 1 or set(names) - {"residual", *activations}:
            raise ValueError(
                f"shapes/int8_linear.txt has {dtype} {extras}; dtypes: {', '.join(DTYPES)}; extras: none, residual, "
                f"{', '.join(ACTIVATIONS)}, or residual+ACTIVATION"
            )
        for m in rows.split(","):
            yield _workload(model, layer, (int(m), int(k), int(n)), dtype, names, int(layers))


def _workload(
    model: str, layer: str, sizes: tuple[int, int, int], dtype: str, extras: Sequence[str], layers: int
) -> Workload:
    m, k, n = sizes
    turns = [f"{layers}layers"] if layers > 1 else []
    shape = "-".join([f"{m}x{k}x{n}", *([dtype] if dtype != "float32" else []), *extras, *turns])
    activation = next((name for name in extras if name in ACTIVATIONS), None)
    width = DTYPES[dtype].itemsize
    # Every row count of one model, and the ends of the others'; nothing that takes seconds to prepare.
    quick = (model == "bert_base" or m in (1, 128, 197)) and layers * n * k < 2e7
    flows = m * k + m * n * (2 if "residual" in extras else 1)

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(m * 7 + k * 3 + n)

        def tensor(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        x, weight, bias = tensor(m, k), tensor(n, k) / k**0.5, tensor(n)
        # Layers that take turns differ in where their weights lie; what the weights are makes no difference to time.
        weights = [weight.to(DTYPES[dtype]).clone() for _ in range(layers)]
        residual = tensor(m, n).to(DTYPES[dtype]) if "residual" in extras else None
        return Inputs(x.to(DTYPES[dtype]), weights, bias.to(DTYPES[dtype]), residual, activation)

    baselines = {"eager": _eager}
    if dtype == "float32":  # torch's dynamic int8 takes nothing else
        baselines["quantize_dynamic"] = _quantize_dynamic
    return Workload(
        id=f"int8_linear/{model}/{shape}",
        op="int8_linear",
        shape=shape,
        dims={"M": m, "K": k, "N": n},
        make_inputs=make_inputs,
        run=_lamina,
        baselines=baselines,
        variants={"plain": lambda inputs: _lamina(replace(inputs, activation=None))} if activation else {},
        check=_check,
        flops=lambda inputs: 2 * m * k * n,
        bytes=lambda inputs: width * flows + n * k + 4 * n,
        resident=lambda inputs: width * flows + layers * (n * k + 4 * n),
        precision=lambda inputs: "int8",
        tags=frozenset({"op", model, layer} | ({"quick"} if quick else set())),
        module=lambda inputs: (_module(inputs, inputs.weights[0]), (inputs.x,)) if not extras else (None, ()),
    )


def _module(inputs: Inputs, weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    linear.bias = torch.nn.Parameter(inputs.bias, requires_grad=False)
    return linear.eval()


def _lamina(inputs: Inputs):
    options = {"activation": inputs.activation}
    if inputs.residual is not None:
        options["residual"] = inputs.residual

    def layer(weight: torch.Tensor):
        packed = lamina.ops.pack_int8_weight(weight)
        return lambda: lamina.ops.int8_linear(inputs.x, packed, inputs.bias, **options)

    return _in_turns([layer(weight) for weight in inputs.weights])


def _eager(inputs: Inputs):
    def layer(weight: torch.Tensor):
        return lambda: F.linear(inputs.x, weight, inputs.bias)

    return _in_turns([_finished(inputs, layer(weight)) for weight in inputs.weights])


def _quantize_dynamic(inputs: Inputs):
    layers = [caller(quantize_dynamic(_module(inputs, weight)), (inputs.x,)) for weight in inputs.weights]
    return _in_turns([_finished(inputs, layer) for layer in layers])


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
    product = reference(inputs.x, *quantize_weight(inputs.weights[0]), inputs.bias)
    residual = None if inputs.residual is None else inputs.residual.double()
    truth = _finished(replace(inputs, residual=residual), lambda: product)()
    limit = MAX_ERROR if inputs.activation is None else MAX_ERROR_ACTIVATED
    if inputs.x.dtype == torch.bfloat16:
        limit = MAX_ERROR_BFLOAT16
    return Gate.judge(relative_error(output, truth), limit, "relative error against the reference")
