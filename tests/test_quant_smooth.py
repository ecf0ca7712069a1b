"""quant.smooth_: the float model keeps its bits, int8 loses less, and what others read is left alone."""

import copy

import pytest
import torch
from tolerances import assert_exact, sqnr_db
from torch import nn
from torch.nn import functional as F

import lamina
from lamina.quant import SmoothReport, smooth_

INT8 = lamina.Int8Dynamic()


class PreNorm(nn.Module):
    """Norm -> two readers and a gate; ReLU, residual: what a pre-norm Transformer layer has, without attention."""

    def __init__(self, width: int = 32, norm: type[nn.Module] = nn.LayerNorm):
        super().__init__()
        self.norm = norm(width)
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        y = self.norm(x)
        return x + self.out(F.silu(self.a(y)) * self.b(y))


def outliers(norm: nn.Module, *readers: nn.Linear, factor: float = 40.0) -> None:
    """A few channels of the norm's output are much larger than the others, and count for no more."""
    with torch.no_grad():
        norm.weight[3::11] *= factor
        for reader in readers:
            reader.weight[:, 3::11] /= factor


def data(width: int = 32, count: int = 3) -> list[tuple[torch.Tensor]]:
    return [(torch.randn(4, 7, width),) for _ in range(count)]


def left_because(report: SmoothReport, source: str, reason: str) -> None:
    found = next(d for d in report.decisions if d.source == source)
    assert not found.folded
    assert reason in found.reason
    assert "\n" not in found.reason


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert_exact(tensor, before[name], name)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


# -- what it is for


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_int8_loses_less(norm):
    model = PreNorm(64, norm)
    outliers(model.norm, model.a, model.b)
    examples, x = data(64), torch.randn(8, 7, 64)
    expected = model(x)
    plain, smoothed = copy.deepcopy(model), copy.deepcopy(model)
    report = smooth_(smoothed, examples)
    folded = next(d for d in report.folded if d.source == "norm")
    assert folded.layers == ("a", "b")
    assert folded.outlier_after < folded.outlier_before / 4
    assert_exact(smoothed(x), expected)
    lamina.swap_(plain, INT8)
    lamina.swap_(smoothed, INT8)
    assert sqnr_db(smoothed(x), expected) > sqnr_db(plain(x), expected) + 12


def test_static_int8_loses_less():
    model = PreNorm(64)
    outliers(model.norm, model.a, model.b)
    examples, x = data(64), torch.randn(8, 7, 64)
    expected = model(x)
    plain, smoothed = copy.deepcopy(model), copy.deepcopy(model)
    smooth_(smoothed, examples)
    for made in (plain, smoothed):
        lamina.swap_(made, lamina.Int8Static(examples))
    assert sqnr_db(smoothed(x), expected) > sqnr_db(plain(x), expected) + 12


