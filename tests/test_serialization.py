"""save and load_: whole files, whole models, and a model that stays as it is when a file is bad."""

import copy
import json
import os
import stat
import struct

import pytest
import safetensors.torch
import torch
from tolerances import assert_exact
from torch import nn

import lamina
from lamina import FormatError, load_, save
from lamina.nn import Int8Linear
from lamina.serialization import FORMAT_VERSION, _checksum

INT8 = lamina.Int8Dynamic()


class Net(nn.Module):
    """Linear layers, a buffer, tied weights and a layer that stays float."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.body = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12))
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, tokens):
        return self.head(self.norm(self.body(self.embed(tokens))))


TOKENS = torch.arange(11)


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def swapped(seed: int = 0) -> Net:
    model = net(seed)
    lamina.swap_(model, {"re:body.*": INT8})
    return model


def snapshot(model: nn.Module) -> list:
    """Everything a failed load must leave alone: bits, types and identities."""
    tensors = [(name, t, t.detach().clone()) for name, t in [*model.named_parameters(), *model.named_buffers()]]
    return [[(fqn, type(m), id(m)) for fqn, m in model.named_modules()], tensors]


def assert_untouched(model: nn.Module, before: list) -> None:
    modules, tensors = before
    assert [(fqn, type(m), id(m)) for fqn, m in model.named_modules()] == modules
    now = dict([*model.named_parameters(), *model.named_buffers()])
    assert list(now) == [name for name, _, _ in tensors]
    for name, tensor, bits in tensors:
        assert now[name] is tensor
        assert_exact(tensor.detach(), bits, name)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


# -- round trips


@pytest.mark.parametrize("into", [net, swapped], ids=["into_float", "into_swapped"])
@pytest.mark.parametrize("of", [net, swapped], ids=["of_float", "of_swapped"])
def test_round_trip(of, into, path):
    model = of()
    save(model, path)
    other = into(seed=1)
    assert load_(other, path) == {}
    for name, tensor in model.state_dict().items():
        if name in other.state_dict():
            assert_exact(other.state_dict()[name], tensor if of is into else other.state_dict()[name], name)
    if of is swapped or into is net:
        assert_exact(other(TOKENS), model(TOKENS))
    else:
        # A float file in a swapped model: its weights are quantized on the way in.
        assert isinstance(other.body[0], Int8Linear)
        assert_exact(other(TOKENS), swapped()(TOKENS))


def test_swapped_layers_come_back_as_they_were(path):
    model = net()
    model.body[0] = Int8Linear.from_float(model.body[0], activation="gelu")
    save(model, path)
    other = net(seed=1).train()
    load_(other, path)
    assert isinstance(other.body[0], Int8Linear)
    assert other.body[0].activation == "gelu"
    assert other.body[0].training
    assert type(other.body[2]) is nn.Linear
    assert_exact(other.eval()(TOKENS), model(TOKENS))


def test_accelerated_models_come_back(path, monkeypatch):
    import sys

    monkeypatch.setattr(
        sys.modules["lamina.accelerate"], "_interleaved", lambda before, after, seconds, stopwatch: (2.0, 1.0)
    )
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(3, 16)
    fast = lamina.accelerate(model, (x,), compile=False).model
    save(fast, path)
    fresh = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    load_(fresh, path)
    assert_exact(fresh(x), fast(x))
    load_(fast, path)  # into the accelerated model itself


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype, path):
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).to(dtype)
    save(model, path)
    other = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).to(dtype)
    load_(other, path)
    for name, tensor in model.state_dict().items():
        assert_exact(other.state_dict()[name], tensor, name)


def test_bfloat16_swapped(path):
    model = nn.Sequential(nn.Linear(6, 5)).bfloat16()
    lamina.swap_(model, INT8)
    save(model, path)
    other = nn.Sequential(nn.Linear(6, 5)).bfloat16()
    load_(other, path)
    assert other[0].bias.dtype == torch.bfloat16
    x = torch.randn(2, 6).bfloat16()
    assert_exact(other(x), model(x))


def test_tied_weights_are_stored_once_and_stay_tied(path):
    model = net()
    save(model, path)
    with safetensors.safe_open(path, framework="pt") as file:
        assert ("head.weight" in file.keys()) != ("embed.weight" in file.keys())  # noqa: SIM118 (no mapping)
    other = net(seed=1)
    load_(other, path)
    assert other.head.weight is other.embed.weight
    assert_exact(other.head.weight.detach(), model.embed.weight.detach())


class Recurrent(nn.Module):
    """Both recurrent layers, with everything that adds or changes a tensor; the first one in two places."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 7, 2, bidirectional=True, batch_first=True, proj_size=3)
        self.gru = nn.GRU(6, 6, bias=False)
        self.again = self.gru
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.again(self.gru(self.lstm(x)[0])[0])[0])


