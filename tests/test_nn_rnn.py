"""lamina.nn.LSTM, GRU, RNN and the cells: torch's own samples of layers, state_dict, compile, swap_ and accelerate."""

import copy
import itertools

import pytest
import torch
from tolerances import GATE_ERROR, assert_exact
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_leaves

import lamina
from lamina import models

CLASSES = {nn.LSTM: lamina.nn.LSTM, nn.GRU: lamina.nn.GRU, nn.RNN: lamina.nn.RNN}
CELLS = {nn.LSTMCell: lamina.nn.LSTMCell, nn.GRUCell: lamina.nn.GRUCell, nn.RNNCell: lamina.nn.RNNCell}


def module_inputs(torch_class) -> list:
    """PyTorch's own samples of a module, from its test suite."""
    (info,) = [info for info in module_db if info.module_cls is torch_class]
    options = {"device": "cpu", "dtype": torch.float32, "requires_grad": True}
    samples = [s for training in (False, True) for s in info.module_inputs_func(info, training=training, **options)]
    assert len(samples) >= 4
    return samples


def samples():
    """The grid of PyTorch's own module tests (module_inputs_torch_nn_RNN_GRU, _LSTM): every switch, input without a
    batch and packed, with a state and without; input with a batch besides."""
    switches = itertools.product((False, True), repeat=3)
    for (bias, batch_first, bidirectional), torch_class in itertools.product(list(switches), (nn.LSTM, nn.GRU)):
        for proj in (0, 2) if torch_class is nn.LSTM else (0,):
            for kind in ("one", "packed", "batch"):
                for with_state in (False, True):
                    options = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
                    options |= {"proj_size": proj} if proj else {}
                    words = [name for name, on in options.items() if on] + ["state"] * with_state
                    yield pytest.param(
                        torch_class, options, kind, with_state, id="-".join([torch_class.__name__, kind, *words])
                    )


def sample_inputs(torch_class, options: dict, kind: str, with_state: bool) -> tuple:
    """For layers of 2 inputs and 3 units, 2 layers."""
    parts = 4 if options["bidirectional"] else 2
    batch = {"one": (), "packed": (2,), "batch": (4,)}[kind]
    x = torch.randn(3, 2) if kind == "one" else torch.randn(4, 5, 2)
    if kind == "packed":
        x = pack_padded_sequence(torch.randn(5, 2, 2), torch.tensor([5, 3]))
    if kind == "batch":
        batch = (4,) if options["batch_first"] else (5,)
    if not with_state:
        return (x,)
    h_0, c_0 = torch.randn(parts, *batch, options.get("proj_size", 3)), torch.randn(parts, *batch, 3)
    return x, ((h_0, c_0) if torch_class is nn.LSTM else h_0)


def tensors(output) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tuple(output)) if isinstance(t, torch.Tensor)]


def both(torch_class, *args, **kwargs):
    layer = torch_class(*args, **kwargs).eval()
    return layer, CLASSES[torch_class].from_float(layer)


def assert_close(ours, theirs):
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b, atol=8 * GATE_ERROR, rtol=1e-5)


def results(layer, sample) -> list[torch.Tensor]:
    """Outputs, then the gradients of what takes one."""
    given = sample.forward_input
    leaves = [t for t in tensors((given.args, given.kwargs)) if t.requires_grad]
    outputs = tensors(layer(*given.args, **given.kwargs))
    total = sum((k + 1) * o.sin().sum() for k, o in enumerate(outputs) if o.is_floating_point())
    gradients = torch.autograd.grad(total, [*leaves, *layer.parameters()])
    return [*outputs, *gradients]


@pytest.mark.parametrize("torch_class", [*CLASSES, *CELLS])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_torchs_own_samples(torch_class):
    for sample in module_inputs(torch_class):
        layer = torch_class(*sample.constructor_input.args, **sample.constructor_input.kwargs)
        ours = (CLASSES | CELLS)[torch_class](*sample.constructor_input.args, **sample.constructor_input.kwargs)
        ours.load_state_dict(layer.state_dict())
        for training in (False, True):
            layer.train(training), ours.train(training)
            for a, b in zip(results(ours, sample), results(layer, sample), strict=True):
                # Samples are up to 9: a slope 1 - h^2 of an h near 1 keeps what h is off by, times that.
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
            with torch.no_grad():
                given = sample.forward_input
                assert_close(ours(*given.args, **given.kwargs), layer(*given.args, **given.kwargs))


