"""LoRA: nothing changes at first, only adapters train, and what is merged comes out again."""

import copy

import pytest
import torch
from tolerances import INT8_LAYER_SQNR_DB, assert_exact, assert_lossy
from torch import nn
from torch.nn import functional as F

import lamina
from lamina.nn import Int4WeightOnlyLinear, Int8Linear, Int8WeightOnlyLinear, LoRALinear
from lamina.ops import unpack_int8_weight
from lamina.quant import add_lora_, dequantize_weight, load_lora_, merge_lora_, save_lora

INT8 = lamina.Int8Dynamic()


def bases() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {
        "float": nn.Linear(20, 30),
        "no_bias": nn.Linear(20, 30, bias=False),
        "int8": Int8Linear.from_float(nn.Linear(20, 30)),
        "bfloat16": nn.Linear(20, 30).bfloat16(),
        "int8_weight_only": Int8WeightOnlyLinear.from_float(nn.Linear(20, 30)),
        "int4": Int4WeightOnlyLinear.from_float(nn.Linear(20, 30)),
        "int8_bfloat16": Int8Linear.from_float(nn.Linear(20, 30).bfloat16()),
    }


def trained(layer: LoRALinear) -> LoRALinear:
    """As after training: B is no longer zero."""
    with torch.no_grad():
        layer.lora_b.normal_(std=0.05)
    return layer


def inputs_of(base: nn.Module) -> torch.Tensor:
    dtype = base.bias.dtype if base.bias is not None else torch.float32
    return torch.randn(7, 20).to(dtype)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 7))


# -- one layer


@pytest.mark.parametrize("kind", bases())
def test_at_first_it_is_its_base(kind):
    base = bases()[kind]
    x = inputs_of(base)
    expected = base(x)
    assert_exact(LoRALinear(base)(x), expected)


@pytest.mark.parametrize("kind", ["float", "no_bias", "int8"])
def test_the_update_is_the_papers(kind):
    base = bases()[kind]
    layer, x = trained(LoRALinear(base, rank=4, alpha=12)), torch.randn(5, 20)
    update = 12 / 4 * layer.lora_b.double() @ layer.lora_a.double()
    expected = base(x).double() + x.double() @ update.T
    assert_lossy(layer(x), expected, min_sqnr_db=120)
    assert_lossy(layer.update(), update, min_sqnr_db=120)
    assert layer.update().abs().max() > 0


@pytest.mark.parametrize("kind", bases())
def test_gradients_flow_to_the_input_and_the_adapter_only(kind):
    layer = trained(LoRALinear(bases()[kind]))
    x = inputs_of(layer.base).requires_grad_()
    layer(x).float().square().sum().backward()
    assert x.grad.abs().max() > 0
    assert layer.lora_a.grad.abs().max() > 0
    assert layer.lora_b.grad.abs().max() > 0
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_a", "lora_b"]
    assert all(p.grad is None for p in layer.base.parameters())


def test_the_gradient_over_an_int8_base_is_straight_through():
    layer = trained(LoRALinear(bases()["int8"], rank=3))
    x, grad = torch.randn(5, 20, requires_grad=True), torch.randn(5, 30)
    layer(x).backward(grad)
    assert_lossy(x.grad, grad @ (layer.weight + layer.update()).detach(), min_sqnr_db=100)


