"""lamina.nn.MultiheadAttention and the Transformer layers: every argument of torch's classes, in every container.

The yardstick is the torch class with the same parameters, the truth the same in float64.
"""

import copy
import itertools

import pytest
import torch
from tolerances import INT8_MODEL_SQNR_DB, assert_composite, assert_exact, assert_lossy
from torch import Tensor, nn
from torch.nn import functional as F

import lamina
from lamina.nn import MultiheadAttention, TransformerDecoderLayer, TransformerEncoder, TransformerEncoderLayer

# torch's classes say so of nested tensors and of layers whose options keep them from using them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
]

E, H = 16, 4


def randomized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def as_double(value):
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return copy.deepcopy(value).double() if isinstance(value, nn.Module) else value


def compare(ours: nn.Module, theirs: nn.Module, *args, **kwargs) -> None:
    """Outputs, and where they train the gradients of all parameters, against torch's class."""
    double = as_double(theirs)
    calls = [
        (ours, args, kwargs),
        (theirs, args, kwargs),
        (double, [as_double(a) for a in args], {name: as_double(v) for name, v in kwargs.items()}),
    ]
    results = []
    for module, positional, named in calls:
        output = module(*positional, **named)
        tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if t is not None]
        if torch.is_grad_enabled():
            module.zero_grad()
            sum(t.square().sum() for t in tensors).backward()
            tensors += [p.grad for p in module.parameters() if p.grad is not None]
        results.append([t.detach() for t in tensors])
        module.zero_grad()
    assert len(results[0]) == len(results[1]) == len(results[2])
    for actual, eager, truth in zip(*results, strict=True):
        assert actual.shape == eager.shape
        floor = 4 * torch.finfo(actual.dtype).eps * max(truth.abs().max().item(), 1.0)
        assert_composite(actual, eager, truth, floor=floor)


def masks(kind: str, batch: int, target: int, source: int) -> Tensor | None:
    if kind == "none":
        return None
    shape = (target, source) if kind[0] == "2" else (batch * H, target, source)
    mask = torch.rand(shape) < 0.3 if kind.endswith("bool") else torch.randn(shape)
    if mask.dtype == torch.bool:
        mask[..., 0] = False  # a query without keys is NaN in torch
    return mask


def padding(kind: str, batch: int, source: int) -> Tensor | None:
    if kind == "none":
        return None
    mask = torch.arange(source) >= torch.tensor([source - row for row in range(batch)])[:, None]
    return mask if kind == "bool" else torch.randn(batch, source).masked_fill(mask, float("-inf"))


# -- MultiheadAttention

KINDS = [{}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 12, "vdim": 20}]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_argument_of_attention(kind, batch_first, train):
    theirs = randomized(nn.MultiheadAttention(E, H, batch_first=batch_first, **kind)).train(train)
    ours = MultiheadAttention.from_float(theirs)
    q, k, v = torch.randn(2, 5, E), torch.randn(2, 7, kind.get("kdim", E)), torch.randn(2, 7, kind.get("vdim", E))
    if not batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    for mask, pad, weights in itertools.product(
        ("none", "2bool", "3bool", "2float", "3float"), ("none", "bool", "float"), (None, "mean", "heads")
    ):
        with torch.set_grad_enabled(train):
            compare(
                ours,
                theirs,
                q,
                k,
                v,
                key_padding_mask=padding(pad, 2, 7),
                attn_mask=masks(mask, 2, 5, 7),
                need_weights=weights is not None,
                average_attn_weights=weights == "mean",
            )


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("same", ["self", "key is value", "none"])
@pytest.mark.parametrize("dims", [2, 3])
def test_inputs_that_are_one_tensor(dims, same, grad):
    theirs = randomized(nn.MultiheadAttention(E, H, batch_first=True)).eval()
    q, k, v = (torch.randn(2, 6, E)[: dims - 1].reshape((2, 6, E)[3 - dims :]) for _ in range(3))
    inputs = {"self": (q, q, q), "key is value": (q, k, k), "none": (q, k, v)}[same]
    with torch.set_grad_enabled(grad):
        for need_weights in (False, True):
            compare(MultiheadAttention.from_float(theirs), theirs, *inputs, need_weights=need_weights)


@pytest.mark.parametrize("pad", ["none", "bool"])
def test_is_causal_is_a_hint(pad):
    theirs = randomized(nn.MultiheadAttention(E, H, batch_first=True)).eval()
    x = torch.randn(2, 6, E)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    with torch.no_grad():
        for need_weights in (False, True):
            compare(
                MultiheadAttention.from_float(theirs),
                theirs,
                x,
                x,
                x,
                attn_mask=mask,
                key_padding_mask=None if pad == "none" else padding("float", 2, 6),
                is_causal=True,
                need_weights=need_weights,
            )


