"""Name -> (model class, config): filled by the model files themselves, so no list has to be kept by hand.

A family registers the configs that have a name with the decorator on its model class:

    @register(gpt_tiny=GPTConfig(layers=4, dim=128), gpt2=GPTConfig())
    class GPT(nn.Module):
        def __init__(self, config: GPTConfig): ...

        @staticmethod
        def example_inputs(config: GPTConfig, batch: int) -> tuple: ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn


@dataclasses.dataclass(frozen=True)
class Entry:
    """One named model: `model(config)` builds it, `model.example_inputs(config, batch)` makes inputs for it."""

    model: type[nn.Module]
    config: Any


_entries: dict[str, Entry] = {}


def register(**configs: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Class decorator: gives each keyword's config that name. Raises ValueError for a name that is taken."""

    def decorate(model: type[nn.Module]) -> type[nn.Module]:
        for name, config in configs.items():
            if name in _entries:
                taken_by = _entries[name].model.__name__
                raise ValueError(f"model name {name!r} of {model.__name__} is already taken by {taken_by}")
            _entries[name] = Entry(model, config)
        return model

    return decorate


def registered_names() -> list[str]:
    """Every registered name, sorted."""
    return sorted(_entries)


def lookup(name: str, overrides: dict[str, Any]) -> Entry:
    """The entry called `name` with the config fields in `overrides` replaced; ValueError if either is unknown."""
    if name not in _entries:
        raise ValueError(f"there is no model {name!r}; the known ones are {', '.join(registered_names())}")
    entry = _entries[name]
    fields = [field.name for field in dataclasses.fields(entry.config)]
    for key in overrides:
        if key not in fields:
            raise ValueError(f"model {name!r} has no config field {key!r}; its fields are {', '.join(fields)}")
    return dataclasses.replace(entry, config=dataclasses.replace(entry.config, **overrides))
