"""Pruning: the right blocks go, in every layout; masks hold through any optimizer; what training broke is found."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_exact
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lamina import models, prune
from lamina.prune.patterns import Pattern, energies, expand, lowest, parse

BLOCKS = [name for name in prune.PATTERNS if "x" in name]


class Small(nn.Module):
    """A layer of each kind, with sizes that no block divides."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3)
        self.grouped = nn.Conv2d(10, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(6, 5, 2)
        self.rnn = nn.LSTM(5, 7, batch_first=True)
        self.attention = nn.MultiheadAttention(7, 1, batch_first=True)
        self.head = nn.Linear(7, 9)

    def forward(self, x):
        rows = self.up(self.grouped(self.conv(x))).flatten(2).transpose(1, 2)
        states, _ = self.rnn(rows)
        return self.head(self.attention(states, states, states)[0].mean(1))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small()


X = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(1))


def blocks_of(weight: torch.Tensor, pattern: str, *, groups: int = 1, transposed: bool = False):
    """The blocks of a weight as lists of indices, spelled out: outputs x inputs of one tap, inside a group."""
    rows, cols = map(int, pattern.split("x"))
    if transposed:
        inputs, outputs = weight.shape[0] // groups, weight.shape[1]
    else:
        outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    taps = list(itertools.product(*map(range, weight.shape[2:])))
    found = []
    for group in range(groups):
        for top in range(0, outputs, rows):
            for left in range(0, inputs, cols):
                for tap in taps:
                    block = []
                    for o in range(top, min(top + rows, outputs)):
                        for i in range(left, min(left + cols, inputs)):
                            first = (group * inputs + i, o) if transposed else (group * outputs + o, i)
                            block.append((*first, *tap))
                    found.append(block)
    return found


