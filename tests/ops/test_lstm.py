"""lstm: the gates' stated error, values that are not finite, packed weights that follow the weights, gradients, bad
input; gru has its own."""

import math
import re

import pytest
import recurrent
import torch
from tolerances import GATE_ERROR, assert_composite, assert_exact

from lamina import _C
from lamina.ops import lstm
from lamina.ops import rnn as packing
from lamina.reference.lstm import lstm as reference


@pytest.fixture(autouse=True)
def on_its_isa(request, as_found):
    if "isa" in request.fixturenames:
        _C.force_isa(request.getfixturevalue("isa"))


def weights_of(features: int, units: int, layers: int = 1, **options) -> list[torch.Tensor]:
    return [w.detach() for w in torch.nn.LSTM(features, units, layers, **options)._flat_weights]


def test_lstm_gates_are_within_their_bound(isa):
    """One unit whose four gates are read one at a time: the others are held at exactly 0 or 1 by large sums."""
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.linspace(-0.01, 0.01, 501)])[None, :, None]  # [1, B, 1]
    large = 100.0
    for gate, (i, f, g, o) in {
        "input": ((1, 0), (0, -large), (0, large), (0, large)),
        "forget": ((0, -large), (1, 0), (0, 0), (0, large)),
        "cell": ((0, large), (0, -large), (1, 0), (0, large)),
        "output": ((0, large), (0, -large), (0, large), (1, 0)),
    }.items():
        w_ih = torch.tensor([[float(a)] for a, _ in (i, f, g, o)])
        b_ih = torch.tensor([float(b) for _, b in (i, f, g, o)])
        weights = [w_ih, torch.zeros(4, 1), b_ih, torch.zeros(4)]
        start = (torch.zeros(1, x.shape[1], 1), torch.ones(1, x.shape[1], 1))
        output, _, c_n = lstm(x, start, weights)
        truth, _, c_truth = reference(x.double(), None, *(s.double() for s in start), [w.double() for w in weights])
        assert (c_n - c_truth).abs().max() <= GATE_ERROR, gate
        assert (output - truth).abs().max() <= 2 * GATE_ERROR, gate


@pytest.mark.parametrize("batch", [1, 5])
def test_lstm_keeps_nan_in_its_sequence(isa, batch):
    recurrent.check_keeps_nan_in_its_sequence("lstm", batch)


@pytest.mark.parametrize("size", [1.0, 1e30, math.inf])
def test_lstm_of_huge_values_is_torchs(isa, size):
    """Saturated gates are 0 and 1, infinite states stay, and inf - inf is NaN where torch has one."""
    weights = weights_of(2, 5)
    x = size * torch.tensor([[[1.0, 0.5]], [[-1.0, 0.0]], [[0.5, -1.0]]])
    cell = [math.inf, -math.inf, 1e15, -1e15, 0.0] if size == 1.0 else [3.0, -3.0, 1e15, -1e15, 0.0]
    start = (torch.randn(1, 1, 5), torch.tensor([[cell]]))
    theirs = torch.lstm(x, start, weights, True, 1, 0.0, False, False, False)
    # The clamped tail of a sigmoid is 1e-9 where torch has 0: of a state of 1e15 that is still something.
    absolute = 1e-5 if size == 1.0 else 1e15 * 1e-8
    for ours, expected in zip(lstm(x, start, weights), theirs, strict=True):
        assert_exact(ours.isfinite(), expected.isfinite())
        error = (ours - expected)[expected.isfinite()].abs()
        assert (error <= absolute + 1e-6 * expected[expected.isfinite()].abs()).all()


def test_lstm_takes_its_own_states_again():
    recurrent.check_takes_its_own_state_again("lstm")


def test_lstm_rows_do_not_see_each_other():
    """A sequence gives the same bits alone and in any batch, and packed as well as padded."""
    weights = weights_of(6, 21, bidirectional=True)
    x = torch.randn(5, 9, 6)
    output, _, _ = lstm(x, None, weights, bidirectional=True)
    for b in (0, 8):
        assert_exact(lstm(x[:, b : b + 1], None, weights, bidirectional=True)[0], output[:, b : b + 1])
    start = (torch.zeros(2, 9, 21), torch.zeros(2, 9, 21))
    sizes = torch.full((5,), 9)
    packed = lstm(x.flatten(0, 1), start, weights, bidirectional=True, batch_sizes=sizes)[0]
    assert_exact(packed, output.flatten(0, 1))


# -- packed weights


@pytest.mark.parametrize("change", ["in place", "past the version counter", "another tensor"])
def test_lstm_sees_new_weights(change):
    weights = weights_of(4, 40)
    x = torch.randn(3, 2, 4)
    before = lstm(x, None, weights)[0]
    assert_exact(lstm(x, None, weights)[0], before)
    for i in range(4):
        if change == "in place":
            weights[i].mul_(0.5)
        elif change == "past the version counter":
            weights[i].data.mul_(0.5)
        else:
            weights[i] = weights[i] * 0.5
        now = lstm(x, None, weights)[0]
        assert not torch.equal(now, before)
        assert_exact(now, lstm(x, None, [w.clone() for w in weights])[0])
        before = now


def test_lstm_forgets_weights_that_are_gone():
    weights = weights_of(4, 8)
    lstm(torch.randn(2, 1, 4), None, weights)
    known = len(packing._packed)
    del weights
    other = weights_of(4, 8)
    lstm(torch.randn(2, 1, 4), None, other)
    assert len(packing._packed) <= known


