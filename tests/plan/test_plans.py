"""A plan computes what the graph's own calls compute, whatever lies between its steps."""

import copy
import dataclasses
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lamina
from lamina import _C
from lamina.compile import CaptureError
from lamina.plan.record import TorchCall

EVERY = {"measure": False}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


class Net(nn.Module):
    """`forward` given as a function of the module and its inputs."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._function = [forward]

    def forward(self, *args):
        return self._function[0](self, *args)


def mlp():
    return nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 7)).eval()


def block():
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True).eval()
    lamina.swap_(layer, lamina.FusedAttention())  # torch's own is one call for all of it
    return layer


def convnet():
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(8 * 36, 5)).eval()


def plan_of(model, *inputs, **options):
    return lamina.make_plan(model, inputs, options=EVERY | options)


def torch_calls(plan) -> list[str]:
    return [str(s.op) for s in plan.program.recording.steps if isinstance(s, TorchCall)]


@pytest.mark.parametrize(
    ("make", "shape"), [(mlp, (5, 20)), (block, (2, 7, 32)), (convnet, (3, 3, 12, 12))], ids=["mlp", "block", "convnet"]
)
def test_a_plan_gives_what_the_model_gives(make, shape):
    model = make()
    x = torch.randn(shape)
    plan = plan_of(model, x)
    assert plan.coverage == 1.0
    for _ in range(3):
        x = torch.randn(shape)
        with torch.no_grad():
            close(plan(x), model(x))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_as_the_graphs_own_calls(threads, isa):
    _C.force_isa(isa)
    torch.set_num_threads(threads)
    model, x = block(), torch.randn(2, 7, 32)
    direct = torch.compile(copy.deepcopy(model), backend="lamina", options=EVERY | {"plan": False})
    planned = torch.compile(copy.deepcopy(model), backend="lamina", options=EVERY)
    with torch.no_grad():
        assert torch.equal(planned(x), planned(x))
        close(planned(x), direct(x))


def test_int8_layers_give_the_same_bits():
    model, x = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).eval(), torch.randn(9, 64)
    lamina.swap_(model, lamina.Int8Dynamic())
    with torch.no_grad():
        assert torch.equal(plan_of(model, x)(x), torch.compile(model, backend="lamina", options={"plan": False})(x))


def test_memory_nobody_wrote_is_not_read(poison):
    model, x = block(), torch.randn(2, 7, 32)
    plan = plan_of(model, x)
    with torch.no_grad():
        close(plan(x), model(x))


# -- what torch does in between


def test_a_call_of_torch_stands_between_two_segments():
    net = Net(lambda m, x: m.b(torch.cumsum(m.a(x), 1)), a=nn.Linear(8, 8), b=nn.Linear(8, 4)).eval()
    x = torch.randn(3, 8)
    plan = plan_of(net, x)
    assert torch_calls(plan) == ["aten.cumsum.default"]
    assert 0 < plan.coverage < 1
    with torch.no_grad():
        close(plan(x), net(x))


def test_a_global_pool_of_channels_last_needs_no_call_of_torch():
    """Torch gives its result other strides afterwards, in place."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    net = net.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    plan = plan_of(net, x)
    assert not torch_calls(plan)
    with torch.no_grad():
        close(plan(x), net(x))


def test_writes_to_what_the_graph_made_itself():
    def forward(m, x):
        y = m.a(x).sort(dim=1).values
        y[:, 0] = 0.0
        y.mul_(2.0)
        return m.b(y)

    net = Net(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 4)).eval()
    x = torch.randn(3, 8)
    plan = plan_of(net, x)
    with torch.no_grad():
        for x in torch.randn(3, 3, 8):
            close(plan(x), net(x))


def test_a_constant_that_is_written_to_starts_anew_each_time():
    def forward(m, x):
        y = torch.zeros(3, 8)
        y[1:] += m.a(x)[1:]
        return y

    net = Net(forward, a=nn.Linear(8, 8)).eval()
    plan = plan_of(net, torch.randn(3, 8))
    with torch.no_grad():
        for x in torch.randn(3, 3, 8):
            close(plan(x), net(x))