@pytest.mark.parametrize("pattern", BLOCKS)
@pytest.mark.parametrize(
    ("module", "groups", "transposed"),
    [
        (nn.Linear(9, 11), 1, False),
        (nn.Conv2d(5, 6, (3, 2)), 1, False),
        (nn.Conv1d(10, 6, 3, groups=2), 2, False),
        (nn.ConvTranspose2d(6, 10, 2, groups=2, bias=False), 2, True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_smallest_blocks_go_whole(module, groups, transposed, pattern):
    weight = module.weight.detach().clone()
    blocks = blocks_of(weight, pattern, groups=groups, transposed=transposed)
    assert sorted(index for block in blocks for index in block) == sorted(
        tuple(index.tolist()) for index in torch.ones_like(weight).nonzero()
    )
    energy = [sum(weight[index].item() ** 2 for index in block) for block in blocks]
    # Blocks go while at least half of the next is within the share.
    gone, room = [], 0.61 * weight.numel()
    for index in sorted(range(len(blocks)), key=lambda index: energy[index]):
        if room < len(blocks[index]) / 2:
            break
        gone.append(index)
        room -= len(blocks[index])
    expected = weight.clone()
    for index in gone:
        for position in blocks[index]:
            expected[position] = 0
    pruned = copy.deepcopy(module)
    (entry,) = prune.magnitude_(pruned, 0.61, pattern).weights
    assert_exact(pruned.weight.detach(), expected)
    assert (entry.blocks, entry.zero_blocks) == (len(blocks), len(gone))
    assert entry.sparsity == int((expected == 0).sum()) / expected.numel()
    assert abs(entry.sparsity - 0.61) <= max(map(len, blocks)) / 2 / weight.numel()
    if module.bias is not None:
        assert_exact(pruned.bias, module.bias)


def test_layers_that_store_inputs_first_are_pruned_like_the_others():
    from transformers.pytorch_utils import Conv1D

    linear, conv1d = nn.Linear(9, 11), Conv1D(11, 9)
    with torch.no_grad():
        conv1d.weight.copy_(linear.weight.t())
    prune.magnitude_(linear, 0.7, "4x1")
    prune.magnitude_(conv1d, 0.7, "4x1")
    assert_exact(conv1d.weight.t(), linear.weight)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(2, 30), st.integers(0, 30), st.integers(1, 4))
def test_lowest_takes_exactly_so_many_and_the_first_of_equals(size, count, levels):
    scores = torch.randint(levels, (3, size), generator=torch.Generator().manual_seed(size * 31 + count)).float()
    count = min(count, size)
    chosen = lowest(scores, count / size, torch.ones(3, size))
    for row, taken in zip(scores.tolist(), chosen.tolist(), strict=True):
        order = sorted(range(size), key=lambda index: (row[index], index))
        assert sorted(order[:count]) == [index for index, yes in enumerate(taken) if yes]
    weights = torch.randint(1, 5, (3, size), generator=torch.Generator().manual_seed(size)).float()
    weights[:, 0] = 7  # not all the same
    for row, weight, taken in zip(
        scores.tolist(), weights.tolist(), lowest(scores, 0.5, weights).tolist(), strict=True
    ):
        order = sorted(range(size), key=lambda index: (row[index], index))
        so_far = list(itertools.accumulate(weight[index] for index in order))
        fits = [index for index, end in zip(order, so_far, strict=True) if end - weight[index] / 2 <= sum(weight) / 2]
        assert sorted(fits) == [index for index, yes in enumerate(taken) if yes]


def test_blocks_that_an_edge_cuts_off_are_blocks():
    squares = torch.ones(1, 5, 2, 6)
    for name in BLOCKS:
        pattern = parse(name, "test")
        blocks = energies(squares, pattern)
        assert blocks.shape == (1, math.ceil(5 / pattern.rows), 2, math.ceil(6 / pattern.cols))
        assert blocks.sum() == squares.sum()
        assert expand(blocks, pattern, squares.shape).shape == squares.shape


def test_two_of_four_neighbours_stay_and_a_short_rest_keeps_two():
    linear = nn.Linear(11, 6)
    before = linear.weight.detach().clone()
    prune.magnitude_(linear, 0.5, "2:4")
    for row_before, row in zip(before, linear.weight.detach(), strict=True):
        for start in (0, 4, 8):
            old, new = row_before[start : start + 4], row[start : start + 4]
            assert (new != 0).sum() == 2
            assert set(old.abs().topk(2).values.tolist()) == set(new[new != 0].abs().tolist())
    narrow = nn.Linear(2, 3)
    prune.magnitude_(narrow, 0.5, "2:4")
    assert (narrow.weight != 0).all()
    convolution = nn.Conv2d(8, 4, 3)
    prune.magnitude_(convolution, 0.5, "2:4")
    assert ((convolution.weight != 0).reshape(4, 2, 4, 9).sum(2) == 2).all()


def test_every_layer_of_a_model_is_pruned(small):
    report = prune.magnitude_(small, 0.7, "4x4")
    assert [entry.fqn for entry in report.weights] == [
        *("conv.weight", "grouped.weight", "up.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0"),
        *("attention.in_proj_weight", "attention.out_proj.weight", "head.weight"),
    ]
    assert report.left == ()
    for entry in report.weights:
        assert abs(entry.sparsity - 0.7) <= 8 / entry.elements, entry
    assert report.sparsity == pytest.approx(
        sum(int((small.get_parameter(e.fqn) == 0).sum()) for e in report.weights)
        / sum(small.get_parameter(e.fqn).numel() for e in report.weights)
    )
    assert "attention.in_proj_weight" in str(report)
    assert prune.report(small, "4x4") == report
    assert small(X).isfinite().all()


def test_pruning_twice_is_pruning_once_to_the_higher_sparsity():
    once, twice, chance = (models.create("lenet") for _ in range(3))
    twice.load_state_dict(once.state_dict())
    chance.load_state_dict(once.state_dict())
    prune.magnitude_(once, 0.8, "2x4")
    prune.magnitude_(twice, 0.5, "2x4")
    prune.magnitude_(twice, 0.8, "2x4")
    assert_exact(list(twice.parameters()), list(once.parameters()))
    half = prune.random_(chance, 0.5, "2x4", seed=3)
    zeros = [parameter == 0 for parameter in chance.parameters()]
    more = prune.random_(chance, 0.8, "2x4", seed=4)
    assert half.sparsity == pytest.approx(0.5, abs=0.02)
    assert more.sparsity == pytest.approx(0.8, abs=0.02)
    assert all((parameter[zero] == 0).all() for parameter, zero in zip(chance.parameters(), zeros, strict=True))


def test_random_repeats_itself_for_a_seed():
    first, second, other = (nn.Linear(40, 40) for _ in range(3))
    second.load_state_dict(first.state_dict())
    other.load_state_dict(first.state_dict())
    for linear, seed in ((first, 0), (second, 0), (other, 1)):
        prune.random_(linear, 0.5, seed=seed)
    assert_exact(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)


def test_scopes_share_the_zeros_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 4))
    with torch.no_grad():
        model[1].weight.mul_(0.01)  # smaller than anything in the first: it would go whole
    everything, lamp = copy.deepcopy(model), copy.deepcopy(model)
    by_size = prune.magnitude_(everything, 0.5, scope="global")
    assert (everything[1].weight == 0).all()
    by_share = prune.magnitude_(lamp, 0.5, scope="lamp")
    assert 0 < (lamp[1].weight == 0).sum() < 60
    total = 50 * 40 + 40 * 4
    for report in (by_size, by_share):
        assert sum(entry.zero_blocks for entry in report.weights) == total / 2