def recurrent(seed: int = 0) -> Recurrent:
    torch.manual_seed(seed)
    return Recurrent().eval()


def int8_recurrent(seed: int = 0) -> Recurrent:
    model = recurrent(seed)
    lamina.swap_(model, lamina.Int8RNN())
    return model


def fused_recurrent(seed: int = 0) -> Recurrent:
    model = recurrent(seed)
    lamina.swap_(model, lamina.FusedRNN())
    return model


@pytest.mark.parametrize("into", [recurrent, fused_recurrent, int8_recurrent])
@torch.no_grad()
def test_recurrent_layers_come_back(into, path):
    model, other, x = int8_recurrent(), into(seed=1), torch.randn(2, 4, 5)
    other.lstm.train()
    save(model, path)
    load_(other, path)
    assert isinstance(other.lstm, lamina.nn.Int8LSTM)
    assert isinstance(other.gru, lamina.nn.Int8GRU)
    assert other.again is other.gru
    assert other.lstm.training
    assert_exact(other.eval()(x), model(x))
    save(recurrent(), path)  # a float file: quantized on the way in
    load_(other, path)
    assert_exact(other(x), model(x))


WRONG_RECURRENT = {
    "a missing matrix": (lambda h, t: t.pop("lstm.weight_hr_l0"), "lstm.*weight_hr_l0"),
    "a missing scale": (lambda h, t: t.pop("lstm.weight_ih_l0_scale"), "needs weight_ih_l0_scale"),
    "a scale that is NaN": (lambda h, t: t["lstm.weight_hh_l1_scale"].fill_(float("nan")), "positive and finite"),
    "a code of -128": (lambda h, t: t["lstm.weight_hh_l1"].fill_(-128), "code of -128"),
    "codes of another type": (
        lambda h, t: t.update({"lstm.weight_ih_l0": t["lstm.weight_ih_l0"].int()}),
        "weight_ih_l0 is torch.int32",
    ),
    "another shape": (lambda h, t: t.update({"lstm.bias_hh_l0": torch.zeros(3)}), "bias_hh_l0"),
    "another layer": (lambda h, t: h["layers"]["lstm"].update(type="Int8GRU"), "'lstm' is a"),
    "a linear layer": (lambda h, t: h["layers"]["lstm"].update(type="Int8Linear"), "'lstm' is a"),
    "an option": (lambda h, t: h["layers"]["lstm"].update(bias=True), "layer 'lstm'"),
}


@pytest.mark.parametrize("what", WRONG_RECURRENT)
@pytest.mark.parametrize("into", [recurrent, int8_recurrent])
def test_recurrent_files_that_do_not_fit(what, into, path):
    save(int8_recurrent(), path)
    change, message = WRONG_RECURRENT[what]
    rewrite(path, lambda header, tensors: (change(header, tensors), None)[1])
    refused(into(seed=1), path, message)


def test_a_float_recurrent_file_with_nan_into_a_swapped_model(path):
    model = recurrent()
    with torch.no_grad():
        model.gru.weight_hh_l0[1, 1] = float("nan")
    save(model, path)
    refused(int8_recurrent(seed=1), path, "gru.weight_hh_l0: .*NaN or infinite weight")