def test_chains_of_arithmetic_become_one_step():
    def forward(m, x):
        y = m.a(x)
        return torch.where(y > 0, (y * 2 + x).exp() / 3, -y) - m.scale

    net = Net(forward, a=nn.Linear(8, 8), scale=nn.Parameter(torch.randn(8))).eval()
    x = torch.randn(3, 8)
    plan = plan_of(net, x)
    assert [s.op for s in plan.program.recording.steps].count("elementwise") == 1
    with torch.no_grad():
        close(plan(x), net(x))


def test_what_hangs_on_no_input_is_computed_once():
    net = Net(lambda m, x: x + (torch.arange(8).float() * m.scale).cos(), scale=nn.Parameter(torch.randn(8))).eval()
    x = torch.randn(3, 8)
    plan = plan_of(net, x)
    assert len(plan.program.recording.steps) == 1
    with torch.no_grad():
        close(plan(x), net(x))


# -- results


def test_results_of_every_form():
    def forward(m, x, y):
        a = m.a(x)
        return {"sum": a + y, "parts": (a[:, :3], [a.t(), y]), "same": a, "none": None, "number": 3}

    net = Net(forward, a=nn.Linear(8, 8)).eval()
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    plan = plan_of(net, x, y)
    with torch.no_grad():
        actual, expected = plan(x, y), net(x, y)
    assert actual.keys() == expected.keys()
    assert actual["none"] is None
    assert actual["number"] == 3
    for name in ("sum", "same"):
        close(actual[name], expected[name])
    close(actual["parts"][0], expected["parts"][0])
    close(actual["parts"][1][0], expected["parts"][1][0])
    assert actual["parts"][1][1] is y


def test_outputs_that_share_memory_still_do():
    net = Net(lambda m, x: (lambda y: (y, y[1:]))(m.a(x)), a=nn.Linear(8, 8)).eval()
    x = torch.randn(3, 8)
    whole, part = plan_of(net, x)(x)
    assert part.data_ptr() == whole[1:].data_ptr()
    close(part, whole[1:])


def test_a_result_is_the_callers_own():
    model, x = mlp(), torch.randn(5, 20)
    plan = plan_of(model, x)
    first = plan(x)
    kept = first.clone()
    plan(torch.randn(5, 20)).fill_(7.0)
    assert torch.equal(first, kept)


def test_a_constant_result_can_be_written_to():
    net = Net(lambda m, x: (x + 1, torch.arange(4.0))).eval()
    x = torch.randn(4)
    plan = plan_of(net, x)
    plan(x)[1].fill_(9.0)
    assert torch.equal(plan(x)[1], torch.arange(4.0))


# -- inputs


def test_inputs_by_name_and_of_other_strides():
    model, x = mlp(), torch.randn(5, 20)
    plan = plan_of(model, x)
    assert [str(i) for i in plan.inputs] == ["input: float32[5, 20]"]
    expected = plan(x)
    assert torch.equal(plan(input=x), expected)
    assert torch.equal(plan(x.t().contiguous().t()), expected)
    assert torch.equal(plan(torch.randn(5, 41)[:, ::2][:, :20].copy_(x)), expected)


def test_inputs_that_share_memory_with_each_other():
    net = Net(lambda m, x, y: m.a(x) + y, a=nn.Linear(8, 8)).eval()
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    plan = lamina.make_plan(net, (x, x), options=EVERY)
    with torch.no_grad():
        close(plan(x, x), net(x, x))
        if len(plan.inputs) == 2:
            close(plan(x, y), net(x, y))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(torch.randn(6, 20)), r"input is float32\[6, 20\], but this plan was made for float32\[5, 20\]"),
        (lambda p: p(torch.randn(5, 20).double()), r"input is float64\[5, 20\], but this plan was made for"),
        (lambda p: p(), "the input 'input' is not given"),
        (lambda p: p(torch.randn(5, 20), torch.randn(1)), "2 arguments were given, but it takes input"),
        (lambda p: p(torch.randn(5, 20), other=torch.randn(1)), "there is no input 'other'"),
    ],
)
def test_other_inputs_are_refused(call, message):
    plan = plan_of(mlp(), torch.randn(5, 20))
    with pytest.raises(lamina.PlanError, match=message):
        call(plan)