def test_a_query_without_keys_gives_zeros():
    layer = randomized(MultiheadAttention(E, H, batch_first=True, bias=False)).eval()
    x = torch.randn(2, 5, E)
    padded = torch.zeros(2, 5, dtype=torch.bool)
    padded[1] = True
    for need_weights in (False, True):
        y, weights = layer(x, x, x, key_padding_mask=padded, need_weights=need_weights)
        assert_exact(y[1], torch.zeros(5, E))
        assert y[0].isfinite().all()
    assert_exact(weights[1], torch.zeros(5, 5))


@pytest.mark.parametrize("grad", [False, True])
def test_nan_in_padding_stays_there(grad):
    layer = randomized(TransformerEncoderLayer(E, H, 32, batch_first=True)).eval()
    x = torch.randn(2, 6, E)
    padded = torch.zeros(2, 6, dtype=torch.bool)
    padded[1, 4:] = True
    with torch.set_grad_enabled(grad):
        expected = layer(x, src_key_padding_mask=padded)
        x[padded] = float("nan")
        if not grad:  # torch's op multiplies what it masks
            assert_exact(layer(x, src_key_padding_mask=padded)[~padded], expected[~padded])


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"is_causal": True}, "Need attn_mask if specifying the is_causal hint"),
        ({"attn_mask": torch.zeros(3, 3)}, "The shape of the 2D attn_mask"),
        ({"key_padding_mask": torch.zeros(2, 9, dtype=torch.bool)}, "[Kk]ey.padding.mask|shape|expected"),
    ],
    ids=["causal", "mask", "padding"],
)
def test_torchs_errors(kwargs, words):
    layer, x = MultiheadAttention(E, H, batch_first=True), torch.randn(2, 5, E)
    with pytest.raises((RuntimeError, AssertionError), match=words):
        layer(x, x, x, need_weights=False, **kwargs)


def test_wrong_sizes_are_torchs_errors():
    layer = MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(AssertionError, match="embedding dimension"):
        layer(*[torch.randn(2, 5, E + 1)] * 3)
    with pytest.raises(ValueError, match="greater than 0"):
        MultiheadAttention(0, 1)


def test_dropout_drops_weights_in_training_only():
    layer = randomized(MultiheadAttention(E, H, dropout=0.5, batch_first=True))
    x = torch.randn(2, 5, E)
    _, weights = layer(x, x, x, average_attn_weights=False)
    assert 0.2 < (weights == 0).float().mean().item() < 0.8
    torch.manual_seed(1)
    first = layer(x, x, x, need_weights=False)[0]
    torch.manual_seed(1)
    assert_exact(layer(x, x, x, need_weights=False)[0], first)
    assert not torch.equal(layer(x, x, x, need_weights=False)[0], first)
    layer.eval()
    assert_exact(layer(x, x, x, need_weights=False)[0], layer(x, x, x, need_weights=False)[0])