def test_dropout_is_for_the_update_in_training():
    layer = trained(LoRALinear(nn.Linear(20, 30), dropout=0.5))
    x = torch.randn(64, 20)
    layer.eval()
    assert_exact(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_looks_like_a_linear():
    base = nn.Linear(20, 30)
    layer = LoRALinear(base, rank=2)
    assert (layer.in_features, layer.out_features) == (20, 30)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert not LoRALinear(nn.Linear(4, 4).eval()).training
    assert "rank=2, alpha=16" in repr(layer)


def test_conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    layer, x = trained(LoRALinear(Conv1D(30, 20))), torch.randn(5, 20)
    y = layer(x)
    assert y.shape == (5, 30)
    layer.merge()
    assert_lossy(layer.eval()(x), y, min_sqnr_db=100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank is 0, but must be at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0, but must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"base": nn.Conv2d(1, 1, 1)}, "base is a Conv2d, but must be nn.Linear or a quantized one of lamina's"),
        ({"base": Int8Linear(4, 4, activation="gelu")}, "base applies gelu inside, but the update belongs before it"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoRALinear(**{"base": nn.Linear(4, 4), **arguments})


# -- merging


@pytest.mark.parametrize("kind", bases())
def test_merge_and_unmerge(kind):
    layer = trained(LoRALinear(bases()[kind])).eval()
    x = inputs_of(layer.base)
    before, weight = layer(x), layer.weight.clone()
    layer.merge()
    assert layer.merged
    layer.merge()  # once is enough
    # A float weight is rounded once more, an int8 one quantized anew.
    exact = {"float": 120, "no_bias": 120, "int4": 18}.get(kind, INT8_LAYER_SQNR_DB)
    assert_lossy(layer(x), before, min_sqnr_db=exact)
    assert not torch.equal(layer.weight, weight)
    layer.unmerge()
    layer.unmerge()
    assert_exact(layer.weight, weight)
    assert_exact(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_of_merging_into_int8_is_half_a_step(dtype):
    base = Int8Linear.from_float(nn.Linear(64, 32).to(dtype))
    wanted = dequantize_weight(unpack_int8_weight(base.packed_weight, 64), base.packed_weight.scale)
    layer = trained(LoRALinear(base))
    wanted = wanted + layer.update().detach()
    layer.merge()
    step = wanted.abs().amax(1, keepdim=True) / 127
    merged = dequantize_weight(unpack_int8_weight(base.packed_weight, 64), base.packed_weight.scale)
    assert ((merged - wanted).abs() <= 0.5001 * step).all()


def test_merged_layers_do_not_train_in_silence():
    layer = trained(LoRALinear(nn.Linear(4, 4)))
    layer.merge()
    with pytest.raises(RuntimeError, match=r"LoRALinear: the update is merged, so it cannot train; call unmerge\(\)"):
        layer(torch.randn(2, 4))
    with torch.no_grad():
        layer(torch.randn(2, 4))


@pytest.mark.parametrize("base", [nn.Linear(4, 4), Int8Linear(4, 4)], ids=["float", "int8"])
def test_an_update_with_nan_is_not_merged(base):
    layer = trained(LoRALinear(base))
    weight = layer.weight.clone()
    with torch.no_grad():
        layer.lora_a[0, 0] = float("nan")
    with pytest.raises(ValueError, match="LoRALinear: the update has NaN or infinity"):
        layer.merge()
    assert not layer.merged
    assert_exact(layer.weight, weight)


def test_merging_leaves_a_tied_embedding_alone():
    embedding, head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    head.weight = embedding.weight
    before = embedding.weight.detach().clone()
    layer = trained(LoRALinear(head))
    layer.merge()
    assert_exact(embedding.weight.detach(), before)
    layer.unmerge()
    assert head.weight is embedding.weight


# -- a whole model


@pytest.mark.parametrize("config", [None, INT8, lamina.Int4WeightOnly()], ids=["float", "int8", "int4"])
def test_add_lora(config):
    model, x = mlp(), torch.randn(4, 20)
    if config is not None:
        lamina.swap_(model, config)
    base = type(model[0])
    expected = model(x)
    report = add_lora_(model, rank=3, filter_fn=lambda module, fqn: fqn != "2")
    assert [d.fqn for d in report.swapped] == ["0", "4"]
    assert [(d.fqn, d.reason) for d in report.left] == [("2", "excluded by filter_fn")]
    assert_exact(model(x), expected)
    wanted = {f"{i}.lora_{part}" for i in (0, 4) for part in "ab"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    assert add_lora_(model).swapped[0].fqn == "2"  # what has an adapter keeps it
    assert type(model[0].base) is base


def test_training_over_an_int8_base():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(64, 20)
    target = torch.randint(0, 7, (64,))
    lamina.swap_(model, INT8)
    add_lora_(model, rank=4)
    frozen = {name: t.clone() for name, t in model.state_dict().items() if "lora" not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    for name, tensor in frozen.items():
        assert_exact(model.state_dict()[name], tensor, name)
    model.eval()
    y = model(x)
    merge_lora_(model)
    assert [type(m) for m in model] == [Int8Linear, nn.ReLU, Int8Linear, nn.ReLU, Int8Linear]
    assert_lossy(model(x), y, min_sqnr_db=INT8_LAYER_SQNR_DB - 10)


def test_int8_under_adapters():
    """The other order: adapters first, int8 bases afterwards."""
    model, x = mlp(), torch.randn(4, 20)
    add_lora_(model, rank=2)
    for index in (0, 2, 4):
        trained(model[index])
    expected = model(x)
    model[0].merge()
    lamina.swap_(model, INT8)
    assert all(isinstance(model[index].base, Int8Linear) for index in (0, 2, 4))
    assert_lossy(model.eval()(x), expected, min_sqnr_db=INT8_LAYER_SQNR_DB - 10)
    with pytest.raises(RuntimeError, match=r"LoRALinear: the base was exchanged after merge\(\)"):
        model[0].unmerge()


def test_a_module_used_twice_gets_one_adapter():
    fc = nn.Linear(6, 6)
    model = nn.Sequential(fc, nn.Tanh(), fc)
    add_lora_(model)
    assert isinstance(model[0], LoRALinear)
    assert model[0] is model[2]


def test_layers_read_by_torchs_attention_are_left():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    report = add_lora_(model)
    assert report.swapped == ()
    assert all("reads the weight itself" in d.reason or "is a parameter of its" in d.reason for d in report.left)


def test_an_error_in_filter_fn_changes_nothing():
    model = mlp()

    def breaks(module, fqn):
        if fqn == "4":
            raise KeyError("no such layer")
        return True

    with pytest.raises(KeyError):
        add_lora_(model, filter_fn=breaks)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, LoRALinear) for m in model)
    with pytest.raises(ValueError, match="rank is 0"):
        add_lora_(model, rank=0)


def test_a_model_that_is_a_linear():
    model = nn.Linear(4, 4)
    assert "it is the model itself" in add_lora_(model).left[0].reason


# -- files


def test_adapters_alone_are_saved(tmp_path):
    path = tmp_path / "adapters.safetensors"
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": mlp(), "head": nn.Linear(7, 2)})
    model.forward = lambda x: model["head"](model["body"](x))
    fresh, x = copy.deepcopy(model), torch.randn(3, 20)
    add_lora_(model, rank=2, alpha=6)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            trained(module)
    save_lora(model, path)
    sizes = [p.numel() for name, p in model.named_parameters() if "lora" in name]
    assert path.stat().st_size < 4 * sum(sizes) + 4000
    lamina.swap_(fresh, INT8)  # adapters trained over floats also fit an int8 base
    add_lora_(fresh, rank=2, alpha=1)
    load_lora_(fresh, path)
    for (name, tensor), (_, other) in zip(
        sorted((n, p) for n, p in fresh.named_parameters() if "lora" in n),
        sorted((n, p) for n, p in model.named_parameters() if "lora" in n),
        strict=True,
    ):
        assert_exact(tensor.detach(), other.detach(), name)
    assert fresh["head"].alpha == 6
    y = fresh["head"](fresh["body"](x))
    assert_lossy(y, model["head"](model["body"](x)), min_sqnr_db=25)


def test_files_that_do_not_fit_change_nothing(tmp_path):
    path = tmp_path / "adapters.safetensors"
    model = mlp()
    with pytest.raises(ValueError, match="save_lora: the model has no adapters"):
        save_lora(model, path)
    add_lora_(model, rank=2)
    save_lora(model, path)
    other = mlp()
    add_lora_(other, rank=3)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(lamina.FormatError, match=r"0.lora_a is \[2, 20\], but \[3, 20\] in the model"):
        load_lora_(other, path)
    lamina.save(nn.Linear(2, 2), path)
    with pytest.raises(lamina.FormatError):
        load_lora_(other, path)
    with pytest.raises(FileNotFoundError):
        load_lora_(other, tmp_path / "nothing")
    for name, tensor in other.state_dict().items():
        assert_exact(tensor, before[name])


def test_files_with_the_same_names_that_are_no_adapters(tmp_path):
    """Names and shapes fit, but nothing says what alpha was."""
    path = tmp_path / "adapters.safetensors"
    model = nn.Sequential(nn.Linear(4, 4))
    add_lora_(model, rank=2)
    lookalike = nn.Sequential(nn.Module())
    lookalike[0].lora_a = nn.Parameter(torch.ones(2, 4))
    lookalike[0].lora_b = nn.Parameter(torch.ones(4, 2))
    lamina.save(lookalike, path)
    with pytest.raises(lamina.FormatError, match="holds no adapters written by"):
        load_lora_(model, path)
    assert_exact(model[0].lora_b.detach(), torch.zeros(4, 2))


def test_a_whole_model_with_adapters_is_saved(tmp_path):
    path = tmp_path / "model.safetensors"
    model, x = mlp(), torch.randn(3, 20)
    lamina.swap_(model, INT8)
    add_lora_(model, rank=2)
    trained(model[0])
    lamina.save(model, path)
    fresh = mlp()
    add_lora_(fresh, rank=2)
    lamina.load_(fresh, path)
    assert isinstance(fresh[0].base, Int8Linear)
    assert_exact(fresh(x), model(x))
