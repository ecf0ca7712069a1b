"""lstm over whole sequences against eager nn.LSTM; gru and the int8 ops are measured the same way, on shapes of their
own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import lamina
from lamina.bench.modules import caller
from lamina.bench.peers import quantize_dynamic
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.reference.gru import gru as gru_reference
from lamina.reference.lstm import lstm as lstm_reference

_GATES = {"lstm": 4, "gru": 3}

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

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(t + b * 3 + i + h * 7)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = getattr(torch.nn, cell.upper())(i, h, layers).eval()
        state = torch.randn(layers, b, h, generator=generator)
        return Inputs(
            x=torch.randn(t, b, i, generator=generator),
            state=(state, torch.randn(layers, b, h, generator=generator)) if cell == "lstm" else state,
            layer=layer,
            fused=getattr(lamina.nn, f"Int8{cell.upper()}" if is_int8 else cell.upper()).from_float(layer),
        )

    return Workload(
        id=f"{op}/{model}/{shape}",
        op=op,
        shape=shape,
        dims={"T": t, "B": b, "I": i, "H": h, "L": layers},
        make_inputs=make_inputs,
        run=lambda inputs: lambda: inputs.fused(inputs.x, inputs.state),
        baselines={"eager": _eager} | ({"quantize_dynamic": _quantize_dynamic} if is_int8 else {}),
        check=_check_int8 if is_int8 else _check,
        flops=lambda inputs: 2 * t * b * weights,
        # The weights of the state are read at every step, if they do not fit a cache; once at least.
        bytes=lambda inputs: (1 if is_int8 else 4) * weights + 4 * t * b * (i + h),
        precision=lambda inputs: "int8" if is_int8 else "float32",
        tags=frozenset({"op", model} | ({"quick"} if t * b * weights < 1 << 28 else set())),
        module=lambda inputs: (inputs.layer, (inputs.x, inputs.state)),
    )


def _eager(inputs: Inputs) -> Callable:
    return lambda: inputs.layer(inputs.x, inputs.state)


def _check(inputs: Inputs, output) -> Gate:
    layer = inputs.layer
    reference = lstm_reference if isinstance(layer, torch.nn.LSTM) else gru_reference
    states = inputs.state if isinstance(inputs.state, tuple) else (inputs.state,)
    weights = [w.detach().double() for w in layer.parameters()]
    truth, *_ = reference(inputs.x.double(), None, *(s.double() for s in states), weights, layer.num_layers)
    yardstick = relative_error(_eager(inputs)()[0], truth)
    limit = 2 * yardstick + 4 * torch.finfo(torch.float32).eps
    return Gate.judge(relative_error(output[0], truth), limit, "relative error against the reference")


def _quantize_dynamic(inputs: Inputs) -> Callable:
    return caller(quantize_dynamic(inputs.layer), (inputs.x, inputs.state))


def _check_int8(inputs: Inputs, output) -> Gate:
    return Gate.judge(relative_error(output[0], _eager(inputs)()[0]), _INT8_ERROR, "relative error against float32")