def test_factors_are_those_of_the_paper():
    model, examples = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)), data(16)
    outliers(model[0], factor=30.0)
    before = copy.deepcopy(model)
    seen = torch.cat([before[0](x).flatten(0, -2) for (x,) in examples]).abs().amax(0)
    for alpha in (0.0, 0.3, 0.5, 1.0):
        model = copy.deepcopy(before)
        assert len(smooth_(model, examples, alpha).folded) == 1
        wanted = seen.log2() * alpha - before[1].weight.abs().amax(0).log2() * (1 - alpha)
        assert_exact(model[0].weight.detach(), (before[0].weight / wanted.round().exp2()).detach())
        assert_exact(model[1].weight.detach(), (before[1].weight * wanted.round().exp2()).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_float_outputs_keep_their_bits(dtype):
    model = PreNorm().to(dtype)
    outliers(model.norm)
    examples = [(x.to(dtype),) for (x,) in data()]
    expected = [model(*example) for example in examples]
    assert smooth_(model, examples).folded
    for example, before in zip(examples, expected, strict=True):
        assert_exact(model(*example), before)


def test_a_linear_that_feeds_another():
    """Through ReLU, a view, dropout and one side of a product."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.gate, self.last = (nn.Linear(12, 12) for _ in range(4))
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            y = self.down(self.dropout(torch.relu(self.up(x))).view(-1, 12))
            return self.last(y * self.gate(y.detach() * 0 + 1).sigmoid())

    model, examples = Net().eval(), data(12)
    expected = model(*examples[0])
    report = smooth_(model, examples)
    assert [(d.source, d.layers) for d in report.folded] == [("up", ("down",))]
    assert_exact(model(*examples[0]), expected)
    # down's output is read by the product, and by the product with zero: the second is seen.
    assert {d.source for d in report.left} == {"down"}


def test_inplace_relu_between_linears():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))
    expected = model(*(example := data(8)[0]))
    assert len(smooth_(model, [example]).folded) == 1
    assert_exact(model(*example), expected)


def test_a_norm_and_its_readers_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(self.norm(self.fc(self.norm(x))))

    model, examples = Twice(), data(8)
    with torch.no_grad():
        model.norm.weight[2] = 50.0
    expected = model(*examples[0])
    report = smooth_(model, examples)
    assert [d.source for d in report.folded] == ["norm"]
    assert_exact(model(*examples[0]), expected)


def test_transformers_norms_of_every_kind():
    """T5 and Llama have norms of their own, Gemma's multiplies by 1 + weight: none is known by name."""
    from transformers import GemmaConfig, GemmaModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    ids = torch.randint(0, 50, (2, 5))
    for model, folded in (
        (LlamaModel(LlamaConfig(vocab_size=50, **small)), 3),
        (GemmaModel(GemmaConfig(vocab_size=50, head_dim=8, num_key_value_heads=1, pad_token_id=0, **small)), 3),
        (GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)), 2),
    ):
        model.eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter)
        expected = model(input_ids=ids).last_hidden_state
        report = smooth_(model, [{"input_ids": ids}])
        assert len(report.folded) == folded, report
        # All are exact but 1 + weight, which is rounded once more.
        assert sqnr_db(model(input_ids=ids).last_hidden_state, expected) > 120


def test_post_norm_is_left_alone():
    from lamina.models.bert import BERT, BERTConfig

    model = BERT(BERTConfig(vocab=50, dim=16, layers=2, heads=2, ffn=32)).eval()
    before = state(model)
    report = smooth_(model, [(torch.randint(0, 50, (2, 6)),)])
    left_because(report, "layers.0.attention_norm", "its output is also read by aten.add")
    left_because(report, "layers.0.ffn_norm", "its output is also read by aten.add")
    # Only the last norm has no residual after it: the two heads read it.
    assert [(d.source, d.layers) for d in report.folded] == [("layers.1.ffn_norm", ("word_transform.0", "pooler.0"))]
    now = model.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, now[name])}
    assert changed <= {
        "layers.1.ffn_norm.weight",
        "layers.1.ffn_norm.bias",
        "word_transform.0.weight",
        "pooler.0.weight",
    }


# -- what is left alone, and why


class Reads(nn.Module):
    """A norm and a Linear; `also` is what else the model does with them."""

    def __init__(self, also):
        super().__init__()
        self.norm, self.fc, self.other = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.also = also

    def forward(self, x):
        y = self.norm(x)
        return self.also(self, x, y, self.fc(y))


