"""LoRA adapters in a whole model: put in, saved, loaded, merged."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lamina.errors import FormatError
from lamina.nn.linears import as_linear
from lamina.nn.lora_linear import LoRALinear
from lamina.nn.packed_linear import PackedLinear
from lamina.running import FilterFn
from lamina.serialization import load_, save
from lamina.swap import (
    Candidate,
    LayerDecision,
    Site,
    SwapReport,
    apply_all,
    describe,
    read_by_parent,
    replacement,
    sites,
)


def add_lora_(
    model: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, filter_fn: FilterFn | None = None
) -> SwapReport:
    """Put a LoRA adapter beside every linear layer of `model`, in place, and freeze everything else.

    Swap to int8 or int4 first to train over a quantized base. The optimizer takes what is left to train:
    `[p for p in model.parameters() if p.requires_grad]`.

    Args:
        model: float, or with quantized layers.
        rank, alpha, dropout: as in `lamina.nn.LoRALinear`.
        filter_fn: `filter_fn(module, fqn) -> bool`, False leaves the layer without an adapter.

    Returns the report of what was exchanged and what was left and why.

    >>> lamina.swap_(model, lamina.Int8Dynamic())
    >>> lamina.quant.add_lora_(model, rank=8, filter_fn=lambda module, fqn: "attention" in fqn)
    """
    LoRALinear(nn.Linear(1, 1, device="meta"), rank, alpha, dropout)  # wrong arguments are an error, not a reason
    places = [site for site in sites(model) if _adaptable(site)]
    # All are asked before the first is built, which freezes it: an error in filter_fn must change nothing.
    taken = [filter_fn is None or filter_fn(site.module, site.fqn) for site in places]
    report = apply_all(
        _decision(site, _judge(site, rank, alpha, dropout) if take else "excluded by filter_fn")
        for site, take in zip(places, taken, strict=True)
    )
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        layer.lora_a.requires_grad_(True)
        layer.lora_b.requires_grad_(True)
    return report


def _adaptable(site: Site) -> bool:
    if any(isinstance(parent, LoRALinear) for parent, _ in site.places):
        return False  # the base of an adapter
    return isinstance(site.module, PackedLinear) or as_linear(site.module) is not None


def _judge(site: Site, rank: int, alpha: float, dropout: float) -> Candidate | str:
    return read_by_parent(site) or replacement(site, lambda: LoRALinear(site.module, rank, alpha, dropout))


def _decision(site: Site, judged: Candidate | str) -> Candidate | LayerDecision:
    return LayerDecision(site.fqn, describe(site.module), None, judged) if isinstance(judged, str) else judged


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of `model` by name."""
    return {fqn: module for fqn, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge_lora_(model: nn.Module) -> SwapReport:
    """Add every adapter to the weight beside it and take the adapters out, in place: for inference.

    Quantized weights are quantized anew (see `LoRALinear.merge`). To take adapters back out again later, call `merge`
    and `unmerge` of the layers instead.

    >>> lamina.quant.merge_lora_(model)
    """
    adapted = [site for site in sites(model) if isinstance(site.module, LoRALinear)]
    return apply_all(_decision(site, replacement(site, lambda s=site: _merged(s.module))) for site in adapted)


def _merged(layer: LoRALinear) -> nn.Module:
    layer.merge()
    return layer.base


def save_lora(model: nn.Module, path: str | Path) -> None:
    """Write the adapters of `model`, and nothing else, to a safetensors file.

    Raises ValueError if there are none.

    >>> lamina.quant.save_lora(model, "adapters.safetensors")
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("save_lora: the model has no adapters; put them in with lamina.quant.add_lora_")
    save(
        _adapters(layers), path, {"lora": json.dumps({fqn: [layer.rank, layer.alpha] for fqn, layer in layers.items()})}
    )


def load_lora_(model: nn.Module, path: str | Path) -> None:
    """Load a file written by `save_lora` into the adapters of `model`, in place.

    The model needs the same adapters (`add_lora_` with the same rank and filter). Raises FileNotFoundError, and
    FormatError if the file is damaged, is no adapter file or does not fit; the model is then as it was.

    >>> lamina.quant.add_lora_(model, rank=8); lamina.quant.load_lora_(model, "adapters.safetensors")
    """
    layers = lora_layers(model)
    # Into copies first: what the file says of itself is known only when it is loaded.
    loaded = _adapters(layers)
    metadata = load_(loaded, path)
    try:
        spec = json.loads(metadata["lora"])
        alphas = {fqn: float(spec[fqn][1]) for fqn in layers}
    except (KeyError, ValueError, TypeError, IndexError):
        raise FormatError(f"{Path(path).name} holds no adapters written by lamina.quant.save_lora") from None
    with torch.no_grad():
        for fqn, layer in layers.items():
            part = loaded.get_submodule(fqn)
            layer.lora_a.copy_(part.lora_a)
            layer.lora_b.copy_(part.lora_b)
            layer.alpha = alphas[fqn]


def _adapters(layers: Mapping[str, LoRALinear]) -> nn.Module:
    """Copies of the adapters under their names, in a module of their own that `save` and `load_` take."""
    root = nn.Module()
    for fqn, layer in layers.items():
        part = root
        for name in fqn.split(".") if fqn else ():
            if name not in part._modules:
                part.add_module(name, nn.Module())
            part = part._modules[name]
        part.lora_a = nn.Parameter(layer.lora_a.detach().clone())
        part.lora_b = nn.Parameter(layer.lora_b.detach().clone())
    return root
