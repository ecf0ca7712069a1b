"""swap_: what is replaced, what is left alone and why; nothing it cannot take is an error, and nothing else changes."""

import copy

import pytest
import torch
from tolerances import INT8_LAYER_SQNR_DB, INT8_MODEL_SQNR_DB, assert_exact, assert_lossy
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import lamina
from lamina import swap_
from lamina.models.attention import ScaledDotProductAttention as ReferenceAttention
from lamina.nn import Int8Linear

INT8 = lamina.Int8Dynamic()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 7))


def decision(report: lamina.SwapReport, fqn: str) -> lamina.LayerDecision:
    return next(d for d in report.decisions if d.fqn == fqn)


def left_because(report: lamina.SwapReport, fqn: str, reason: str) -> None:
    found = decision(report, fqn)
    assert found.now is None, found
    assert reason in found.reason
    assert "\n" not in found.reason


# -- what is replaced


def test_replaces_every_linear():
    model, x = mlp(), torch.randn(16, 20)
    original = copy.deepcopy(model)
    report = swap_(model, INT8)
    assert [type(m) for m in model] == [Int8Linear, nn.ReLU, Int8Linear, nn.ReLU, Int8Linear]
    assert [d.fqn for d in report.swapped] == ["0", "2", "4"]
    assert report.left == ()
    assert decision(report, "0") == lamina.LayerDecision(
        "0", "Linear(20, 30)", "Int8Linear(20, 30)", "replaced as asked"
    )
    assert_lossy(model(x), original(x), min_sqnr_db=INT8_MODEL_SQNR_DB)
    assert not torch.equal(model(x), original(x))


def test_returns_a_report_that_prints_every_layer():
    model = nn.ModuleDict({"body": mlp(), "head": nn.Linear(7, 2).double()})
    text = str(swap_(model, INT8))
    assert text.startswith("3 of 4 layers replaced\n")
    for word in (
        "body.0",
        "body.2",
        "body.4",
        "head",
        "Linear(20, 30)",
        "Int8Linear(20, 30)",
        "torch.float64",
        "layer",
        "why",
    ):
        assert word in text
    assert "speedup" not in text  # nothing was measured


def test_nested_containers_and_custom_modules():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.more = nn.ModuleList([nn.Linear(8, 8), nn.ModuleDict({"deep": nn.Linear(8, 8)})])
            self.nothing = None
            self.register_module("empty", None)

        def forward(self, x):
            return self.more[1]["deep"](self.more[0](self.fc(x)))

    model = nn.Sequential(Block(), Block())
    report = swap_(model, INT8)
    assert [d.fqn for d in report.swapped] == [f"{b}.{n}" for b in (0, 1) for n in ("fc", "more.0", "more.1.deep")]
    assert not [m for m in model.modules() if type(m) is nn.Linear]
    assert model(torch.randn(2, 8)).shape == (2, 8)
    assert list(model[0]._modules) == ["fc", "more", "empty"]  # the order of children stays


def test_filter_fn_sees_module_and_name():
    model, seen = mlp(), []

    def only_middle(module, fqn):
        seen.append((fqn, type(module)))
        return fqn == "2"

    report = swap_(model, INT8, filter_fn=only_middle)
    assert seen == [("0", nn.Linear), ("2", nn.Linear), ("4", nn.Linear)]
    assert [d.fqn for d in report.swapped] == ["2"]
    left_because(report, "0", "excluded by filter_fn")


def test_an_error_in_filter_fn_changes_nothing():
    """The layers are judged one by one: an error on the last must not leave the first replaced."""
    model = mlp()
    before = [type(m) for m in model.modules()]

    def breaks(module, fqn):
        if fqn == "4":
            raise KeyError("no such layer")
        return True

    with pytest.raises(KeyError, match="no such layer"):
        swap_(model, INT8, filter_fn=breaks)
    assert [type(m) for m in model.modules()] == before


def test_dict_policy():
    model = nn.ModuleDict({"encoder": nn.ModuleList([mlp(), mlp()]), "head": nn.Linear(7, 2), "tail": nn.Linear(7, 2)})
    report = swap_(model, {r"re:encoder\.1\..*": INT8, "encoder.1.2": None, "head": [INT8]})
    assert [d.fqn for d in report.swapped] == ["encoder.1.0", "encoder.1.4", "head"]
    assert report.left == ()  # what no config concerns is not reported
    assert type(model["encoder"][1][2]) is type(model["tail"]) is nn.Linear