# -- models without a plan


def branching(m, x):
    return m.a(x) if x.sum() > 0 else -x


def writing(m, x):
    x.add_(1.0)
    return m.a(x)


def counting(m, x):
    m.count += 1
    return m.a(x) * m.count


def test_models_without_a_plan_say_why():
    x = torch.randn(3, 8)
    counter = Net(counting, a=nn.Linear(8, 8))
    counter.register_buffer("count", torch.zeros(()))
    for net, message in (
        (Net(branching, a=nn.Linear(8, 8)), "is not one graph"),
        (Net(writing, a=nn.Linear(8, 8)), "writes to memory of the model or its caller"),
        (counter, "is not one graph"),
        (Net(lambda m, x: x[x > 0] * 2), "hangs on the values|not one graph"),
    ):
        before = {name: value.clone() for name, value in net.state_dict().items()}
        given = x.clone()
        with pytest.raises((lamina.PlanError, CaptureError), match=message):
            plan_of(net.eval(), given)
        assert torch.equal(given, x)
        for name, value in net.state_dict().items():
            if name != "count":
                assert torch.equal(value, before[name])


def test_training_mode_is_refused():
    with pytest.raises(lamina.PlanError, match=r"training mode.*call model\.eval\(\)"):
        plan_of(nn.Sequential(nn.Linear(20, 4), nn.BatchNorm1d(4)), torch.randn(5, 20))


def test_batch_norm_that_learns_stays_right_in_a_compiled_model():
    """Buffers are updated once a call, as in eager: what has no plan runs as it was captured."""
    norm = nn.BatchNorm1d(8)
    eager, fast = copy.deepcopy(norm), torch.compile(norm, backend="lamina", options=EVERY)
    with torch.no_grad():
        for x in torch.randn(3, 5, 8):
            close(fast(x), eager(x))
    close(norm.running_mean, eager.running_mean)
    assert norm.num_batches_tracked == eager.num_batches_tracked


def test_the_model_is_as_before():
    model, x = mlp(), torch.randn(5, 20)
    plan_of(model, x)
    assert model._compiled_call_impl is None
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in mlp().named_parameters()]


# -- the compile backend


def test_every_size_gets_a_plan_of_its_own():
    model = mlp()
    fast = torch.compile(model, backend="lamina", dynamic=True, options=EVERY)
    with torch.no_grad():
        for batch in (5, 2, 9, 5, 1, 2):
            x = torch.randn(batch, 20)
            close(fast(x), model(x))


def test_a_changed_weight_changes_the_result():
    model, x = mlp(), torch.randn(5, 20)
    fast = torch.compile(model, backend="lamina", options=EVERY)
    with torch.no_grad():
        fast(x)
        model[0].weight.mul_(2.0)
        close(fast(x), model(x))
        model[2].weight.data = torch.randn(7, 33)
        close(fast(x), model(x))
        model[2].bias = nn.Parameter(torch.randn(7))
        close(fast(x), model(x))