def test_a_shared_int8_layer(path):
    """One layer in two places: saved, loaded into a float model that shares it, and shared again."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    model = Twice()
    lamina.swap_(model, INT8)
    save(model, path)
    other, x = Twice(), torch.randn(2, 6)
    load_(other, path)
    assert isinstance(other.first, Int8Linear)
    assert other.first is other.second
    assert_exact(other(x), model(x))


def test_views_and_strided_tensors(path):
    model = nn.Module()
    whole = torch.randn(4, 6)
    model.register_buffer("rows", whole[1:3])
    model.register_buffer("columns", whole[:, 2:4])
    model.register_buffer("turned", whole.T)
    model.register_buffer("nothing", torch.empty(0, 3))
    save(model, path)
    other = nn.Module()
    for name, buffer in model.named_buffers():
        other.register_buffer(name, torch.zeros_like(buffer))
    load_(other, path)
    for name, buffer in model.named_buffers():
        assert_exact(getattr(other, name), buffer, name)


def test_metadata_is_kept(path):
    given = {"trained": "today", "names": "äöü \n \" '", "": "empty key"}
    save(net(), path, metadata=given)
    assert load_(net(), path) == given


def test_paths_may_be_text(path):
    save(net(), str(path))
    load_(net(), str(path))


def test_an_ordinary_safetensors_file(path):
    """Any safetensors reader opens it; nothing in it is pickled."""
    model = swapped()
    save(model, path)
    tensors = safetensors.torch.load_file(path)
    assert_exact(tensors["body.0.weight"], model.state_dict()["body.0.weight"])
    assert tensors["body.0.weight"].dtype == torch.int8
    assert b"pickle" not in path.read_bytes()


def test_int8_files_are_small(path):
    model = nn.Sequential(nn.Linear(512, 512))
    lamina.swap_(model, INT8)
    save(model, path)
    assert path.stat().st_size <= 0.27 * 4 * 512 * 512


# -- saving is all or nothing


def test_a_failed_save_leaves_the_old_file(path, monkeypatch):
    save(net(), path)
    before = path.read_bytes()

    def breaks(*args, **kwargs):
        raise OSError("disk full")

    for name in ("save_file", "os.replace"):
        with monkeypatch.context() as patch:
            if name == "save_file":
                patch.setattr("lamina.serialization.save_file", breaks)
            else:
                patch.setattr(os, "replace", breaks)
            with pytest.raises(OSError, match="disk full"):
                save(net(seed=1), path)
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]


def test_saving_over_a_file_replaces_it(path):
    save(net(), path)
    save(swapped(seed=1), path)
    other = net()
    load_(other, path)
    assert_exact(other(TOKENS), swapped(seed=1)(TOKENS))
    assert list(path.parent.iterdir()) == [path]


def test_a_saved_file_has_ordinary_permissions(path):
    mask = os.umask(0o027)
    try:
        save(net(), path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_saving_changes_nothing(path):
    model = swapped()
    before = snapshot(model)
    save(model, path)
    assert_untouched(model, before)


def test_saving_into_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        save(net(), tmp_path / "missing" / "model.safetensors")


def test_a_state_dict_with_more_than_tensors(path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"anything": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(TypeError, match="save: '_extra_state' in the state_dict is a dict, not a tensor"):
        save(Extra(2, 2), path)
    assert not path.exists()


# -- what bad files get


def refused(model: nn.Module, path, match: str) -> None:
    before = snapshot(model)
    with pytest.raises(FormatError, match=match) as error:
        load_(model, path)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)
    assert_untouched(model, before)


def test_format_error_is_a_value_error():
    assert issubclass(FormatError, ValueError)
    assert lamina.FormatError is FormatError


def test_a_missing_file(path):
    model = net()
    before = snapshot(model)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_(model, path)
    with pytest.raises(FileNotFoundError):
        load_(model, path.parent)  # a folder is no file
    assert_untouched(model, before)


@pytest.mark.parametrize("of", [net, swapped])
@pytest.mark.parametrize("into", [net, swapped])
def test_truncated_files(of, into, path):
    """At every kind of place: nothing, inside the length, the header, the data, and one byte short."""
    save(of(), path)
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    model = into(seed=1)
    for size in (0, 1, 7, 8, 9, 8 + header // 2, 8 + header, 8 + header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(model, path, "is truncated or no safetensors file")


@pytest.mark.parametrize(
    "content",
    [b"not a checkpoint", b"\x00" * 4096, b"\xff" * 4096, b"\x80\x04}.", b"PK\x03\x04" + b"\x00" * 200, b"{}"],
    ids=["text", "zeros", "ones", "pickle", "zip", "json"],
)
def test_foreign_files(content, path):
    path.write_bytes(content)
    refused(net(), path, "is truncated or no safetensors file")


def test_a_torch_checkpoint(path):
    torch.save(net().state_dict(), path)
    refused(net(), path, "is truncated or no safetensors file")


def test_somebody_elses_safetensors(path):
    safetensors.torch.save_file({name: t.clone() for name, t in net().state_dict().items()}, path)
    refused(net(), path, "was not written by lamina.save; load it with safetensors.torch.load_model")


def rewrite(path, change) -> None:
    """Read a saved file, let `change(header, tensors)` edit it, and write it again with a checksum that fits."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["lamina"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    result = change(header, tensors)
    header.pop("checksum")
    header["checksum"] = _checksum(header, tensors)
    text = result if isinstance(result, str) else json.dumps(header)
    safetensors.torch.save_file(tensors, path, metadata={"lamina": text})


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99])
def test_newer_files(version, path):
    save(swapped(), path)
    rewrite(path, lambda header, tensors: header.update(version=version))
    refused(net(), path, f"has format version {version}, but this lamina reads up to {FORMAT_VERSION}; update lamina")


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "3", "{", '{"version": "1"}', '{"version": 1}', '{"version": null, "layers": {}}']
    + [
        json.dumps({"version": 1, "aliases": {}, "metadata": {}, "layers": bad})
        for bad in ("x", 5, [3], {"body.0": "x"})
    ]
    + [json.dumps({"version": 1, "aliases": bad, "metadata": {}, "layers": {}}) for bad in ("x", {"a": "b"}, {"a": []})]
    + [json.dumps({"version": 1, "aliases": {}, "metadata": bad, "layers": {}}) for bad in ("x", 5)]
    + [json.dumps({"version": bad, "aliases": {}, "metadata": {}, "layers": {}}) for bad in (0, -1, 1.5, True)],
)
def test_damaged_metadata(text, path):
    save(swapped(), path)
    rewrite(path, lambda header, tensors: text)
    refused(net(), path, "model.safetensors")


