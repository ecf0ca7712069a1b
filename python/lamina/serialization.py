"""save and load_: safetensors with JSON metadata, never pickle.

The file is an ordinary safetensors file. Its metadata has one key, "lamina", with JSON: the format's version, the
layers that are not the float originals (name -> type and arguments), aliases of tensors that share memory, the caller's
own metadata, and a checksum of it all: safetensors notices a truncated file, but not a flipped bit.
"""

import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lamina.errors import FormatError
from lamina.nn.attention import LAYERS, adopt, in_proj_of, put_in_proj
from lamina.nn.int8_conv import Int8Conv1d, Int8Conv2d, Int8ConvTranspose2d, conv_arguments_of
from lamina.nn.int8_linear import Int8Linear
from lamina.nn.linears import as_linear, stand_in
from lamina.nn.packed_linear import PackedLinear
from lamina.nn.packed_weight import PackedWeight
from lamina.nn.rnn import Int8GRU, Int8LSTM, arguments_of
from lamina.nn.sparse_conv import SparseConv2d
from lamina.nn.sparse_int8_linear import SparseInt8Linear
from lamina.nn.sparse_linear import SparseLinear
from lamina.nn.weight_only_linear import Int4WeightOnlyLinear, Int8WeightOnlyLinear

FORMAT_VERSION = 1

# The layers that take the place of a float one. Each has `options()`, the constructor's keyword arguments in JSON that
# the place does not give, and `check_saved(state, prefix)`, a ValueError where its part of a state_dict does not fit.
_LINEARS: tuple[type[PackedLinear], ...] = (
    *(Int8Linear, Int8WeightOnlyLinear, Int4WeightOnlyLinear),
    *(SparseInt8Linear, SparseLinear),
)
_RNNS: tuple[type[Int8LSTM | Int8GRU], ...] = (Int8LSTM, Int8GRU)
_CONVS = (Int8Conv1d, Int8Conv2d, Int8ConvTranspose2d, SparseConv2d)
_LAYERS = (*_LINEARS, *_RNNS, *_CONVS)


def save(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write the model's state to `path`, with what `load_` needs to rebuild lamina's layers.

    The file appears whole or not at all. `metadata` is kept and returned by `load_`.

    >>> lamina.save(fast.model, "model.safetensors")
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    layers: dict[str, Any] = {}
    owners: dict[nn.Module, str] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _LAYERS):
            layers[fqn] = {"type": type(module).__name__, **module.options()}
            owner = owners.setdefault(module, fqn)
            if owner != fqn and isinstance(
                module, PackedWeight
            ):  # its weight is unpacked anew for each place, so the memory does not show it
                aliases[f"{fqn}.weight"] = f"{owner}.weight"
    seen: dict[tuple, str] = {}
    for name, tensor in model.state_dict().items():
        if name in aliases:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"save: '{name}' in the state_dict is a {type(tensor).__name__}, not a tensor")
        tensor = tensor.detach().cpu()
        where = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and where in seen:
            aliases[name] = seen[where]
            continue
        seen[where] = name
        tensors[name] = tensor.contiguous()
    header = {"version": FORMAT_VERSION, "layers": layers, "aliases": aliases, "metadata": dict(metadata or {})}
    _write(path, header, tensors)


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path, values: Mapping[str, Any]) -> None:
    """Write tensors by name, and `values` that JSON can hold, to one safetensors file, whole or not at all.

    What `load_tensors` reads; for state that is no model's, such as that of a training.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _write(Path(path), {"version": FORMAT_VERSION, "values": dict(values)}, contiguous)


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and values of a file that `save_tensors` wrote. Raises as `load_` does."""
    path = Path(path)
    header, tensors = _open(path)
    if not isinstance(header.get("values"), dict):
        raise FormatError(f"{path.name} is a model that lamina.save wrote; lamina.load_ reads it")
    return tensors, header["values"]