@pytest.mark.parametrize("torch_class", CELLS)
@pytest.mark.parametrize("batch", [(), (3,), (0,)])
def test_cells(torch_class, batch):
    cell = torch_class(5, 18)
    ours = CELLS[torch_class].from_float(cell)
    x, state = torch.randn(*batch, 5), torch.randn(*batch, 18)
    assert repr(ours) == repr(cell)
    for hx in (None, (state, torch.randn(*batch, 18)) if torch_class is nn.LSTMCell else state):
        assert_close(ours(x, hx), cell(x, hx))
    for arguments in ((torch.randn(3, 4),), (torch.randn(2, 3, 5),), (torch.randn(3, 5), torch.randn(3, 2))):
        with pytest.raises((RuntimeError, ValueError, TypeError)) as theirs:
            cell(*arguments)
        with pytest.raises(type(theirs.value)) as mine:
            ours(*arguments)
        assert str(mine.value) == str(theirs.value)
    if batch == (3,):
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), cell(x))


def test_rnn_takes_its_nonlinearity_where_torch_does():
    x = torch.randn(3, 2, 4)
    for args, kwargs in (((4, 6, 2, "relu", False), {}), ((4, 6), {"nonlinearity": "relu", "num_layers": 2})):
        layer = nn.RNN(*args, **kwargs)
        ours = lamina.nn.RNN(*args, **kwargs)
        ours.load_state_dict(layer.state_dict())
        assert_close(ours(x), layer(x))
        assert repr(ours) == repr(layer)
    with pytest.raises(ValueError, match=r"^RNN: nonlinearity is 'gelu', but must be 'tanh' or 'relu'"):
        lamina.nn.RNN(4, 6, nonlinearity="gelu")
    with pytest.raises(ValueError, match=r"^GRU: proj_size is 2, but only an LSTM projects"):
        lamina.nn.GRU(4, 6, proj_size=2)


@pytest.mark.parametrize("torch_class", CLASSES)
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_sequences_with_states(torch_class, enforce_sorted):
    layer, ours = both(torch_class, 5, 18, 2, bidirectional=True)
    lengths = torch.tensor([7, 5, 5, 1] if enforce_sorted else [5, 1, 7, 5])
    packed = pack_padded_sequence(torch.randn(7, 4, 5), lengths, enforce_sorted=enforce_sorted)
    state = torch.randn(4, 4, 18)
    hx = (state, torch.randn(4, 4, 18)) if torch_class is nn.LSTM else state
    with torch.no_grad():
        for start in (None, hx):
            (output, last), (right, right_last) = ours(packed, start), layer(packed, start)
            assert isinstance(output, PackedSequence)
            assert_close(output.data, right.data)
            for mine, theirs in zip(output[1:], right[1:], strict=True):
                assert (mine is theirs is None) or torch.equal(mine, theirs)
            assert_close(last, right_last)


@pytest.mark.parametrize("torch_class", CLASSES)
def test_bad_calls_fail_in_torchs_words(torch_class):
    layer, ours = both(torch_class, 5, 8)
    state = torch.zeros(1, 3, 8)
    good = (state, state) if torch_class is nn.LSTM else state
    wrong = torch.zeros(1, 2, 8)
    calls = [
        (torch.zeros(0, 3, 5),),
        (torch.zeros(4, 3, 6),),
        (torch.zeros(4, 3, 2, 5),),
        (torch.zeros(4, 3, 5).double(),),
        (torch.zeros(4, 3, 5), (wrong, wrong) if torch_class is nn.LSTM else wrong),
        (torch.zeros(4, 5), good),
    ]
    for arguments in calls:
        with pytest.raises((RuntimeError, ValueError, TypeError)) as theirs:
            layer(*arguments)
        with pytest.raises(type(theirs.value)) as mine:
            ours(*arguments)
        assert str(mine.value).replace("lamina", "") == str(theirs.value)