WRONG = {
    "a missing weight": (lambda h, t: t.pop("norm.weight"), "lacks norm.weight"),
    "a surplus tensor": (lambda h, t: t.update(more=torch.zeros(1)), "has more"),
    "another shape": (
        lambda h, t: t.update({"norm.bias": torch.zeros(13)}),
        r"norm.bias is \[13\], but \[12\] in the model",
    ),
    "a missing int8 weight": (lambda h, t: t.pop("body.0.weight"), "body.0"),
    "a missing scale": (lambda h, t: t.pop("body.0.weight_scale"), "body.0"),
    "a missing int8 bias": (lambda h, t: t.pop("body.0.bias"), "body.0"),
    "an int8 weight of another shape": (
        lambda h, t: t.update({"body.0.weight": torch.zeros(16, 13, dtype=torch.int8)}),
        r"body.0.weight is \[16, 13\], but \[16, 12\] in the model",
    ),
    "a scale of another shape": (lambda h, t: t.update({"body.0.weight_scale": torch.ones(15)}), "body.0"),
    "a scale that is NaN": (lambda h, t: t["body.0.weight_scale"].fill_(float("nan")), "body.0"),
    "a negative scale": (lambda h, t: t["body.0.weight_scale"].neg_(), "body.0"),
    "a code of -128": (lambda h, t: t["body.0.weight"].fill_(-128), "body.0"),
    "codes of another type": (lambda h, t: t.update({"body.0.weight": t["body.0.weight"].int()}), "body.0"),
    "an int8 bias of another shape": (lambda h, t: t.update({"body.0.bias": torch.zeros(3)}), "body.0"),
    "a surplus tensor of an int8 layer": (lambda h, t: t.update({"body.0.more": torch.zeros(3)}), "body.0"),
    "an unknown layer type": (
        lambda h, t: h["layers"]["body.0"].update(type="Int2Linear"),
        "a 'Int2Linear', which this lamina",
    ),
    "an unknown activation": (
        lambda h, t: h["layers"]["body.0"].update(activation="softsign"),
        "activation 'softsign' is unknown",
    ),
    "a layer without a type": (lambda h, t: h["layers"]["body.0"].pop("type"), "body.0"),
    "a layer the model lacks": (lambda h, t: h["layers"].update(tail=h["layers"]["body.0"]), "tail"),
    "a layer that is no Linear": (lambda h, t: h["layers"].update(norm=h["layers"]["body.0"]), "'norm' is a LayerNorm"),
    "a layer that is the model": (lambda h, t: h["layers"].update({"": h["layers"]["body.0"]}), "fit|layer"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("into", [net, swapped])
def test_files_that_do_not_fit(what, into, path):
    save(swapped(), path)
    change, message = WRONG[what]
    rewrite(path, lambda header, tensors: (change(header, tensors), None)[1])
    refused(into(seed=1), path, message)


def test_a_layer_that_is_not_listed(path):
    """A float model has no place for the scale; one that is swapped already has."""
    save(swapped(), path)
    rewrite(path, lambda header, tensors: (header["layers"].pop("body.0"), None)[1])
    refused(net(seed=1), path, "has body.0.weight_scale")
    model = swapped(seed=1)
    load_(model, path)
    assert_exact(model(TOKENS), swapped()(TOKENS))


def test_a_float_file_with_nan_into_a_swapped_model(path):
    """The last layer is refused while it is quantized; the first must not have been loaded by then."""
    model = net()
    with torch.no_grad():
        model.body[2].weight[1, 1] = float("nan")
    save(model, path)
    refused(swapped(seed=1), path, "NaN or infinite weight")


def test_the_file_of_another_model(path):
    save(nn.Sequential(nn.Linear(3, 3)), path)
    refused(net(), path, "does not fit this model: it lacks .* and .* more; it has 0.bias, 0.weight")
    save(net(), path)
    refused(nn.Sequential(nn.Linear(3, 3)), path, "does not fit this model")


@pytest.mark.parametrize("of", [net, swapped])
def test_bit_damage_is_noticed(of, path, seed):
    """One flipped bit anywhere: an error and the old model, never a model with a wrong weight."""
    save(of(), path)
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    generator = torch.Generator().manual_seed(seed)
    places = [*range(8), *torch.randint(8, 8 + header, (40,), generator=generator).tolist()]
    places += torch.randint(8 + header, len(whole), (40,), generator=generator).tolist()
    model = net(seed=1)
    before = snapshot(model)
    unnoticed = []
    for place in places:
        bit = int(torch.randint(0, 8, (1,), generator=generator))
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            load_(model, path)
        except FormatError:
            assert_untouched(model, before)
            continue
        unnoticed.append((place, bit))
        model = net(seed=1)
        before = snapshot(model)
    assert unnoticed == [], f"the header ends at {8 + header}"


def test_deepcopy_and_save_without_pickle(path):
    """A swapped model can be copied, and saving one needs no pickling of modules or hooks."""
    model = swapped()
    model.body[0].register_forward_hook(lambda module, args, output: output)  # a lambda cannot be pickled
    save(model, path)
    other = copy.deepcopy(swapped())
    load_(other, path)
    assert_exact(other(TOKENS), model(TOKENS))