OTHERS = {
    "output": (lambda m, x, y, z: (z, y), "its output is an output of the model"),
    "output_in_dict": (lambda m, x, y, z: {"a": z, "b": [y[0]]}, "its output is an output of the model"),
    "residual": (lambda m, x, y, z: z + y, "also read by aten.add"),
    "inplace": (lambda m, x, y, z: z + y.add_(1), "also read by aten.add_"),
    "sum": (lambda m, x, y, z: z * y.sum(), "also read by aten.sum"),
    "view": (lambda m, x, y, z: z[0] - y.transpose(0, 1)[:, 0], "also read by aten.sub"),
    "shape": (lambda m, x, y, z: m.other(y.transpose(-1, -2).reshape(-1, 8)) if y.shape[-2] == 8 else z, "read by"),
    "square": (lambda m, x, y, z: m.other(y * y), "also read by aten.mul"),
    "reciprocal": (lambda m, x, y, z: m.other(x / y), "also read by aten.div"),
    "functional": (lambda m, x, y, z: z + F.linear(y, m.other.weight), "also read by aten"),
    "numbers": (lambda m, x, y, z: z * y[0, 0, 0].item(), "also read by aten._local_scalar_dense"),
    "same_reader": (lambda m, x, y, z: z + m.fc(x), "fc, which reads it, also reads something else"),
    "weight": (lambda m, x, y, z: z * m.fc.weight.mean(), "its weight is also read by aten.mean"),
    "own_weight": (lambda m, x, y, z: z * m.norm.weight, "its weight is also read by aten.mul"),
    "int8": (None, "also read by lamina.int8_linear"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_reader_is_seen(name):
    also, reason = OTHERS[name]
    model = Reads(also or (lambda m, x, y, z: z + m.other(y)))
    if name == "int8":
        lamina.swap_(model, {"other": INT8})
    before = state(model)
    example = (torch.randn(2, 8, 8),)
    report = smooth_(model, [example])
    left_because(report, "norm", reason)
    assert report.folded == ()
    unchanged(model, before)


def test_every_input_is_watched():
    """The second input takes a path that the first does not."""
    model = Reads(lambda m, x, y, z: z + y if x.shape[0] > 2 else z)
    report = smooth_(model, [(torch.randn(2, 3, 8),), (torch.randn(3, 3, 8),)])
    left_because(report, "norm", "also read by aten.add")


def test_tied_weights():
    model = Reads(lambda m, x, y, z: z)
    model.other.weight = model.fc.weight
    left_because(smooth_(model, data(8)), "norm", "fc shares a parameter with another module")


def test_hooks():
    model = Reads(lambda m, x, y, z: z)
    handle = model.fc.register_forward_hook(lambda module, args, output: output + args[0])
    report = smooth_(model, data(8))
    assert not report.folded
    handle.remove()
    model.norm.register_forward_pre_hook(lambda module, args: None)
    left_because(smooth_(model, data(8)), "norm", "it has hooks")


def test_what_is_not_called_or_not_finite():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc, self.idle = nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x):
            return self.fc(self.norm(x))

    model = Unused()
    with torch.no_grad():
        model.norm.weight[1] = float("inf")
    before = state(model)
    report = smooth_(model, data(8))
    left_because(report, "idle", "not called by the calibration inputs")
    assert not report.folded
    unchanged(model, before)


def test_a_module_that_is_no_norm():
    model = nn.Sequential(nn.PReLU(8), nn.Linear(8, 4))
    report = smooth_(model, [(torch.randn(5, 8),)])
    assert not report.folded


def test_dead_channels_and_zero_columns():
    """A channel without activation or weight keeps its factor of one: no division by zero."""
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[2] = 0
        model[1].weight[:, 5] = 0
    example = data(8)[0]
    expected = model(*example)
    assert smooth_(model, [example]).folded
    assert_exact(model(*example), expected)
    assert all(bool(t.isfinite().all()) for t in model.state_dict().values())


def test_filter_fn():
    model = nn.Sequential(PreNorm(8), PreNorm(8))
    report = smooth_(model, data(8), filter_fn=lambda module, fqn: fqn.startswith("1"))
    left_because(report, "0.norm", "excluded by filter_fn")
    assert {d.source for d in report.folded} == {"1.norm", "1.b"}


# -- bad input


def test_what_is_no_calibration():
    model = PreNorm(8)
    with pytest.raises(ValueError, match=r"smooth_: alpha is 1.5, but must be between 0 and 1"):
        smooth_(model, data(8), alpha=1.5)
    with pytest.raises(ValueError, match="smooth_: calibration gave no inputs; it is empty, or a generator"):
        smooth_(model, [])
    with pytest.raises(TypeError, match="smooth_: calibration is a Tensor, but must be an iterable"):
        smooth_(model, torch.randn(3, 8))
    with pytest.raises(TypeError, match="must be a tuple of positional or a dict of keyword arguments, got Tensor"):
        smooth_(model, [torch.randn(3, 8)])
    with pytest.raises(TypeError, match="give example inputs"):
        smooth_(model, lamina.quant.calibrate(model, data(8)))


def test_a_model_that_raises_stays_as_it_was():
    model = PreNorm(8).train()
    before = state(model)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        smooth_(model, [*data(8), (torch.randn(2, 9),)])
    unchanged(model, before)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_mode_and_generator_are_kept():
    model = nn.Sequential(PreNorm(8), nn.Dropout(0.5)).train()
    model[0].norm.eval()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    examples = data(8)
    torch.manual_seed(5)
    smooth_(model, examples)
    assert_exact(torch.rand(3), expected)
    assert [m.training for m in model.modules()] == modes


def test_report_prints_a_table():
    model = Reads(lambda m, x, y, z: z + y)
    text = str(smooth_(nn.Sequential(PreNorm(8), model), data(8)))
    assert text.startswith("2 of 3 outputs smoothed")
    for word in ("0.norm", "0.a", "1.norm", "aten.add", "folded"):
        assert word in text