def test_lamp_scores_are_those_of_the_paper():
    from lamina.prune.magnitude import _lamp

    energy = torch.tensor([4.0, 1.0, 9.0, 0.0])
    expected = torch.tensor([4 / 13, 1 / 14, 1.0, 0.0])
    torch.testing.assert_close(_lamp(energy), expected)
    assert not _lamp(torch.zeros(3)).any()


def test_wanda_weighs_weights_by_their_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    batches = [(torch.randn(9, 6) * torch.tensor([1.0, 9, 1, 0.1, 3, 1]),) for _ in range(3)]
    before = copy.deepcopy(model)
    prune.wanda_(model, iter(batches), 0.5)
    x = torch.cat([x for (x,) in batches])
    for index, inputs in ((0, x), (2, F.relu(before[0](x)))):
        score = before[index].weight.detach().abs() * inputs.norm(dim=0)
        for row_score, row in zip(score, model[index].weight, strict=True):
            kept = row_score.numel() - round(0.5 * row_score.numel())
            assert set(row_score.topk(kept).indices.tolist()) == set(row.nonzero().flatten().tolist())


def test_wanda_reads_convolutions_and_recurrent_layers(small):
    report = prune.wanda_(small, [{"x": X}], 0.5, "1x4")
    left = {entry.fqn: entry.reason for entry in report.left}
    assert set(left) == {"attention.in_proj_weight", "attention.out_proj.weight"}
    assert "not seen" in left["attention.in_proj_weight"]
    assert "not called" in left["attention.out_proj.weight"]
    assert report.sparsity > 0.3
    deep = nn.Sequential(nn.LSTM(4, 4, num_layers=2))
    (entry, *_) = prune.wanda_(deep, [(torch.randn(3, 2, 4),)], 0.5).left
    assert "one layer and direction" in entry.reason


def test_channels_that_are_never_used_go_first_with_wanda():
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    x = torch.randn(2, 4, 8, 8)
    x[:, 1] = 0
    prune.wanda_(model, [(x,)], 0.5)
    assert (model[0].weight[:3, 1] == 0).all()  # the second channel of the first group
    assert (model[0].weight[:3, 0] != 0).all()


def test_policies_by_name():
    model = models.create("lenet")
    sparsity = {"classifier.1": 0.9, "re:features.*": 0.2}
    report = prune.magnitude_(model, sparsity)
    found = {entry.fqn: (round(entry.sparsity, 2), entry.reason) for entry in report.weights}
    assert found["classifier.1.weight"] == (0.9, "")
    assert found["features.0.weight"] == (0.2, "")
    assert found["classifier.5.weight"] == (0.0, "the sparsities do not name its layer")


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("pattern", ["unstructured", "4x4"])
def test_nothing_and_everything(share, pattern):
    model = models.create("lenet")
    expected = copy.deepcopy(model)
    report = prune.magnitude_(model, share, pattern)
    assert report.sparsity == share
    if share:
        assert all((module.weight == 0).all() for module in model.modules() if hasattr(module, "weight"))
    else:
        assert_exact(list(model.parameters()), list(expected.parameters()))
    prune.magnitude_(model, share, pattern, scope="lamp")
    prune.hold_(model)
    assert model(torch.rand(1, 1, 28, 28)).isfinite().all()
    prune.bake_(model)