def _write(path: Path, header: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    header["checksum"] = _checksum(header, tensors)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(dict(tensors), temporary, metadata={"lamina": json.dumps(header)})
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_(model: nn.Module, path: str | Path) -> dict[str, str]:
    """Load a file written by `save` into `model`, in place; returns the metadata given to `save`.

    `model` is the float model or one already swapped: linear, convolutional and recurrent layers become
    what the file has in their places.

    Raises FileNotFoundError, and FormatError if the file is truncated, foreign, from a newer lamina or does not fit the
    model. Everything is checked first: on an error the model is as it was.

    >>> model = lamina.models.create("lenet"); lamina.load_(model, "model.safetensors")
    """
    path = Path(path)
    header, tensors = _read(path)
    tensors = _as_named_here(model, tensors)
    replacements = _build_layers(model, path, header["layers"], tensors)
    # Everything else must match by name and shape before anything is copied.
    inside = tuple(
        f"{fqn}{end}" for fqn in replacements for end in (".", *(("_weight", "_bias") if _is_in_proj(fqn) else ()))
    )
    rest = {name: t for name, t in tensors.items() if not name.startswith(inside)} if inside else tensors
    own = {name: t for name, t in model.state_dict(keep_vars=True).items() if not (inside and name.startswith(inside))}
    quantized_here = {
        fqn: module
        for fqn, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (PackedWeight, *_RNNS)) and fqn not in replacements
    }
    found_here = {name for name in own if name.endswith("_scale") and name.rpartition(".")[0] in quantized_here}
    missing = sorted(own.keys() - rest.keys() - found_here)
    surplus = sorted(rest.keys() - own.keys())
    if missing or surplus:
        raise FormatError(f"{path.name} does not fit this model: {_names('lacks', missing)}{_names('has', surplus)}")
    packed = {f"{fqn}.weight" for fqn in quantized_here}
    for name, tensor in rest.items():
        if name not in packed and tensor.shape != own[name].shape:
            raise FormatError(
                f"{path.name} does not fit this model: {name} is {list(tensor.shape)}, "
                f"but {list(own[name].shape)} in the model"
            )
    for fqn, module in quantized_here.items():
        try:
            module.check_saved(rest, f"{fqn}.")
        except ValueError as error:
            raise FormatError(f"{path.name} does not fit this model: {error}") from None

    for fqn, layer in replacements.items():
        parent, child = _split(model, fqn)
        target = _target(model, fqn)
        layer.train(target.training)
        if (device := next(chain(target.parameters(), target.buffers())).device).type == "cuda":
            layer.to(device)
        if type(parent) in LAYERS:  # torch's attention layers read weights, lamina's call their layers
            adopt(parent, child)
        if child in parent._modules:
            setattr(parent, child, layer)
        else:
            put_in_proj(parent, layer)
    model.load_state_dict(rest, strict=False)
    return header["metadata"]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header, tensors = _open(path)
    try:
        for alias, name in header["aliases"].items():
            tensors[alias] = tensors[name]
        return {"layers": dict(header["layers"]), "metadata": dict(header["metadata"])}, tensors
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path.name} has damaged lamina metadata: {error!r}") from None


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header, without its checksum, which has been checked, and the tensors."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("lamina")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path.name} is truncated or no safetensors file: {error}") from None
    if text is None:
        raise FormatError(f"{path.name} was not written by lamina.save; load it with safetensors.torch.load_model")
    try:
        header = json.loads(text)
        version = header["version"]
        if version > FORMAT_VERSION:
            raise FormatError(
                f"{path.name} has format version {version}, but this lamina reads up to {FORMAT_VERSION}; update lamina"
            )
        if header.pop("checksum") != _checksum(header, tensors):
            raise FormatError(f"{path.name} is damaged: its checksum does not match its content")
        return header, tensors
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path.name} has damaged lamina metadata: {error!r}") from None


