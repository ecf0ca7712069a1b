"""What the tests of the recurrent ops share: layers of torch as flat lists of weights, and what holds for all ops."""

import math
import re
from collections.abc import Callable

import pytest
import torch
from cases import rnn_module
from tolerances import INT8_LAYER_SQNR_DB, assert_exact, assert_lossy
from torch import Tensor

import lamina
from lamina.quant import quantize_weight


def layer_of(op: str, features: int, units: int, layers: int = 1, **options) -> torch.nn.RNNBase:
    """torch's layer that the op computes; its parameters need no gradient."""
    if op.startswith("rnn_"):
        options["nonlinearity"] = op.removeprefix("rnn_")
    return rnn_module(op)(features, units, layers, **options).requires_grad_(False)


def weights_of(op: str, layer: torch.nn.RNNBase) -> list[list[Tensor]]:
    """The weights as the op takes them: a flat list, and for int8 a second one of scales."""
    if not op.startswith("int8_"):
        return [list(layer._flat_weights)]
    quantized = [quantize_weight(w) if w.ndim == 2 else (w, None) for w in layer._flat_weights]
    return [[w for w, _ in quantized], [scale for _, scale in quantized if scale is not None]]


def run(op: str, x: Tensor, states, weights: list[list[Tensor]], layers: int = 1, bidirectional: bool = False):
    """-> output, last states as the op takes them again."""
    output, *last = getattr(lamina.ops, op)(x, states, *weights, True, layers, bidirectional)
    return output, last[0] if len(last) == 1 else tuple(last)


def tensors(result) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(result)


def check_takes_its_own_state_again(op: str) -> None:
    """Streaming: one step a call gives the bits of one call, as does any other cut."""
    weights = weights_of(op, layer_of(op, 6, 21, 2))
    x = torch.randn(9, 3, 6)
    output, last = run(op, x, None, weights, 2)
    for cut in (1, 4):
        states, pieces = None, []
        for piece in x.split(cut):
            out, states = run(op, piece, states, weights, 2)
            pieces.append(out)
        assert_exact((torch.cat(pieces), *tensors(states)), (output, *tensors(last)))


def check_keeps_nan_in_its_sequence(op: str, batch: int = 2) -> None:
    weights = weights_of(op, layer_of(op, 3, 20, 2, bidirectional=True))
    x = torch.randn(6, batch + 1, 3)
    clean = tensors(run(op, x, None, weights, 2, True))
    x[2, 0, 1] = math.nan
    for ours, before in zip(tensors(run(op, x, None, weights, 2, True)), clean, strict=True):
        assert ours[:, 0].isnan().all()
        assert_exact(ours[:, 1:], before[:, 1:])


def check_gradients_are_torchs(op: str, batch_first: bool, biases: bool = True, packed: bool = False) -> None:
    """Of the input, the states and the weights, two layers in two directions."""
    layer = layer_of(op, 4, 19, 2, bidirectional=True, batch_first=batch_first, bias=biases)
    (weights,) = weights_of(op, layer)
    sizes = torch.tensor([3, 2, 2, 1]) if packed else None
    x = torch.randn(8, 4) if packed else torch.randn(5, 3, 4)
    batch = 5 if batch_first and not packed else 3
    states = [torch.randn(4, batch, 19) for _ in range(2 if op == "lstm" else 1)]

    def gradients(function: Callable) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, *states, *weights)]
        start = leaves[1 : 1 + len(states)]
        outputs = function(leaves[0], start[0] if len(start) == 1 else tuple(start), leaves[1 + len(states) :])
        total = sum((k + 1) * (o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for k, o in enumerate(outputs))
        return torch.autograd.grad(total, leaves)

    options = (biases, 2)
    ours = gradients(lambda x, hx, w: getattr(lamina.ops, op)(x, hx, w, *options, True, batch_first, batch_sizes=sizes))
    if packed:
        theirs = gradients(lambda x, hx, w: getattr(torch, op)(x, sizes, hx, w, *options, 0.0, False, True))
    else:
        theirs = gradients(lambda x, hx, w: getattr(torch, op)(x, hx, w, *options, 0.0, False, True, batch_first))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def check_gradient_is_the_slope(op: str) -> None:
    """Against differences of the float64 reference, which owes nothing to torch's gradients; one way at random."""
    layer = layer_of(op, 3, 5)
    (weights,) = weights_of(op, layer)
    states = [torch.randn(1, 2, 5) for _ in range(2 if op == "lstm" else 1)]
    leaves = [t.requires_grad_() for t in (torch.randn(4, 2, 3), *states, *(w.clone() for w in weights))]
    reference = getattr(__import__(f"lamina.reference.{op}", fromlist=[op]), op)

    def total(values: list[Tensor], function: Callable) -> Tensor:
        start = values[1 : 1 + len(states)]
        return sum((o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for o in function(values[0], start, values))

    def ours(x, start, values):
        hx = tuple(start) if len(start) == 2 else start[0]
        return getattr(lamina.ops, op)(x, hx, values[1 + len(states) :])

    gradients = torch.autograd.grad(total(leaves, ours), leaves)
    way = [torch.randn_like(t).double() for t in leaves]
    slope = sum((g.double() * w).sum() for g, w in zip(gradients, way, strict=True))

    def moved(by: float) -> Tensor:
        values = [t.detach().double() + by * w for t, w in zip(leaves, way, strict=True)]
        return total(values, lambda x, start, v: reference(x, None, *start, v[1 + len(states) :]))

    step = 1e-5
    torch.testing.assert_close(slope, (moved(step) - moved(-step)) / (2 * step), rtol=1e-4, atol=1e-4)


def check_int8_is_near_the_float_layer(op: str, batch: int) -> None:
    layer = layer_of(op, 24, 70, 2, bidirectional=True)
    x = torch.randn(12, batch, 24)
    output, _ = run(op, x, None, weights_of(op, layer), 2, True)
    assert_lossy(output, layer(x)[0], min_sqnr_db=INT8_LAYER_SQNR_DB)


def check_int8_sees_new_weights(op: str) -> None:
    weights, scales = weights_of(op, layer_of(op, 4, 40))
    x = torch.randn(3, 2, 4)
    before = run(op, x, None, [weights, scales])[0]
    scales[1].mul_(2)
    after = run(op, x, None, [weights, scales])[0]
    assert not torch.equal(after, before)
    weights[0].neg_()
    assert not torch.equal(run(op, x, None, [weights, scales])[0], after)


def check_int8_refuses(op: str) -> None:
    weights, scales = weights_of(op, layer_of(op, 4, 7))
    x = torch.zeros(3, 2, 4)
    rows = weights[0].shape[0]
    for arguments, message in (
        ((x[:0], None, weights, scales), "input is float32[0, 2, 4], but a sequence must have at least one"),
        ((x, None, [w.float() for w in weights], scales), "weights[0] is torch.float32, but must be torch.int8"),
        ((x, None, weights, scales[:1]), "scales must be float32, one per row of each matrix: "),
        ((x[..., :3], None, weights, scales), f"weights[0] has shape [{rows}, 4], but must be [{rows}, 3]"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(f"{op}: {message}")):
            getattr(lamina.ops, op)(*arguments)
