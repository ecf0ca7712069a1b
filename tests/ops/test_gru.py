"""gru: what differs from lstm, which tests what they share: its gates, its state in the update, gradients."""

import re

import pytest
import recurrent
import torch
from tolerances import GATE_ERROR

from lamina import _C
from lamina.ops import gru
from lamina.reference.gru import gru as reference


@pytest.fixture(autouse=True)
def on_its_isa(request, as_found):
    if "isa" in request.fixturenames:
        _C.force_isa(request.getfixturevalue("isa"))


def weights_of(features: int, units: int, layers: int = 1, **options) -> list[torch.Tensor]:
    return [w.detach() for w in torch.nn.GRU(features, units, layers, **options)._flat_weights]


def test_gru_gates_are_within_their_bound(isa):
    """One unit whose three gates are read one at a time."""
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.linspace(-0.01, 0.01, 501)])[None, :, None]  # [1, B, 1]
    large = 100.0
    # (r, z, n) of the input as (factor, offset), and the bias of the state's part of n.
    for gate, (r, z, n), state in (
        ("reset", ((1, 0), (0, -large), (0, 0)), 1.0),
        ("update", ((0, -large), (1, 0), (0, large)), 0.0),
        ("new", ((0, -large), (0, -large), (1, 0)), 0.0),
    ):
        w_ih = torch.tensor([[float(a)] for a, _ in (r, z, n)])
        b_ih = torch.tensor([float(b) for _, b in (r, z, n)])
        weights = [w_ih, torch.zeros(3, 1), b_ih, torch.tensor([0.0, 0.0, state])]
        start = -torch.ones(1, x.shape[1], 1)
        output, _ = gru(x, start, weights)
        truth, _ = reference(x.double(), None, start.double(), [w.double() for w in weights])
        assert (output - truth).abs().max() <= 2 * GATE_ERROR, gate


def test_gru_keeps_nan_in_its_sequence(isa):
    recurrent.check_keeps_nan_in_its_sequence("gru")


def test_gru_takes_its_own_state_again():
    recurrent.check_takes_its_own_state_again("gru")


@pytest.mark.parametrize("biases", [False, True])
def test_gru_gradients_are_torchs(isa, biases):
    recurrent.check_gradients_are_torchs("gru", batch_first=False, biases=biases)


def test_gru_gradients_of_packed_input_are_torchs(isa):
    recurrent.check_gradients_are_torchs("gru", batch_first=False, packed=True)


def test_gru_gradient_is_the_slope():
    recurrent.check_gradient_is_the_slope("gru")


@pytest.mark.parametrize(
    ("x", "hx", "message"),
    [
        (torch.zeros(0, 2, 4), None, "gru: input is float32[0, 2, 4], but a sequence must have at least one step"),
        (torch.zeros(3, 2, 4), torch.zeros(1, 2, 6), "gru: h_0 has shape [1, 2, 6], but must be [1, 2, 7]"),
        (torch.zeros(3, 2, 4), torch.zeros(2, 7), "gru: an initial state has shape [2, 7], but must be [layers, B, "),
        (torch.zeros(3, 2, 5), None, "gru: weights[0] has shape [21, 4], but must be [21, 5]"),
    ],
)
def test_gru_refuses(x, hx, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        gru(x, hx, weights_of(4, 7))


def test_gru_refuses_a_projection():
    with pytest.raises(
        ValueError, match=r"^gru: there are 5 weights, but 1 layers in 1 directions with biases have 4$"
    ):
        gru(torch.zeros(3, 2, 4), None, [*weights_of(4, 7), torch.zeros(3, 7)])