@pytest.mark.parametrize("torch_class", CLASSES)
def test_state_dict_is_torchs(torch_class):
    layer, ours = both(torch_class, 5, 8, 2, bidirectional=True)
    assert list(ours.state_dict()) == list(layer.state_dict())
    assert all(a is b for a, b in zip(ours.parameters(), layer.parameters(), strict=True))
    fresh = CLASSES[torch_class](5, 8, 2, bidirectional=True).eval()
    x = torch.randn(3, 2, 5)
    with torch.no_grad():
        before = fresh(x)
        fresh.load_state_dict(layer.state_dict())
        assert_exact(tree_leaves(fresh(x)), tree_leaves(ours(x)))
        assert not torch.equal(before[0], ours(x)[0])
        assert_exact(tree_leaves(copy.deepcopy(fresh)(x)), tree_leaves(ours(x)))
    assert repr(ours) == repr(layer)


@pytest.mark.parametrize("torch_class", CLASSES)
def test_training_is_torchs(torch_class):
    """Dropout draws the same numbers, and an optimizer's step is seen by the next evaluation."""
    layer, ours = both(torch_class, 5, 8, 2, dropout=0.5)
    x = torch.randn(4, 3, 5)
    layer.train(), ours.train()
    torch.manual_seed(1)
    expected = layer(x)[0]
    torch.manual_seed(1)
    assert_close(ours(x)[0], expected)
    ours.eval(), layer.eval()
    with torch.no_grad():
        before = ours(x)[0]
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.5)
    ours.train()(x)[0].square().sum().backward()
    optimizer.step()
    ours.eval()
    with torch.no_grad():
        assert not torch.equal(ours(x)[0], before)
        assert_close(ours(x), layer(x))


@pytest.mark.parametrize("torch_class", CLASSES)
@pytest.mark.parametrize("move", ["double", "bfloat16"])
def test_other_dtypes(torch_class, move):
    layer, ours = both(torch_class, 5, 24)
    layer, ours = getattr(layer, move)(), getattr(copy.deepcopy(ours), move)()
    x = getattr(torch.randn(4, 3, 5), move)()
    with torch.no_grad():
        actual, expected = ours(x), layer(x)
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        assert a.dtype == b.dtype == x.dtype
        torch.testing.assert_close(a, b, atol=2e-2 if move == "bfloat16" else 1e-12, rtol=0)


@pytest.mark.parametrize("torch_class", CLASSES)
def test_compiles_and_exports_in_one_graph(torch_class):
    """torch.compile breaks the graph at nn.LSTM itself."""
    _, ours = both(torch_class, 5, 8, 2, batch_first=True)
    x = torch.randn(3, 4, 5)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = tree_leaves(ours(x))
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        assert_exact(tree_leaves(compiled(x)), expected)
        exported = torch.export.export(ours, (x,))
        assert_exact(tree_leaves(exported.module()(x)), expected)
    op = getattr(torch.ops.lamina, "rnn_tanh" if torch_class is nn.RNN else torch_class.__name__.lower()).default
    assert op in [node.target for node in exported.graph.nodes]