def test_default_policy_with_exception():
    model = mlp()
    report = swap_(model, {"_default": INT8, "4": None})
    assert [d.fqn for d in report.swapped] == ["0", "2"]


@pytest.mark.parametrize("config", ["int8", lamina.Int8Dynamic, 3, [None]])
def test_a_wrong_config_changes_nothing(config):
    model = mlp()
    with pytest.raises((TypeError, ValueError)):
        swap_(model, config)
    assert not [m for m in model.modules() if isinstance(m, Int8Linear)]


def test_a_wrong_entry_of_a_policy_changes_nothing():
    model = mlp()
    with pytest.raises(TypeError, match="is no lamina config"):
        swap_(model, {"0": INT8, "4": "int8"})
    assert not [m for m in model.modules() if isinstance(m, Int8Linear)]


# -- sharing


def test_a_module_used_twice_stays_shared():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = self.first
            self.inner = nn.Sequential(self.first)

        def forward(self, x):
            return self.inner(self.second(self.first(x)))

    model, x = Twice(), torch.randn(3, 6)
    report = swap_(model, INT8)
    assert [d.fqn for d in report.decisions] == ["first"]
    assert isinstance(model.first, Int8Linear)
    assert model.first is model.second is model.inner[0]
    layer = model.first
    assert_exact(model(x), layer(layer(layer(x))))


def test_tied_weights_keep_the_embedding():
    """An output layer that shares its Parameter with an embedding: the embedding keeps its floats."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 16)
            self.head = nn.Linear(16, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    model, tokens = Tied(), torch.arange(10)
    before = model.embed.weight.detach().clone()
    expected = model(tokens)
    report = swap_(model, INT8)
    size = sum(buffer.nbytes for buffer in model.head.buffers())
    assert decision(report, "head").reason == (
        f"replaced as asked; embed keeps the weight it shared, so that memory grows by {size / 1e6:.1f} MB"
    )
    assert isinstance(model.head, Int8Linear)
    assert_exact(model.embed.weight.detach(), before)
    assert_lossy(model(tokens), expected, min_sqnr_db=INT8_LAYER_SQNR_DB)
    with torch.no_grad():
        model.embed.weight.zero_()  # the int8 layer has a copy of its own
    assert model.head.weight.abs().max() > 0


def test_two_layers_with_one_weight():
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    b.weight = a.weight
    model, x = nn.Sequential(a, b), torch.randn(4, 8)
    report = swap_(model, INT8)
    assert len(report.swapped) == 2
    assert (
        decision(report, "0").reason == "replaced as asked; it shared its weight with 1 and has a copy of its own now"
    )
    assert_exact(model[0].weight, model[1].weight)
    assert model(x).shape == (4, 8)


# -- what is left alone, and why


def test_a_model_that_is_a_linear():
    model = nn.Linear(4, 3)
    report = swap_(model, INT8)
    assert type(model) is nn.Linear
    left_because(report, "", "it is the model itself")
    assert "(model)" in str(report)


def test_swapping_twice_changes_nothing():
    model, x = mlp(), torch.randn(3, 20)
    swap_(model, INT8)
    layers, y = list(model), model(x)
    report = swap_(model, INT8)
    assert all(a is b for a, b in zip(model, layers, strict=True))
    assert report.swapped == ()
    assert_exact(model(x), y)


def test_a_model_without_layers_of_interest():
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU())
    report = swap_(model, INT8)
    assert report.decisions == ()
    assert str(report).startswith("0 of 0 layers replaced")


def test_subclasses_of_linear():
    class Shouting(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Shouting(4, 4), nn.Linear(4, 4))
    report = swap_(model, INT8)
    left_because(report, "0", "Shouting is a subclass of nn.Linear and may compute something else")
    assert type(model[0]) is Shouting
    assert type(model[1]) is Int8Linear


def test_lazy_linear():
    model = nn.Sequential(nn.LazyLinear(4))
    left_because(swap_(model, INT8), "0", "LazyLinear")


def test_parametrized_linear():
    class Symmetric(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).mT

    model = nn.Sequential(nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    x = torch.randn(2, 4)
    y = model(x)
    left_because(swap_(model, INT8), "0", "its weight is parametrized, and is computed anew at every call")
    assert_exact(model(x), y)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_normed_weights(norm):
    model = nn.Sequential(norm(nn.Linear(4, 4))).eval()
    x = torch.randn(2, 4)
    y = model(x)
    assert len(swap_(model, INT8).left) == 1
    assert_exact(model(x), y)


def test_pruned_linear():
    """torch's pruning computes the weight in a hook before each forward."""
    model = nn.Sequential(nn.Linear(4, 4))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    left_because(swap_(model, INT8), "0", "hooks")