def test_lstm_takes_weights_made_in_inference_mode():
    """They have no version counter, so they are packed anew at every call."""
    x = torch.randn(2, 1, 4)
    with torch.inference_mode():
        weights = [w.clone() for w in weights_of(4, 8)]
        first = lstm(x, None, weights)[0]
        weights[0].zero_()
        assert not torch.equal(lstm(x, None, weights)[0], first)


# -- gradients


@pytest.mark.parametrize("batch_first", [False, True])
def test_lstm_gradients_are_torchs(isa, batch_first):
    recurrent.check_gradients_are_torchs("lstm", batch_first)


def test_lstm_gradients_of_packed_input_are_torchs(isa):
    recurrent.check_gradients_are_torchs("lstm", batch_first=False, packed=True)


def test_lstm_gradient_is_the_slope():
    recurrent.check_gradient_is_the_slope("lstm")


def test_lstm_gradients_are_the_same_for_every_thread_count(as_found):
    """A layer that is shared out."""
    weights = [w.requires_grad_() for w in weights_of(40, 160)]
    x = torch.randn(20, 9, 40)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output, h_n, _ = lstm(x, None, weights)
        found.append(torch.autograd.grad(output.square().sum() + h_n.sum(), weights[1:2]))
    # The last product is torch's, which promises less.
    torch.testing.assert_close(found[1:], [found[0]] * 2)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_lstm_gradients_with_a_projection_are_torchs():
    weights = [w.requires_grad_() for w in weights_of(4, 7, proj_size=3)]
    x, start = torch.randn(5, 3, 4), (torch.randn(1, 3, 3), torch.randn(1, 3, 7))
    ours = torch.autograd.grad(lstm(x, start, weights)[0].square().sum(), weights)
    theirs = torch.autograd.grad(
        torch.lstm(x, start, weights, True, 1, 0.0, False, False, False)[0].square().sum(), weights
    )
    torch.testing.assert_close(ours, theirs)


def test_lstm_drops_between_layers_only():
    weights = weights_of(4, 9, 2)
    x = torch.randn(3, 2, 4)
    assert_exact(lstm(x, None, weights[:4], dropout=0.5), lstm(x, None, weights[:4]))
    outputs = torch.stack([lstm(x, None, weights, num_layers=2, dropout=0.5)[0] for _ in range(3)])
    assert len({o.sum().item() for o in outputs}) == 3
    assert (outputs != 0).all()


def test_lstm_gradient_of_one_output_only():
    weights = [w.requires_grad_() for w in weights_of(4, 7)]
    output, _, _ = lstm(torch.randn(3, 2, 4), None, weights)
    assert output.requires_grad
    output[-1].sum().backward()
    assert all(w.grad.abs().sum() > 0 for w in weights)


def test_lstm_elsewhere_is_torchs():
    """Other dtypes and autocast."""
    weights = weights_of(4, 7)
    x = torch.randn(3, 2, 4)
    doubles = [w.double() for w in weights]
    start = (torch.zeros(1, 2, 7).double(), torch.zeros(1, 2, 7).double())
    assert_exact(
        lstm(x.double(), None, doubles), torch.lstm(x.double(), start, doubles, True, 1, 0.0, False, False, False)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert_composite(
            lstm(x, None, weights)[0].float(),
            lstm(x, None, weights)[0].float(),
            reference(x.double(), None, *start, doubles)[0],
        )


# -- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(0, 2, 4)}, "lstm: input is float32[0, 2, 4], but a sequence must have at least one step"),
        ({"x": torch.zeros(2, 4)}, "lstm: input has shape [2, 4], but must be [T, B, I]"),
        ({"x": torch.zeros(3, 2, 5)}, "lstm: weights[0] has shape [28, 4], but must be [28, 5]"),
        ({"num_layers": 2}, "lstm: there are 4 weights, but 2 layers in 1 directions with biases have 8, or 10 with "),
        ({"hx": (torch.zeros(1, 3, 7), torch.zeros(1, 3, 7))}, "lstm: h_0 has shape [1, 3, 7], but must be [1, 2, 7]"),
        ({"hx": (torch.zeros(1, 2, 7), torch.zeros(1, 2, 6))}, "lstm: c_0 has shape [1, 2, 6], but must be [1, 2, 7]"),
        (
            {"x": torch.zeros(5, 4), "batch_sizes": torch.tensor([2, 3])},
            "lstm: packed input needs its initial states, from which the batch is read",
        ),
        (
            {"x": torch.zeros(5, 4), "batch_sizes": torch.tensor([2, 3]), "hx": (torch.zeros(1, 2, 7),) * 2},
            "lstm: batch_sizes[1] is 3, but they must be at least 1 and never rise",
        ),
        (
            {"x": torch.zeros(5, 4), "batch_sizes": torch.tensor([2, 2]), "hx": (torch.zeros(1, 2, 7),) * 2},
            "lstm: batch_sizes come to 4 rows, but input has 5",
        ),
    ],
    ids=lambda value: value.split(",")[0][:40] if isinstance(value, str) else "",
)
def test_lstm_refuses(change, message):
    arguments = {"x": torch.zeros(3, 2, 4), "hx": None, "weights": weights_of(4, 7)} | change
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        lstm(arguments.pop("x"), arguments.pop("hx"), arguments.pop("weights"), **arguments)
