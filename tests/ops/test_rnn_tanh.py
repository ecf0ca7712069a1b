"""rnn_tanh: streams, values that are not finite, gradients, bad input; lstm tests what the recurrent ops share."""

import re

import pytest
import recurrent
import torch

from lamina import _C
from lamina.ops import rnn_tanh


@pytest.fixture(autouse=True)
def on_its_isa(request, as_found):
    if "isa" in request.fixturenames:
        _C.force_isa(request.getfixturevalue("isa"))


def test_rnn_tanh_takes_its_own_state_again():
    recurrent.check_takes_its_own_state_again("rnn_tanh")


@pytest.mark.parametrize("batch", [1, 5])
def test_rnn_tanh_keeps_nan_in_its_sequence(isa, batch):
    recurrent.check_keeps_nan_in_its_sequence("rnn_tanh", batch)


@pytest.mark.parametrize("batch_first", [False, True])
def test_rnn_tanh_gradients_are_torchs(isa, batch_first):
    recurrent.check_gradients_are_torchs("rnn_tanh", batch_first)


def test_rnn_tanh_gradient_is_the_slope():
    recurrent.check_gradient_is_the_slope("rnn_tanh")


def test_rnn_tanh_refuses():
    (weights,) = recurrent.weights_of("rnn_tanh", recurrent.layer_of("rnn_tanh", 4, 7))
    x = torch.zeros(3, 2, 4)
    for arguments, message in (
        ((x[:0], None, weights), "input is float32[0, 2, 4], but a sequence must have at least one"),
        ((x[..., :3], None, weights), "weights[0] has shape [7, 4], but must be [7, 3]"),
        ((x, torch.zeros(1, 3, 7), weights), "h_0 has shape [1, 3, 7], but must be [1, 2, 7]"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(f"rnn_tanh: {message}")):
            rnn_tanh(*arguments)