def with_forward_hook(layer):
    layer.register_forward_hook(lambda module, args, output: output + 1)


def with_pre_hook(layer):
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def with_kwargs_hook(layer):
    layer.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)


def with_backward_hook(layer):
    layer.register_full_backward_hook(lambda module, gi, go: None)


def with_backward_pre_hook(layer):
    layer.register_full_backward_pre_hook(lambda module, go: None)


@pytest.mark.parametrize(
    "hook", [with_forward_hook, with_pre_hook, with_kwargs_hook, with_backward_hook, with_backward_pre_hook]
)
def test_layers_with_hooks(hook):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    hook(model[0])
    report = swap_(model, INT8)
    left_because(report, "0", "it has hooks, which a replacement would lose")
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is Int8Linear


def test_a_forward_set_on_the_instance():
    """Some libraries patch module.forward; a replacement would silently drop the patch."""
    model = nn.Sequential(nn.Linear(4, 4))
    layer = model[0]
    layer.forward = lambda x: F.linear(x, layer.weight) * 3
    x = torch.randn(2, 4)
    y = model(x)
    report = swap_(model, INT8)
    assert len(report.left) == 1
    assert_exact(model(x), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes(dtype):
    model = mlp().to(dtype)
    before = copy.deepcopy(model.state_dict())
    report = swap_(model, INT8)
    assert report.swapped == ()
    left_because(report, "0", f"the weight is {dtype}, and int8 kernels take float32 and bfloat16")
    for name, tensor in model.state_dict().items():
        assert_exact(tensor, before[name])


def test_other_devices():
    model = nn.Sequential(nn.Linear(4, 4, device="meta"))
    left_because(swap_(model, INT8), "0", "the weight is on meta, and int8 kernels run on the CPU and on GPUs")
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad):
    model = mlp()
    with torch.no_grad():
        model[2].weight[4, 3] = bad
    before = copy.deepcopy(model.state_dict())
    report = swap_(model, INT8)
    left_because(report, "2", "output channel 4 has a NaN or infinite weight")
    assert [d.fqn for d in report.swapped] == ["0", "4"]
    assert_exact(model.state_dict()["2.weight"], before["2.weight"])


def test_too_many_inputs_for_exact_sums():
    model = nn.Sequential(nn.Linear(133145, 1))
    left_because(swap_(model, INT8), "0", "int32 sums are exact only up to 133144")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("fast_path", [False, True])