def test_what_cannot_be_pruned_is_left_with_the_reason():
    model = nn.ModuleDict(
        {
            "nan": nn.Linear(4, 4),
            "meta": nn.Linear(4, 4, device="meta"),
            "embedding": nn.Embedding(4, 4),
            "tied": nn.Linear(4, 4),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "kept": nn.Linear(4, 4),
            "taken": nn.Linear(4, 4, dtype=torch.bfloat16),
        }
    )
    with torch.no_grad():
        model["nan"].weight[0, 0] = math.nan
    model["tied"].weight = model["embedding"].weight
    before = copy.deepcopy(model.state_dict())
    report = prune.magnitude_(model, 0.5, filter_fn=lambda module, fqn: fqn != "kept")
    reasons = {entry.fqn.partition(".")[0]: entry.reason for entry in report.left}
    assert reasons == {
        "nan": "it has NaN or infinite values",
        "meta": "it is on meta and has no values",
        "tied": "it is also the weight of embedding, which would be pruned with it",
        "normed": "it has a parametrization that is not lamina's, and is computed anew at every call",
        "kept": "excluded by filter_fn",
    }
    assert [entry.fqn for entry in report.pruned] == ["taken.weight"]
    assert (model["taken"].weight == 0).sum() == 8
    for name, tensor in model.state_dict().items():
        if not name.startswith(("taken", "meta")):
            assert_exact(tensor, before[name], name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.9, "3x3"), r"pattern is '3x3', but must be one of unstructured, 2x1, 4x1, 1x4, 2x4, 4x4, 16x16, "),
        ((1.5,), r"sparsity is 1\.5, but must be between 0 and 1"),
        ((-0.1,), r"sparsity is -0\.1, but must be between 0 and 1"),
        ((math.nan,), r"sparsity is nan, but must be between 0 and 1"),
        ((0.9, "2:4"), r"pattern '2:4' leaves 2 of 4 neighbouring inputs, which is sparsity 0\.5, not 0\.9"),
        (({"fc": 2.0},), r"sparsity is 2, but must be between 0 and 1"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, message):
    model = nn.Linear(8, 8)
    before = model.weight.detach().clone()
    calls = [
        prune.magnitude_,
        prune.random_,
        lambda m, *a: prune.wanda_(m, [(torch.ones(1, 8),)], *a),
        lambda m, *a: prune.GradualPruner(m, *a, steps=1),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(model, *arguments)
    assert_exact(model.weight.detach(), before)
    assert not parametrize.is_parametrized(model)


def test_bad_scopes_schedules_and_models():
    model = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="scope is 'all', but must be 'layer', 'global' or 'lamp'"):
        prune.magnitude_(model, scope="all")
    with pytest.raises(ValueError, match="scope 'lamp' shares one sparsity out, but sparsity names several"):
        prune.magnitude_(model, {"_default": 0.5}, scope="lamp")
    with pytest.raises(ValueError, match="leaves every layer half of its weights"):
        prune.magnitude_(model, 0.5, "2:4", scope="global")
    with pytest.raises(ValueError, match="magnitude_: the model has no linear, convolutional or recurrent layer"):
        prune.magnitude_(nn.ReLU())
    with pytest.raises(ValueError, match="steps is -1, start 0 and every 1"):
        prune.GradualPruner(model, steps=-1)
    with pytest.raises(ValueError, match="initial is 2"):
        prune.GradualPruner(model, steps=1, initial=2)
    with pytest.raises(TypeError, match="wanda_: calibration is a Tensor"):
        prune.wanda_(model, torch.ones(1, 8))
    with pytest.raises(ValueError, match="calibration gave no inputs"):
        prune.wanda_(model, [])


# -- masks


def train_some(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    ],
    ids=["AdamW", "SGD"],
)
def test_masks_hold_through_the_optimizer(small, make):
    optimizer = make(small.parameters())  # made before the masks: parameters stay the same objects
    train_some(small, optimizer)  # and with momentum for everything
    report = prune.magnitude_(small, 0.8, "2x4")
    zeros = {entry.fqn: small.get_parameter(entry.fqn) == 0 for entry in report.weights}
    prune.hold_(small)
    train_some(small, optimizer)
    with torch.no_grad():
        held = small(X)
    baked = prune.bake_(small)
    assert not any(parametrize.is_parametrized(module) for module in small.modules())
    assert [entry.fqn for entry in baked.pruned] == list(zeros)
    for fqn, zero in zeros.items():
        assert_exact(small.get_parameter(fqn) == 0, zero, fqn)
    prune.verify(small, report)
    with torch.no_grad():
        assert_exact(small(X), held)
    assert_exact(copy.deepcopy(small)(X), small(X))
    train_some(small, optimizer, 1)  # the same parameters train on


def test_training_without_masks_is_detected(small):
    report = prune.magnitude_(small, 0.8, "2x4")
    prune.verify(small, report)
    train_some(small, torch.optim.AdamW(small.parameters(), lr=0.05))
    with pytest.raises(ValueError, match=r"training broke the masks of \d weights, most of all \S+, where \d+ of "):
        prune.verify(small, report)
    with pytest.raises(ValueError, match=r"the model has no weight conv\.weight any more"):
        prune.verify(nn.Linear(2, 2), report)