def _build_layers(
    model: nn.Module, path: Path, layers: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """The lamina layers of the file, loaded, but not yet in the model."""
    built: dict[str, nn.Module] = {}
    shared: dict[nn.Module, nn.Module] = {}
    for fqn, spec in layers.items():
        try:
            kind, options = spec["type"], {key: value for key, value in spec.items() if key != "type"}
            target = _target(model, fqn)
        except (AttributeError, KeyError, TypeError) as error:
            raise FormatError(f"{path.name} does not fit this model: layer '{fqn}': {error}") from None
        made = next((layer for layer in _LAYERS if layer.__name__ == kind), None)
        if made is None:
            raise FormatError(f"{path.name}: layer '{fqn}' is a '{kind}', which this lamina does not know")
        state = {name.removeprefix(f"{fqn}."): t for name, t in tensors.items() if name.startswith(f"{fqn}.")}
        try:
            arguments = _linear_arguments if made in _LINEARS else _conv_arguments if made in _CONVS else _rnn_arguments
            layer = made(**arguments(made, fqn, target, state), **options)
            layer.load_state_dict(state)
        except (RuntimeError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split()).removeprefix(f"Error(s) in loading state_dict for {kind}: ")
            raise FormatError(f"{path.name} does not fit this model: layer '{fqn}': {reason}") from None
        built[fqn] = shared.setdefault(target, stand_in(layer, target))
    return built


def _split(model: nn.Module, fqn: str) -> tuple[nn.Module, str]:
    parent, _, child = fqn.rpartition(".")
    return model.get_submodule(parent), child


def _is_in_proj(fqn: str) -> bool:
    return fqn.rpartition(".")[2] == "in_proj"


def _target(model: nn.Module, fqn: str) -> nn.Module:
    """The module of that name; the input projections of attention are one too where they are parameters."""
    parent, child = _split(model, fqn)
    if child == "in_proj" and isinstance(parent, nn.MultiheadAttention) and in_proj_of(parent) is not None:
        return in_proj_of(parent)
    return model.get_submodule(fqn)


def _as_named_here(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of attention under the names they have where its input projections are a layer."""
    names = {
        f"{fqn}_{what}": f"{fqn}.{what}"
        for fqn, module in model.named_modules()
        if _is_in_proj(fqn) and isinstance(module, PackedLinear)
        for what in ("weight", "bias")
    }
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def _linear_arguments(
    made: type[PackedLinear], fqn: str, target: nn.Module, state: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What the constructor of a linear layer for the place of `target` takes. Raises ValueError."""
    linear = target if isinstance(target, _LINEARS) else as_linear(target)
    if not fqn or linear is None:
        raise ValueError(f"'{fqn}' is a {type(target).__name__}")
    if "weight" not in state:
        raise ValueError(f"it lacks {fqn}.weight")
    shape, found = made.saved_shape(linear.out_features, linear.in_features), tuple(state["weight"].shape)
    if shape is not None and found != shape:
        raise ValueError(f"{fqn}.weight is {list(found)}, but {list(shape)} in the model")
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
    return {**sizes, "bias": linear.bias is not None, "dtype": linear.weight.dtype}


def _conv_arguments(
    made: type[Int8Conv1d | Int8Conv2d | Int8ConvTranspose2d | SparseConv2d],
    fqn: str,
    target: nn.Module,
    state: Mapping[str, Tensor],
) -> dict[str, Any]:
    """What the constructor of a convolution for the place of `target` takes. Raises ValueError."""
    if not fqn or not made.stands_for(target):
        raise ValueError(f"'{fqn}' is a {type(target).__name__}")
    if "weight" not in state:
        raise ValueError(f"it lacks {fqn}.weight")
    return conv_arguments_of(target)


def _rnn_arguments(
    made: type[Int8LSTM | Int8GRU], fqn: str, target: nn.Module, state: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What the constructor of a recurrent layer for the place of `target` takes. Raises ValueError."""
    if not fqn or not made.stands_for(target):
        raise ValueError(f"'{fqn}' is a {type(target).__name__}")
    return arguments_of(target)


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of the header, and of name, type, shape and bytes of each tensor."""
    value = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        if tensor.numel():
            value = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), value)
    return value


def _names(verb: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"it {verb} {', '.join(names[:3])}{more}; "


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