@pytest.mark.parametrize("fqn", ["layers.0.linear2", "layers.1.self_attn.in_proj", "layers.0.self_attn.out_proj"])
def test_a_part_of_torchs_attention_layers(fqn, fast_path):
    """They read the weights of their parts, so that what is around a quantized one becomes lamina's; and only that."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2), "head": nn.Linear(16, 3)}).eval()
    encoder, fqn, x = model["encoder"], f"encoder.{fqn}", torch.randn(2, 5, 16)
    padding = torch.arange(5) >= torch.tensor([5, 3])[:, None]
    with torch.set_grad_enabled(not fast_path):
        before, before_padded = encoder(x), encoder(x, src_key_padding_mask=padding)
        report = swap_(model, {fqn: INT8})
        assert [d.fqn for d in report.swapped] == [fqn]
        ours = {name for name, module in model.named_modules() if type(module).__module__.startswith("lamina")}
        around = {".".join(fqn.split(".")[:n]) for n in range(1, fqn.count(".") + 2)} - {"encoder.layers"}
        assert ours == around
        for found, expected in (encoder(x), before), (encoder(x, src_key_padding_mask=padding), before_padded):
            assert_lossy(found, expected, min_sqnr_db=INT8_MODEL_SQNR_DB)
            assert not torch.equal(found, expected)


def test_all_of_a_transformer():
    model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True).eval()
    x, y = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    before = model(x, y)
    linears = {f"encoder.layers.0.{name}" for name in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")}
    linears |= {name.replace("encoder", "decoder") for name in linears}
    linears |= {f"decoder.layers.0.multihead_attn.{name}" for name in ("in_proj", "out_proj")}
    for configs in [INT8], [INT8, lamina.FusedAttention()]:
        swapped = copy.deepcopy(model)
        report = swap_(swapped, configs)
        assert {d.fqn for d in report.swapped if d.now.startswith("Int8Linear")} == linears
        assert report.left == ()
        assert_lossy(swapped(x, y), before, min_sqnr_db=INT8_MODEL_SQNR_DB)
    assert decision(report, "decoder.layers.0.multihead_attn.in_proj").was == "Linear(16, 48)"
    assert len(report.swapped) == len(linears) + 6


def test_subclasses_of_torchs_attention_layers_are_left():
    class Other(nn.TransformerEncoderLayer):
        pass

    model = nn.ModuleList([Other(16, 2, 32), nn.MultiheadAttention(16, 2)])
    report = swap_(model, [lamina.FusedAttention(), INT8])
    left_because(report, "0", "Other is a subclass of nn.TransformerEncoderLayer and may compute something else")
    left_because(report, "0.self_attn", "its parent Other reads its weights in evaluation instead of calling it")
    left_because(report, "0.linear1", "its parent Other reads the weight itself instead of calling the layer")
    assert decision(report, "1").now == "lamina MultiheadAttention"
    again = swap_(model, lamina.FusedAttention())
    left_because(again, "1", "it already uses lamina's attention")


def test_attention_with_keys_of_another_width_keeps_its_input_projections():
    model = nn.ModuleList([nn.MultiheadAttention(16, 2, kdim=8)])
    report = swap_(model, INT8)
    assert [d.fqn for d in report.decisions] == ["0.out_proj"]
    q, k = torch.randn(3, 1, 16), torch.randn(4, 1, 8)
    assert model[0](q, k, torch.randn(4, 1, 16))[0].shape == q.shape


# -- linear layers of other types


class Square(nn.Module):
    """Of one square transformers Conv1D, whose float weight [in, out] nothing but its values tells from [out, in]."""

    def __init__(self):
        super().__init__()
        self.proj = pytest.importorskip("transformers").pytorch_utils.Conv1D(24, 24)
        nn.init.normal_(self.proj.bias)

    def forward(self, x):
        return self.proj(x)


def test_conv1d_of_transformers():
    model, x = Square().eval(), torch.randn(2, 5, 24)
    expected = model(x)
    report = swap_(model, INT8)
    assert decision(report, "proj") == lamina.LayerDecision(
        "proj", "Conv1D(24, 24)", "Int8Linear(24, 24)", "replaced as asked"
    )
    assert_lossy(model(x), expected, min_sqnr_db=INT8_LAYER_SQNR_DB)


def test_a_float_conv1d_weight_is_not_taken_for_a_transposed_one():
    original = Square()
    model = copy.deepcopy(original)
    swap_(model, INT8)
    codes, other = model.state_dict(), Square()
    swap_(other, INT8)
    copied = copy.deepcopy(other)
    other.load_state_dict(original.state_dict())
    copied.load_state_dict(codes)
    x = torch.randn(3, 24)
    assert_exact(other(x), model(x))
    assert_exact(copied(x), model(x))


def test_subclasses_of_conv1d_are_left():
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D

    class Louder(conv1d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Louder(4, 4))
    assert swap_(model, INT8).swapped == ()
    assert type(model[0]) is Louder


# -- layers that torch.compile holds on to


def test_compiled_layers_are_left():
    model = nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Linear(4, 4), backend="eager"), nn.Linear(4, 4))
    model[0].compile(backend="eager")
    x = torch.randn(2, 4)
    expected = model[1](model[0](x))
    report = swap_(model, INT8)
    left_because(report, "0", "it is compiled by torch.compile; swap first, then compile")
    left_because(report, "1._orig_mod", "torch.compile holds on to it; swap first, then compile")
    assert_exact(model[1](model[0](x)), expected)
    assert type(model[2]) is Int8Linear


def test_layers_inside_a_compiled_block():
    """The compiled block calls its children by name: it sees the new ones, also where it ran before."""
    torch._dynamo.reset()
    model, x = torch.compile(mlp(), backend="eager"), torch.randn(3, 20)
    expected = model(x)
    assert len(swap_(model, INT8).swapped) == 3
    assert_lossy(model(x), expected, min_sqnr_db=INT8_MODEL_SQNR_DB)
    assert not torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_scripted_models_are_left():
    """A scripted module holds its own copies of its children; nothing in it is an nn.Linear."""
    model, x = nn.Sequential(torch.jit.script(mlp()), nn.Linear(7, 3)), torch.randn(3, 20)
    expected = model[0](x)
    assert [d.fqn for d in swap_(model, INT8).swapped] == ["1"]
    assert_exact(model[0](x), expected)


# -- what stays


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_kept(training):
    model = mlp().train(training)
    model[2].train(not training)
    swap_(model, INT8)
    assert [m.training for m in model] == [training, training, not training, training, training]


def test_dtype_of_bias_and_outputs_is_kept():
    model = mlp().bfloat16()
    swap_(model, INT8)
    assert model[0].bias.dtype == torch.bfloat16
    assert model(torch.randn(3, 20, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_layers_without_bias():
    model = nn.Sequential(nn.Linear(6, 5, bias=False))
    x = torch.randn(4, 6)
    y = model(x)
    swap_(model, INT8)
    assert model[0].bias is None
    assert_lossy(model(x), y, min_sqnr_db=INT8_LAYER_SQNR_DB)


@pytest.mark.parametrize(("n", "k"), [(0, 4), (4, 0), (1, 1)])
def test_layers_of_odd_sizes(n, k):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "reset_parameters", lambda self: None)  # it warns about empty weights
        model = nn.Sequential(nn.Linear(k, n))
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[0].bias.fill_(0.25)
    x = torch.ones(3, k)
    expected = model(x)
    swap_(model, INT8)
    assert_exact(model(x), expected)


def test_float_originals_are_not_changed_and_not_kept_alive():
    import gc
    import weakref

    model = mlp()
    weight = model[0].weight
    copied, reference = weight.detach().clone(), weakref.ref(model[0])
    swap_(model, INT8)
    assert_exact(weight.detach(), copied)
    gc.collect()
    assert reference() is None


def test_reports_are_values():
    report = swap_(mlp(), INT8)
    assert report == swap_(mlp(), INT8)
    with pytest.raises(AttributeError):
        report.decisions = ()


# -- attention of the reference models


def test_reference_attention_is_replaced():
    model = nn.ModuleDict({"attention": ReferenceAttention(), "fc": nn.Linear(4, 4)}).eval()
    q, k, v = (torch.randn(2, 3, 9, 16) for _ in range(3))
    expected = model["attention"](q, k, v, is_causal=True)
    report = swap_(model, lamina.FusedAttention())
    assert [d.fqn for d in report.decisions] == ["attention"]
    assert type(model["attention"]) is lamina.nn.ScaledDotProductAttention
    assert not model["attention"].training
    # Not worse than float32 by two digits: this is about the wiring, tests/ops/test_attention.py about the numbers.
    assert_lossy(model["attention"](q, k, v, is_causal=True), expected, min_sqnr_db=110)


def test_both_configs_at_once():
    model = nn.ModuleDict({"attention": ReferenceAttention(), "fc": nn.Linear(4, 4)})
    report = swap_(model, [lamina.FusedAttention(), INT8])
    assert [d.fqn for d in report.swapped] == ["attention", "fc"]
    assert swap_(model, [INT8, lamina.FusedAttention()]).swapped == ()


def test_attention_with_hooks_is_left():
    model = nn.Sequential(ReferenceAttention())
    with_forward_hook(model[0])
    left_because(swap_(model, lamina.FusedAttention()), "0", "hooks")


# -- configs that see the whole model first


def test_a_preparer_is_asked_once_with_all_configs_of_its_type(monkeypatch):
    import dataclasses

    from lamina import swap

    @dataclasses.dataclass(frozen=True)
    class Looks(lamina.configs.Config):
        name: str

    @dataclasses.dataclass(frozen=True)
    class Looked(lamina.configs.Config):
        name: str

    calls = []

    def look(model, asked):
        calls.append((model, {item.name: [site.fqn for site in sites if site.fqn] for item, sites in asked.items()}))
        return {item: Looked(item.name) for item in asked}

    def judge(site, config):
        return f"seen by {config.name}" if isinstance(site.module, nn.Linear) else None

    monkeypatch.setitem(swap._PREPARERS, Looks, look)
    monkeypatch.setitem(swap._HANDLERS, Looked, judge)
    model = mlp()
    report = swap_(model, {"0": Looks("a"), "re:[234]": Looks("b")})
    assert calls == [(model, {"a": ["0"], "b": ["2", "3", "4"]})]
    left_because(report, "0", "seen by a")
    left_because(report, "4", "seen by b")
    swap_(model, INT8)
    assert len(calls) == 1