def test_masks_are_saved_with_the_model(small, tmp_path):
    from lamina import load_, save

    prune.magnitude_(small, 0.8, "2x4")
    prune.hold_(small)
    other = Small()
    prune.magnitude_(other, 0.5)
    prune.hold_(other)
    save(small, tmp_path / "held.safetensors")
    load_(other, tmp_path / "held.safetensors")
    assert_exact(other(X), small(X))
    prune.bake_(other)
    prune.bake_(small)
    assert_exact(list(other.parameters()), list(small.parameters()))


def test_hold_leaves_weights_without_zeros_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    prune.magnitude_(model, {"0": 0.5})
    report = prune.hold_(model)
    assert [(entry.fqn, entry.reason) for entry in report.left] == [("1.weight", "it has no zeros to hold")]
    assert not parametrize.is_parametrized(model[1])
    again = prune.hold_(model)  # twice changes nothing
    assert again.pruned == report.pruned
    assert len(model[0].parametrizations.weight) == 1


def test_a_held_model_is_not_swapped_and_says_why():
    import lamina

    model = nn.Sequential(nn.Linear(8, 8))
    prune.magnitude_(model, 0.5)
    prune.hold_(model)
    (decision,) = lamina.swap_(model, lamina.Int8Dynamic()).left
    assert "parametrized" in decision.reason
    prune.bake_(model)
    assert lamina.swap_(model, lamina.Int8Dynamic()).swapped


# -- the schedule


def test_sparsity_rises_as_a_cubic_and_zeros_stay():
    torch.manual_seed(0)
    model = nn.Linear(50, 40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = prune.GradualPruner(model, 0.9, steps=20, start=5, every=4, initial=0.1)
    seen = []
    gone = torch.zeros(40, 50, dtype=torch.bool)
    for step in range(1, 31):
        optimizer.zero_grad()
        model(torch.randn(8, 50)).square().sum().backward()
        optimizer.step()
        pruner.step()
        zero = model.weight == 0
        assert zero[gone].all()
        gone = zero
        seen.append(zero.double().mean().item())
        changes = [t for t in (5, 9, 13, 17, 21, 25) if t <= step]
        expected = 0.9 - 0.8 * (1 - (changes[-1] - 5) / 20) ** 3 if changes else 0.0
        assert seen[-1] == pytest.approx(expected, abs=1 / 2000), step
    assert pruner.finished
    report = pruner.finish()
    assert report.sparsity == pytest.approx(0.9)
    assert_exact(model.weight == 0, gone)


@pytest.mark.parametrize("pattern", ["4x4", "2:4"])
def test_a_pruner_goes_on_where_its_state_was_taken(small, pattern):
    share = 0.5 if pattern == "2:4" else 0.8

    def make(model):
        return prune.GradualPruner(model, share, pattern, steps=6), torch.optim.SGD(model.parameters(), lr=0.01)

    other = copy.deepcopy(small)
    pruner, optimizer = make(small)
    for step in range(8):
        if step == 3:
            state, weights = pruner.state_dict(), copy.deepcopy(small.state_dict())
        train_some(small, optimizer, 1)
        pruner.step()
    resumed, optimizer = make(other)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for _ in range(5):
        train_some(other, optimizer, 1)
        resumed.step()
    assert pruner.finish() == resumed.finish()
    assert_exact(list(small.parameters()), list(other.parameters()))
    if pattern == "2:4":
        assert ((small.head.weight != 0)[:, :4].sum(1) == 2).all()


def test_blocks_that_the_loss_does_not_miss_go_by_their_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[:, 8:] *= 10  # the largest weights read what is always zero
    frozen = copy.deepcopy(model[1].requires_grad_(False))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1e-3)
    pruner = prune.GradualPruner(model, 0.5, "4x4", start=3, steps=2, scope="global", score="taylor")
    (left,) = pruner.report().left
    assert (left.fqn, left.reason) == ("1.weight", "it does not train, and has no gradient to be scored by")
    saved = None
    for step in range(6):
        x = torch.randn(32, 16)
        x[:, 8:] = 0
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        pruner.step()
        if step == 1:
            saved = copy.deepcopy(model.state_dict())
    assert saved["0.parametrizations.weight.0.importance"].shape == (1, 2, 1, 4)
    assert (saved["0.parametrizations.weight.0.importance"][..., :2] > 0).all()
    pruner.finish()
    assert (model[0].weight[:, 8:] == 0).all()
    assert (model[0].weight[:, :8] != 0).all()
    assert_exact(model[1].weight, frozen.weight)