# -- nested input


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("norm_first", [False, True])
def test_nested_input(norm_first, layout, grad):
    layer = randomized(TransformerEncoderLayer(E, H, 32, norm_first=norm_first, batch_first=True)).eval()
    rows = [torch.randn(n, E) for n in (5, 1, 3)]
    nested = torch.nested.nested_tensor(rows, layout=layout, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        for module in (layer, lambda x: layer.self_attn(x, x, x, need_weights=False)[0]):
            output = module(nested)
            assert output.is_nested
            assert output.layout == layout
            for row, found in zip(rows, output.unbind(), strict=True):
                expected = module(row[None])[0]
                assert_composite(found, expected, expected.double(), floor=1e-5)
    if grad:
        sum(row.sum() for row in layer(nested).unbind()).backward()
        assert nested.grad.is_nested


def test_nested_input_with_weights():
    layer = randomized(MultiheadAttention(E, H, batch_first=True)).eval()
    rows = [torch.randn(n, E) for n in (5, 3)]
    nested = torch.nested.nested_tensor(rows)
    _, weights = layer(nested, nested, nested)
    _, expected = layer(rows[1][None], rows[1][None], rows[1][None])
    assert weights.shape == (2, 5, 5)
    assert_composite(weights[1, :3, :3], expected[0], expected[0].double(), floor=1e-6)
    assert_exact(weights[1, :, 3:], torch.zeros(5, 2))


# -- layers and containers


ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "function": F.silu,
    "module": nn.Tanh(),
    "lambda": lambda x: x.clamp(-1, 2),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_layers(bias, norm_first, batch_first, activation, grad):
    options = {
        "dim_feedforward": 24,
        "dropout": 0.0,
        "activation": ACTIVATIONS[activation],
        "layer_norm_eps": 1e-3,
        "norm_first": norm_first,
        "batch_first": batch_first,
        "bias": bias,
    }
    src, tgt = torch.randn(2, 6, E), torch.randn(2, 5, E)
    if not batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    encoder = randomized(nn.TransformerEncoderLayer(E, H, **options)).train(grad)
    decoder = randomized(nn.TransformerDecoderLayer(E, H, **options)).train(grad)
    pad, additive = padding("bool", 2, 6), padding("float", 2, 6)
    with torch.set_grad_enabled(grad):
        ours = TransformerEncoderLayer.from_float(encoder)
        compare(ours, encoder, src)
        compare(ours, encoder, src, src_key_padding_mask=pad)
        compare(ours, encoder, src, src_mask=masks("3bool", 2, 6, 6), src_key_padding_mask=pad)
        ours = TransformerDecoderLayer.from_float(decoder)
        compare(ours, decoder, tgt, src)
        compare(ours, decoder, tgt, src, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=additive)
        compare(ours, decoder, tgt, src, tgt_mask=causal, memory_mask=masks("2float", 2, 5, 6))


@pytest.mark.parametrize("ours", [MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer])
def test_state_dict_is_torchs(ours):
    layer = randomized(ours(E, H))
    theirs = layer._torch(E, H)
    assert list(theirs.state_dict()) == list(layer.state_dict())
    assert [n for n, _ in theirs.named_parameters()] == [n for n, _ in layer.named_parameters()]
    theirs.load_state_dict(layer.state_dict())
    back = ours(E, H)
    back.load_state_dict(theirs.state_dict())
    for name, tensor in back.state_dict().items():
        assert_exact(tensor, layer.state_dict()[name], name)


@pytest.mark.parametrize("ours", [MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer])
def test_from_float_shares_parameters_and_takes_no_subclass(ours):
    theirs = ours._torch(E, H).eval()
    layer = ours.from_float(theirs)
    assert type(theirs) is ours._torch
    assert type(layer) is ours
    assert not layer.training
    assert [p.data_ptr() for p in layer.parameters()] == [p.data_ptr() for p in theirs.parameters()]
    layer.train()
    assert not any(module.training for module in theirs.modules())

    class Other(ours._torch):
        pass

    with pytest.raises(TypeError, match=f"expected nn.{ours._torch.__name__}, got Other"):
        ours.from_float(Other(E, H))


def test_deepcopy_and_double():
    layer = randomized(TransformerEncoderLayer(E, H, batch_first=True)).eval()
    x = torch.randn(2, 5, E)
    assert_exact(copy.deepcopy(layer)(x), layer(x))
    assert layer.double()(x.double()).dtype == torch.float64


def transformer(**kwargs) -> nn.Transformer:
    return randomized(nn.Transformer(E, H, 2, 2, 32, batch_first=True, dropout=0.0, **kwargs))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("pad", ["none", "bool", "float"])
def test_in_torchs_containers(pad, grad):
    """nn.Transformer with lamina's layers handed in, and the same made by swap_."""
    theirs = transformer().train(grad)
    swapped = copy.deepcopy(theirs)
    report = lamina.swap_(swapped, lamina.FusedAttention())
    assert {d.now for d in report.decisions} == {
        "lamina TransformerEncoder",
        "lamina TransformerEncoderLayer",
        "lamina TransformerDecoderLayer",
        "lamina MultiheadAttention",
    }
    handed = nn.Transformer(
        E,
        H,
        batch_first=True,
        custom_encoder=nn.TransformerEncoder(
            TransformerEncoderLayer(E, H, 32, 0.0, batch_first=True), 2, nn.LayerNorm(E)
        ),
        custom_decoder=nn.TransformerDecoder(
            TransformerDecoderLayer(E, H, 32, 0.0, batch_first=True), 2, nn.LayerNorm(E)
        ),
    ).train(grad)
    handed.load_state_dict(theirs.state_dict())
    src, tgt = torch.randn(3, 6, E), torch.randn(3, 5, E)
    masked = padding(pad, 3, 6)
    if pad == "float":
        masked = masked.masked_fill(masked.isfinite(), 0.0)
    kwargs = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5),
        "src_key_padding_mask": masked,
        "memory_key_padding_mask": masked,
    }
    with torch.set_grad_enabled(grad):
        for ours in (swapped, handed):
            compare(ours, theirs, src, tgt, **kwargs)
            # Zeros and -inf: torch's fast path takes every other number of an additive mask for -inf.
            compare(ours, theirs, src, tgt, src_mask=masks("2bool", 3, 6, 6), **kwargs)


