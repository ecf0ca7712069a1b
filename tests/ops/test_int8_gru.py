"""int8_gru: its distance from float, streams, values that are not finite, bad input; gru tests the rest."""

import math
import re

import pytest
import torch
from tolerances import INT8_LAYER_SQNR_DB, assert_exact, assert_lossy

from lamina import _C
from lamina.ops import int8_gru
from lamina.quant import quantize_weight


@pytest.fixture(autouse=True)
def on_its_isa(request, as_found):
    if "isa" in request.fixturenames:
        _C.force_isa(request.getfixturevalue("isa"))


def layer_of(features: int, units: int, layers: int = 1, **options) -> tuple[torch.nn.GRU, list, list]:
    """A torch layer, its weights with int8 matrices, and their scales."""
    layer = torch.nn.GRU(features, units, layers, **options).requires_grad_(False)
    weights, scales = [], []
    for weight in layer._flat_weights:
        codes, scale = quantize_weight(weight) if weight.ndim == 2 else (weight, None)
        weights.append(codes)
        scales += [scale] if scale is not None else []
    return layer, weights, scales


@pytest.mark.parametrize("batch", [1, 9])
def test_int8_gru_is_near_the_float_layer(isa, batch):
    layer, weights, scales = layer_of(24, 70, 2, bidirectional=True)
    x = torch.randn(12, batch, 24)
    for ours, theirs in zip(int8_gru(x, None, weights, scales, True, 2, True)[:1], layer(x)[:1], strict=True):
        assert_lossy(ours, theirs, min_sqnr_db=INT8_LAYER_SQNR_DB)


def test_int8_gru_takes_its_own_state_again():
    """Streaming: one step a call gives the bits of one call, since every row has a scale of its own."""
    _, weights, scales = layer_of(6, 21, 2)
    x = torch.randn(9, 3, 6)
    whole = int8_gru(x, None, weights, scales, num_layers=2)
    states, pieces = None, []
    for piece in x.split(1):
        out, *last = int8_gru(piece, states, weights, scales, num_layers=2)
        states = last[0]
        pieces.append(out)
    assert_exact((torch.cat(pieces), *last), whole)


def test_int8_gru_keeps_nan_in_its_sequence(isa):
    _, weights, scales = layer_of(3, 20, 2, bidirectional=True)
    x = torch.randn(6, 3, 3)
    clean = int8_gru(x, None, weights, scales, True, 2, True)
    x[2, 0, 1] = math.nan
    for ours, before in zip(int8_gru(x, None, weights, scales, True, 2, True), clean, strict=True):
        assert ours[:, 0].isnan().all()
        assert_exact(ours[:, 1:], before[:, 1:])


def test_int8_gru_sees_new_weights():
    _, weights, scales = layer_of(4, 40)
    x = torch.randn(3, 2, 4)
    before = int8_gru(x, None, weights, scales)[0]
    scales[1].mul_(2)
    after = int8_gru(x, None, weights, scales)[0]
    assert not torch.equal(after, before)
    weights[0].neg_()
    assert not torch.equal(int8_gru(x, None, weights, scales)[0], after)


def test_int8_gru_refuses():
    _, weights, scales = layer_of(4, 7)
    x = torch.zeros(3, 2, 4)
    for arguments, message in (
        ((x[:0], None, weights, scales), "int8_gru: input is float32[0, 2, 4], but a sequence must have at least one"),
        (
            (x, None, [w.float() for w in weights], scales),
            "int8_gru: weights[0] is torch.float32, but must be torch.int8",
        ),
        ((x, None, weights, scales[:1]), "int8_gru: scales must be float32, one per row of each matrix: "),
        ((x[..., :3], None, weights, scales), "int8_gru: weights[0] has shape [21, 4], but must be [21, 3]"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            int8_gru(*arguments)
