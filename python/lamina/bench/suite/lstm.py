"""lstm over whole sequences against eager nn.LSTM; gru is measured the same way, on its own shapes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import lamina
from lamina.bench.workloads import Gate, Workload, read_shapes, relative_error
from lamina.reference.gru import gru as gru_reference
from lamina.reference.lstm import lstm as lstm_reference

_GATES = {"lstm": 4, "gru": 3}


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
    shape = f"{t}x{b}x{i}x{h}" + (f"x{layers}layers" if layers > 1 else "")
    weights = _GATES[op] * h * (i + h + (layers - 1) * 2 * h)

    def make_inputs() -> Inputs:
        generator = torch.Generator().manual_seed(t + b * 3 + i + h * 7)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = getattr(torch.nn, op.upper())(i, h, layers).eval()
        state = torch.randn(layers, b, h, generator=generator)
        return Inputs(
            x=torch.randn(t, b, i, generator=generator),
            state=(state, torch.randn(layers, b, h, generator=generator)) if op == "lstm" else state,
            layer=layer,
            fused=getattr(lamina.nn, op.upper()).from_float(layer),
        )

    return Workload(
        id=f"{op}/{model}/{shape}",
        op=op,
        shape=shape,
        dims={"T": t, "B": b, "I": i, "H": h, "L": layers},
        make_inputs=make_inputs,
        run=lambda inputs: lambda: inputs.fused(inputs.x, inputs.state),
        baselines={"eager": _eager},
        check=_check,
        flops=lambda inputs: 2 * t * b * weights,
        # The weights of the state are read at every step, if they do not fit a cache; once at least.
        bytes=lambda inputs: 4 * (weights + t * b * (i + h)),
        precision=lambda inputs: "float32",
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