@pytest.mark.parametrize("config", [lamina.FusedAttention(), lamina.Int8Dynamic()], ids=["fused", "int8"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_of_an_encoder_comes_out_as_in_torch(side, config):
    """As zeros where it is at the end, for quantized layers too."""
    theirs = nn.TransformerEncoder(randomized(nn.TransformerEncoderLayer(E, H, 32, batch_first=True)), 2).eval()
    ours = copy.deepcopy(theirs)
    lamina.swap_(ours, config)
    x, padded = torch.randn(3, 6, E), padding("bool", 3, 6)
    if side == "left":
        padded = padded.flip(1)
    with torch.no_grad():
        expected = theirs(x, src_key_padding_mask=padded)
        found = ours(x, src_key_padding_mask=padded)
        assert (expected[padded] == 0).all() == (side == "right")
        assert_lossy(found, expected, min_sqnr_db=INT8_MODEL_SQNR_DB)
        assert_exact(found[padded] == 0, expected[padded] == 0)
    assert_lossy(ours(x, src_key_padding_mask=padded), theirs(x, src_key_padding_mask=padded), min_sqnr_db=20)


def test_the_fast_path_of_torch_is_not_taken(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("torch's own layer ran")

    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, batch_first=True), 2).eval()
    lamina.swap_(model, lamina.FusedAttention())
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", refuse)
    monkeypatch.setattr(torch, "_native_multi_head_attention", refuse)
    monkeypatch.setattr(F, "multi_head_attention_forward", refuse)
    with torch.no_grad():
        model(torch.randn(2, 5, E))
        model(torch.randn(2, 5, E), src_key_padding_mask=padding("bool", 2, 5))


@pytest.mark.parametrize("causal", [None, True, False])
def test_an_encoder_finds_the_causal_mask(causal, monkeypatch):
    seen = []
    model = TransformerEncoder(TransformerEncoderLayer(E, H, 32, batch_first=True), 1).eval()
    attention = lamina.nn.attention.drop_in_attention
    monkeypatch.setattr(
        lamina.nn.attention,
        "drop_in_attention",
        lambda *args, **kwargs: seen.append(kwargs["is_causal"]) or attention(*args, **kwargs),
    )
    x, mask = torch.randn(2, 5, E), nn.Transformer.generate_square_subsequent_mask(5)
    for form in (mask, mask.isinf(), torch.zeros(5, 5)):
        model(x, mask=form, is_causal=causal)
    assert seen == [causal is not False, causal is not False, causal is True]


# -- quantized projections


@pytest.mark.parametrize("kind", [lamina.Int8Dynamic(), lamina.Int8WeightOnly(), lamina.Int4WeightOnly()], ids=str)
@pytest.mark.parametrize("same", ["self", "key is value", "none"])
@pytest.mark.parametrize("size", [16, 64])
def test_quantized_projections(size, same, kind):
    """Thirds of a packed weight are views where they are whole panels of 64 channels."""
    theirs = randomized(nn.MultiheadAttention(size, 4, batch_first=True)).eval()
    ours = copy.deepcopy(theirs)
    report = lamina.swap_(ours, kind)
    assert [d.fqn for d in report.swapped] == ["in_proj", "out_proj"]
    dequantized = copy.deepcopy(theirs)
    dequantized.in_proj_weight = nn.Parameter(ours.in_proj_weight.clone())
    dequantized.out_proj.weight = nn.Parameter(ours.out_proj.weight.clone())
    q, k, v = (torch.randn(2, 6, size) for _ in range(3))
    inputs = {"self": (q, q, q), "key is value": (q, k, k), "none": (q, k, v)}[same]
    for need_weights in (False, True):
        with torch.no_grad():
            found = ours(*inputs, need_weights=need_weights)[0]
            assert_lossy(found, dequantized(*inputs)[0], min_sqnr_db=INT8_MODEL_SQNR_DB)


@pytest.mark.parametrize("activation", [F.relu, F.gelu, nn.ReLU(), F.silu], ids=["relu", "gelu", "ReLU", "silu"])
@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_the_activation_of_a_quantized_feed_forward(kind, activation):
    """Inside the op where it can be, and the same as behind it; hooks still see the layer called."""
    layer = kind(E, H, 32, activation=activation, batch_first=True, norm_first=True).eval()
    lamina.swap_(layer, [lamina.Int8Dynamic(), lamina.FusedAttention()])
    x, seen = torch.randn(2, 5, E), []
    with torch.no_grad():
        found = layer._ff_block(x)
        layer.linear1.register_forward_hook(lambda *args: seen.append(args))
        assert_lossy(found, layer._ff_block(x), min_sqnr_db=INT8_MODEL_SQNR_DB)
    assert len(seen) == 1


def test_gradients_pass_through_quantized_projections():
    model = randomized(nn.MultiheadAttention(E, H, batch_first=True))
    lamina.swap_(model, lamina.Int8Dynamic())
    q, k = torch.randn(2, 5, E, requires_grad=True), torch.randn(2, 6, E, requires_grad=True)
    model(q, k, k, need_weights=False)[0].sum().backward()
    assert q.grad.norm() > 0
    assert k.grad.norm() > 0


def test_float_weights_load_into_quantized_layers():
    theirs = transformer().eval()
    ours = copy.deepcopy(theirs)
    lamina.swap_(ours, lamina.Int8Dynamic())
    other = transformer().eval()
    expected = copy.deepcopy(other)
    lamina.swap_(expected, lamina.Int8Dynamic())
    src, tgt = torch.randn(2, 6, E), torch.randn(2, 5, E)
    ours.load_state_dict(other.state_dict(), strict=False)
    assert_exact(ours(src, tgt), expected(src, tgt))
    again = copy.deepcopy(theirs)
    lamina.swap_(again, lamina.Int8Dynamic())
    again.load_state_dict(ours.state_dict())
    assert_exact(again(src, tgt), expected(src, tgt))


@pytest.mark.parametrize("into", ["float", "quantized"])
@pytest.mark.parametrize("saved", ["float", "quantized"])
def test_save_and_load(saved, into, tmp_path):
    def make(kind: str) -> nn.Module:
        model = transformer().eval()
        if kind == "quantized":
            lamina.swap_(model, lamina.Int8Dynamic())
        return model

    model, fresh = make(saved), make(into)
    lamina.save(model, tmp_path / "m.safetensors")
    lamina.load_(fresh, tmp_path / "m.safetensors")
    src, tgt = torch.randn(2, 6, E), torch.randn(2, 5, E)
    if saved == "float" and into == "quantized":
        lamina.swap_(model, lamina.Int8Dynamic())
    assert_exact(fresh(src, tgt), model(src, tgt))
    assert_exact(copy.deepcopy(fresh)(src, tgt), model(src, tgt))


# -- what surrounds a layer


def test_autocast():
    theirs = randomized(nn.TransformerEncoderLayer(E, H, 32, batch_first=True)).eval()
    x = torch.randn(2, 5, E)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = TransformerEncoderLayer.from_float(theirs)(x), theirs(x)
    assert found.dtype == expected.dtype
    assert_lossy(found.float(), theirs(x), min_sqnr_db=30)


@pytest.mark.parametrize("config", [None, lamina.Int8Dynamic()], ids=["float", "int8"])
def test_compile_and_export(config):
    model = transformer().eval()
    lamina.swap_(model, lamina.FusedAttention())
    if config is not None:
        lamina.swap_(model, config)
    src, tgt = torch.randn(2, 6, E), torch.randn(2, 5, E)
    with torch.no_grad():
        expected = model(src, tgt)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(src, tgt)
        exported = torch.export.export(model, (src, tgt))
        names = {str(node.target) for node in exported.graph.nodes}
        assert "lamina.attention.default" in names
        assert_lossy(compiled, expected, min_sqnr_db=100)
        assert_lossy(exported.module()(src, tgt), expected, min_sqnr_db=100)


def test_vmap():
    layer = randomized(MultiheadAttention(E, H, batch_first=True)).eval()
    x = torch.randn(3, 2, 5, E)
    with torch.no_grad():
        found = torch.vmap(lambda x: layer(x, x, x, need_weights=False)[0])(x)
        assert_lossy(found, torch.stack([layer(y, y, y)[0] for y in x]), min_sqnr_db=100)


def test_hooks_fire_and_stay():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 32, batch_first=True), 1).eval()
    seen = []
    model.layers[0].self_attn.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    lamina.swap_(model, lamina.FusedAttention())
    model(torch.randn(2, 5, E))
    assert seen == [MultiheadAttention]