def test_scores_by_gradients_need_gradients():
    model = nn.Linear(8, 8)
    pruner = prune.GradualPruner(model, 0.5, steps=4, score="taylor")
    with pytest.raises(ValueError, match=r"call step\(\) after backward\(\) and before zero_grad\(\)"):
        pruner.step()
    with pytest.raises(ValueError, match="score is 'size', but must be 'magnitude' or 'taylor'"):
        prune.GradualPruner(model, steps=1, score="size")


def test_no_steps_prune_at_once_and_early_finishes_keep_what_is_there():
    model = nn.Linear(20, 20)
    assert prune.GradualPruner(model, 0.5, steps=0).finish().sparsity == 0.5
    pruner = prune.GradualPruner(model, 0.9, steps=100, initial=0.5)
    assert pruner.finish().sparsity == 0.5


def test_a_mask_that_is_taken_off_is_noticed():
    model = nn.Sequential(nn.Linear(8, 8))
    pruner = prune.GradualPruner(model, 0.5, steps=4)
    parametrize.remove_parametrizations(model[0], "weight")
    with pytest.raises(ValueError, match=r"the mask of 0\.weight is gone"):
        pruner.step()
    with pytest.raises(ValueError, match=r"the mask of 0\.weight is gone"):
        pruner.finish()


# -- distillation and sensitivity


def test_distillation_loss_is_the_paper_s():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    targets = torch.randint(5, (6,))
    temperature, alpha = 3.0, 0.7
    p = (teacher.double() / temperature).softmax(-1)
    q = (student.double() / temperature).softmax(-1)
    soft = (p * (p / q).log()).sum(-1).mean() * temperature**2
    hard = -student.double().log_softmax(-1)[torch.arange(6), targets].mean()
    loss = prune.distillation_loss(student, teacher, targets, temperature=temperature, alpha=alpha)
    torch.testing.assert_close(loss, (alpha * soft + (1 - alpha) * hard).float())
    only_soft = prune.distillation_loss(student, teacher, temperature=temperature)
    torch.testing.assert_close(only_soft, soft.float())
    loss.backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    assert prune.distillation_loss(student, student).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match=r"student is \[6, 5\] and teacher \[6, 4\]"):
        prune.distillation_loss(student, teacher[:, :4])
    with pytest.raises(ValueError, match=r"temperature is 0 and alpha 0\.5"):
        prune.distillation_loss(student, teacher, temperature=0)


def test_sensitivity_prunes_each_layer_alone_and_gives_the_weights_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 2))
    prune.magnitude_(model, {"0": 0.25})
    prune.hold_(model)
    before = copy.deepcopy(model.state_dict())

    def evaluate(m):
        # A layer's part is as large as its share of weights that are not zero.
        return sum(10.0**-i * (layer.weight != 0).double().mean().item() for i, layer in enumerate(m))

    told = []
    scan = prune.sensitivity(model, evaluate, (0.75, 0.5), progress=lambda *a: told.append(a))
    base = 0.75 + 0.1 + 0.01
    assert scan.baseline == pytest.approx(base)
    assert [layer.fqn for layer in scan.layers] == ["0", "1", "2"]
    for index, layer in enumerate(scan.layers):
        whole = 0.75 if index == 0 else 1.0
        assert list(layer.scores) == [0.5, 0.75]
        for share, score in layer.scores.items():
            assert score == pytest.approx(base - 10.0**-index * (whole - (1 - share)))
    assert scan.policy(0.06) == {"1": 0.5, "2": 0.75}
    assert len(told) == 6
    assert "75% zeros" in str(scan)
    assert_exact(list(model.state_dict().values()), list(before.values()))
    with pytest.raises(ZeroDivisionError):
        prune.sensitivity(model, lambda m: 1 / 0)
    with pytest.raises(ValueError, match="no sparsities to try"):
        prune.sensitivity(model, evaluate, ())
    assert_exact(list(model.state_dict().values()), list(before.values()))


def test_a_pattern_is_named_by_outputs_and_inputs():
    assert parse("4x1", "test") == Pattern("4x1", rows=4, cols=1)
    assert parse("1x4", "test") == Pattern("1x4", rows=1, cols=4)
    assert parse("2:4", "test") == Pattern("2:4", cols=4, most=2)