@pytest.mark.parametrize("torch_class", CLASSES)
def test_training_compiles_in_one_graph(torch_class):
    _, ours = both(torch_class, 5, 8, 2, batch_first=True)
    ours.train()
    x = torch.randn(3, 4, 5)
    expected = torch.autograd.grad(ours(x)[0].square().sum(), list(ours.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_close(torch.autograd.grad(compiled(x)[0].square().sum(), list(ours.parameters())), expected)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_swap_replaces_the_classifiers_layers(name):
    model = models.create(name).eval()
    inputs = models.example_inputs(name, 3)
    with torch.no_grad():
        expected = model(*inputs)
        report = lamina.swap_(model, lamina.FusedRNN())
        (decision,) = report.swapped
        assert decision.was == f"{name.upper()}(28, 128)"
        assert decision.now == f"lamina {name.upper()}(28, 128)"
        assert_close(model(*inputs), expected)
    assert lamina.swap_(model, lamina.FusedRNN()).decisions == ()


def test_swap_leaves_what_it_cannot_take():
    class Own(nn.LSTM):
        pass

    model = nn.ModuleDict({"own": Own(3, 4), "wide": nn.GRU(3, 4).double(), "good": nn.GRU(3, 4)})
    report = lamina.swap_(model, lamina.FusedRNN())
    reasons = {d.fqn: d.reason for d in report.left}
    assert reasons == {
        "own": "Own is a subclass of nn.LSTM and may compute something else",
        "wide": "the weights are torch.float64, and the fused GRU takes float32 and bfloat16",
    }
    assert [d.fqn for d in report.swapped] == ["good"]
    with pytest.raises(TypeError, match=r"^LSTM\.from_float: expected nn\.LSTM, got Own$"):
        lamina.nn.LSTM.from_float(model["own"])


def test_accelerate_takes_seq2seq_and_keeps_its_answers():
    """Encoder and decoder, packed and streaming: greedy decoding feeds one step at a time."""
    model = models.create("seq2seq").eval()
    inputs = models.example_inputs("seq2seq", 2)
    fast = lamina.accelerate(model, inputs, config=lamina.FusedRNN(), min_speedup=0.0, compile=False).model
    assert isinstance(fast.encoder, lamina.nn.GRU)
    assert isinstance(fast.decoder, lamina.nn.GRU)
    lengths = torch.tensor([24, 9])
    with torch.no_grad():
        assert_close(fast(*inputs, lengths), model(*inputs, lengths))
        assert_exact(fast.greedy_decode(inputs[0], 6, lengths), model.greedy_decode(inputs[0], 6, lengths))


# -- int8

INT8 = {nn.LSTM: lamina.nn.Int8LSTM, nn.GRU: lamina.nn.Int8GRU}


def int8_of(torch_class, *args, **kwargs):
    layer = torch_class(*args, **kwargs).eval()
    return layer, INT8[torch_class].from_float(layer)


@pytest.mark.parametrize(
    ("torch_class", "options", "kind", "with_state"), [p for p in samples() if "batch_first" not in p.id]
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_int8_layers_take_torchs_own_samples(torch_class, options, kind, with_state):
    layer, ours = int8_of(torch_class, 2, 3, 2, **options)
    inputs = sample_inputs(torch_class, options, kind, with_state)
    with torch.no_grad():
        expected, actual = tensors(layer(*inputs)), tensors(ours(*inputs))
    assert len(expected) == len(actual) > 1
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0)  # a few codes of 1/127: weights, inputs and states


@pytest.mark.parametrize("torch_class", INT8)
def test_int8_state_dict_survives_a_round_trip(torch_class):
    layer, ours = int8_of(torch_class, 5, 8, 2, bidirectional=True)
    x = torch.randn(4, 3, 5)
    state = ours.state_dict()
    assert state["weight_hh_l1_reverse"].dtype is torch.int8
    assert {name for name in state if not name.endswith("_scale")} == set(layer.state_dict())
    for source in (state, layer.state_dict()):  # codes, or float weights that are quantized
        fresh = INT8[torch_class](5, 8, 2, bidirectional=True).eval()
        fresh.load_state_dict(source, strict=source is state)
        with torch.no_grad():
            assert_exact(tensors(fresh(x)), tensors(ours(x)))
    with torch.no_grad():
        half = copy.deepcopy(ours).to(torch.bfloat16)
        assert half.weight_hh_l0_scale.dtype is torch.float32
        assert half(x.bfloat16())[0].dtype is torch.bfloat16


@pytest.mark.parametrize("torch_class", INT8)
def test_int8_gradient_and_training_are_the_dequantized_layers(torch_class):
    _, ours = int8_of(torch_class, 5, 8, 2, dropout=0.5)
    floats = ours.dequantized()
    x = torch.randn(4, 3, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(ours(x)[0].square().sum(), x)
    (expected,) = torch.autograd.grad(floats(x)[0].square().sum(), x)
    assert_exact(gradient, expected)
    ours.train(), floats.train()
    torch.manual_seed(1)
    right = floats(x)[0]
    torch.manual_seed(1)
    assert_exact(ours(x)[0], right)
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        ours.eval()(x[:0])


@pytest.mark.parametrize("torch_class", INT8)
def test_int8_compiles_in_one_graph(torch_class):
    _, ours = int8_of(torch_class, 5, 8, 2, batch_first=True)
    x = torch.randn(3, 4, 5)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        assert_exact(tensors(compiled(x)), tensors(ours(x)))


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_swap_to_int8(name):
    model = models.create(name).eval()
    inputs = models.example_inputs(name, 3)
    with torch.no_grad():
        expected = model(*inputs)
        (decision,) = lamina.swap_(model, lamina.Int8RNN()).swapped
        assert decision.now == f"Int8{name.upper()}(28, 128)"
        assert (model(*inputs) - expected).norm() < 0.05 * expected.norm()