def test_one_plan_from_eight_threads():
    model = convnet()
    xs = torch.randn(8, 3, 3, 12, 12)
    plan = plan_of(model, xs[0])
    expected = [plan(x) for x in xs]
    wrong = []

    def run(i):
        for _ in range(50):
            if not torch.equal(plan(xs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- looking at it


def test_a_plan_prints_its_steps():
    plan = plan_of(convnet(), torch.randn(3, 3, 12, 12))
    text = str(plan)
    for part in ("conv2d", "linear", "arena", "[3, 3, 12, 12]", "FLOP"):
        assert part in text


def test_a_profile_has_every_step():
    x = torch.randn(3, 3, 12, 12)
    plan = plan_of(convnet(), x)
    profile = plan.profile(x)
    assert len(profile.steps) == len(plan.program.recording.steps)
    assert all(step.seconds > 0 and 0 <= step.of_peak <= 1 for step in profile.steps)
    assert profile.in_segments == 1.0
    convolution = profile.steps[0]
    assert convolution.op == "conv2d"
    assert convolution.flops == 2 * 3 * 8 * 12 * 12 * 27
    assert convolution.isa in _C.available_isas()
    assert "conv2d" in str(profile)


def test_softmax_and_norms_are_steps():
    net = Net(lambda m, x: F.softmax(m.n(m.a(x)), -1), a=nn.Linear(8, 8), n=nn.LayerNorm(8)).eval()
    x = torch.randn(3, 8)
    plan = plan_of(net, x)
    assert torch_calls(plan) == []
    with torch.no_grad():
        close(plan(x), net(x))


def test_what_stays_in_torch_is_said_with_its_reason():
    net = Net(lambda m, x: m.b(torch.cumsum(m.a(x), 1)).double().mul(2.0), a=nn.Linear(8, 8), b=nn.Linear(8, 4)).eval()
    x = torch.randn(3, 8)
    plan = plan_of(net, x)
    covered = plan.covered(x)
    assert covered.steps == plan.coverage
    assert 0 < covered.time < 1
    assert {name: (count, why) for name, (count, _, why) in covered.left.items()} == {
        "aten.cumsum": (1, "lamina has no op for it"),
        "aten._to_copy": (1, "lamina's op does not take these operands, [3, 4]"),
        "aten.mul.Tensor": (1, "lamina's op does not take these operands, float64[3, 4]"),
    }
    assert abs(covered.time + sum(share for _, share, _ in covered.left.values()) - 1) < 1e-6
    assert "1 x aten.cumsum" in str(covered)
    assert str(plan_of(mlp(), torch.randn(5, 20)).covered(torch.randn(5, 20))).startswith("lamina's: 100% of the steps")


# -- what goes in and out


def test_values_that_are_no_tensors_are_those_of_the_example(tmp_path):
    net = Net(lambda m, x, flag, scale: m.a(x) * scale if flag else x, a=nn.Linear(8, 8)).eval()
    x = torch.randn(3, 8)
    made = plan_of(net, x, True, 2.0)
    made.save(tmp_path / "plan.safetensors")
    for plan in (made, lamina.load_plan(tmp_path / "plan.safetensors")):
        assert torch.equal(plan(x, True, 2.0), plan(x))
        with torch.no_grad():
            close(plan(x), net(x, True, 2.0))
        with pytest.raises(lamina.PlanError, match="argument1 is False, but this plan was made for True"):
            plan(x, False, 2.0)
        with pytest.raises(lamina.PlanError, match=r"argument2 is 3, but this plan was made for 2\.0"):
            plan(x, True, 3)
        with pytest.raises(lamina.PlanError, match="mode is 'fast', but this plan was made for the model's default"):
            plan(x, mode="fast")


def test_arguments_with_plain_ones_between_them():
    net = Net(lambda m, x, flag, y: m.a(x) + y, a=nn.Linear(8, 8)).eval()
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    plan = plan_of(net, x, None, y)
    with torch.no_grad():
        close(plan(x, None, y), net(x, None, y))
    with pytest.raises(lamina.PlanError, match=r"'argument2' is not given"):
        plan(x, y)


@dataclasses.dataclass
class Parts:
    first: torch.Tensor
    rest: list


def test_dataclasses_are_dicts():
    net = Net(lambda m, x: Parts(m.a(x), [x + 1, None]), a=nn.Linear(8, 8)).eval()
    x = torch.randn(3, 8)
    with torch.no_grad():
        actual, expected = plan_of(net, x)(x), net(x)
    close(actual["first"], expected.first)
    assert torch.equal(actual["rest"][0], x + 1)
    assert actual["rest"][1] is None


def test_buffers_that_are_not_saved_and_weights_that_are_shared(tmp_path):
    net = Net(
        lambda m, i: F.linear(m.words(i) + m.places, m.words.weight) + m.head(m.words(i)),
        words=nn.Embedding(10, 8),
        head=nn.Linear(8, 10, bias=False),
    )
    net.head.weight = net.words.weight
    net.register_buffer("places", torch.randn(4, 8), persistent=False)
    ids = torch.randint(0, 10, (3, 4))
    plan = plan_of(net.eval(), ids)
    plan.save(tmp_path / "plan.safetensors")
    with torch.no_grad():
        close(plan(ids), net(ids))
    assert torch.equal(lamina.load_plan(tmp_path / "plan.safetensors")(ids), plan(ids))


def test_results_that_are_views_of_inputs():
    net = Net(lambda m, x: (m.a(x), x[1:], x.t(), x), a=nn.Linear(8, 8)).eval()
    x = torch.randn(3, 8)
    plan = plan_of(net, x)
    x = torch.randn(3, 8)
    _, part, turned, same = plan(x)
    assert part.data_ptr() == x[1:].data_ptr()
    assert turned.data_ptr() == x.data_ptr()
    assert same is x
    assert torch.equal(turned, x.t())


class Notebook:
    """Some object of the caller's that a model writes into."""

    def __init__(self):
        self.last = torch.zeros(3, 8)

    def __iter__(self):
        yield self.last


def test_what_a_model_sets_in_its_arguments_must_come_out():
    def forward(m, x, book):
        book.last = m.a(x) + book.last
        return (book.last * 2, book) if m.tells else book.last * 2

    net = Net(forward, a=nn.Linear(8, 8)).eval()
    x, book = torch.randn(3, 8), Notebook()
    net.tells = False
    with pytest.raises(lamina.PlanError, match=r"sets argument1\.0 in its arguments to what is no part of its result"):
        plan_of(net, x, book)
    net.tells = True
    torch._dynamo.reset()
    plan = plan_of(net, x, book)
    assert not book.last.any()
    with torch.no_grad():
        twice, (last,) = plan(x, book)
        close(last, net.a(x))
        close(twice, 2 * last)
    assert not book.last.any()


def test_inside_inference_mode():
    model = mlp()
    with torch.inference_mode():
        x = torch.randn(5, 20)
        close(plan_of(model, x)(x), model(x))


# -- any size


def test_a_dynamic_plan_takes_every_size(tmp_path):
    model = block()
    plan = lamina.make_plan(model, (torch.randn(2, 7, 32),), options=EVERY, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 7), (3, 7), (2, 9), (2, 7), (5, 11)):
            x = torch.randn(batch, length, 32)
            close(plan(x), model(x))
            assert plan.inputs[0].shape == (batch, length, 32)
    plan.save(tmp_path / "p")
    loaded = lamina.load_plan(tmp_path / "p")
    for batch, length in ((5, 11), (2, 7), (3, 7)):
        x = torch.randn(batch, length, 32)
        assert torch.equal(loaded(x), plan(x))
    with pytest.raises(lamina.PlanError, match=r"is float32\[4, 4, 32\], but this plan was made for"):
        loaded(torch.randn(4, 4, 32))


def test_sizes_share_the_weights(tmp_path):
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()
    weights = sum(p.nbytes for p in model.parameters())
    plan = lamina.make_plan(model, (torch.randn(2, 64),), options=EVERY, dynamic=True)
    for batch in (3, 4, 5, 6):
        plan(torch.randn(batch, 64))
    plan.save(tmp_path / "p")
    assert (tmp_path / "p").stat().st_size < 1.5 * weights


def test_a_dynamic_plan_refuses_what_the_model_refuses():
    plan = lamina.make_plan(mlp(), (torch.randn(5, 20),), options=EVERY, dynamic=True)
    with pytest.raises(lamina.PlanError, match=r"float32\[20\], but this plan was made for"):
        plan(torch.randn(20))
    with pytest.raises(Exception, match=r"shapes|size"):
        plan(torch.randn(5, 21))
    assert plan(torch.randn(3, 20)).shape == (3, 7)
