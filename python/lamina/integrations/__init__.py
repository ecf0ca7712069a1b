"""Doors into other libraries. Each module imports its library only when it is used."""

import importlib
from types import ModuleType

from lamina.integrations import sdpa, transformers

__all__ = ["sdpa", "tensor_parallel", "transformers"]


def __getattr__(name: str) -> ModuleType:
    # Its classes are made from torch.distributed's, which takes long to import.
    if name == "tensor_parallel":
        return importlib.import_module("lamina.integrations.tensor_parallel")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
