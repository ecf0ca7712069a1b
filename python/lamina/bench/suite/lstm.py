"""lstm over whole sequences against eager nn.LSTM; the other recurrent ops are measured the same way, on shapes of
their own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

import lamina
from lamina.bench.modules import caller
from lamina.bench.peers import PEERS, convert, quantize_dynamic
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.reference.gru import gru as gru_reference
from lamina.reference.lstm import lstm as lstm_reference
from lamina.reference.rnn_relu import rnn_relu as rnn_relu_reference
from lamina.reference.rnn_tanh import rnn_tanh as rnn_tanh_reference

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_REFERENCES = {
    "lstm": lstm_reference,
    "gru": gru_reference,
    "rnn_tanh": rnn_tanh_reference,
    "rnn_relu": rnn_relu_reference,
}

# Where a promise is made against ONNX Runtime it is always timed; elsewhere it is one of the peers (`--peers`). It has
# int8 LSTM, but no int8 GRU.
_AGAINST_ONNX_RUNTIME = ("speech", "text")

# int8: relative error of the output against the float layer. Weights and states carry 0.5% of noise each, which gates
# that saturate damp.
_INT8_ERROR = 0.03


@dataclass(frozen=True)
class Inputs:
    """x: [T, B, I]; state: what the layers take and give; torch's layer and lamina's, which share their weights."""

    x: torch.Tensor
    state: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    layer: torch.nn.RNNBase
    fused: torch.nn.RNNBase


def workloads() -> Iterator[Workload]:
    """Every line of shapes/lstm.txt."""
    return of("lstm")


def of(op: str) -> Iterator[Workload]:
    """Every line of the op's shape file."""
    for model, *sizes in read_shapes(op, columns=6):
        yield _workload(op, model, *map(int, sizes))


def _workload(op: str, model: str, t: int, b: int, i: int, h: int, layers: int) -> Workload:
    cell, is_int8 = op.removeprefix("int8_"), op.startswith("int8_")
    shape = f"{t}x{b}x{i}x{h}" + (f"x{layers}layers" if layers > 1 else "")
    weights = _GATES[cell] * h * (i + h + (layers - 1) * 2 * h)

    baselines = {"eager": _eager}
    if is_int8:
        baselines["quantize_dynamic"] = _quantize_dynamic
    if op == "int8_lstm" and model in _AGAINST_ONNX_RUNTIME:
        baselines["ort int8"] = _onnx_runtime

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(t + b * 3 + i + h * 7)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            name, _, nonlinearity = cell.upper().partition("_")
            options = {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}
            layer = getattr(torch.nn, name)(i, h, layers, **options).eval()
        state = torch.randn(layers, b, h, generator=generator)
        return Inputs(
            x=torch.randn(t, b, i, generator=generator),
            state=(state, torch.randn(layers, b, h, generator=generator)) if cell == "lstm" else state,
            layer=layer,
            fused=getattr(lamina.nn, f"Int8{name}" if is_int8 else name).from_float(layer),
        )

    return Workload(
        id=f"{op}/{model}/{shape}",
        op=op,
        shape=shape,
        dims={"T": t, "B": b, "I": i, "H": h, "L": layers},
        make_inputs=make_inputs,
        run=lambda inputs: lambda: inputs.fused(inputs.x, inputs.state),
        baselines=baselines,
        check=_check_int8 if is_int8 else partial(_check, _REFERENCES[cell]),
        flops=lambda inputs: 2 * t * b * weights,
        # The weights of the state are read at every step, if they do not fit a cache; once at least.
        bytes=lambda inputs: (1 if is_int8 else 4) * weights + 4 * t * b * (i + h),
        precision=lambda inputs: "int8" if is_int8 else "float32",
        tags=frozenset({"op", model} | ({"quick"} if t * b * weights < 1 << 26 else set())),
        module=lambda inputs: (inputs.layer, (inputs.x, inputs.state)),
    )


def _eager(inputs: Inputs) -> Callable:
    return lambda: inputs.layer(inputs.x, inputs.state)


def _check(reference: Callable, inputs: Inputs, output) -> Gate:
    layer = inputs.layer
    states = inputs.state if isinstance(inputs.state, tuple) else (inputs.state,)
    weights = [w.detach().double() for w in layer.parameters()]
    truth, *_ = reference(inputs.x.double(), None, *(s.double() for s in states), weights, layer.num_layers)
    yardstick = relative_error(_eager(inputs)()[0], truth)
    limit = 2 * yardstick + 4 * torch.finfo(torch.float32).eps
    return Gate.judge(relative_error(output[0], truth), limit, "relative error against the reference")


def _onnx_runtime(inputs: Inputs) -> Callable:
    return convert(PEERS["ort int8"], inputs.layer, (inputs.x,))


def _quantize_dynamic(inputs: Inputs) -> Callable:
    return caller(quantize_dynamic(inputs.layer), (inputs.x, inputs.state))


def _check_int8(inputs: Inputs, output) -> Gate:
    return Gate.judge(relative_error(output[0], _eager(inputs)()[0]), _INT8_ERROR, "relative error against float32")
