"""Arrays in files for a plan's inputs and outputs: NumPy's .npy and .npz, never pickle."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamina.errors import FormatError, PlanError
from lamina.plan.structure import named_tensors


def read(files: Sequence[str], inputs: Sequence[Any]) -> dict[str, Tensor]:
    """The tensors in FILE or NAME=FILE for a plan's inputs; files without a name are the inputs in order.

    An array of another dtype is converted where no value changes (bfloat16, which NumPy lacks, is rounded). Raises
    FormatError for what is no array, PlanError for a name that the plan does not have or a value that does not fit.
    """
    kinds = {i.name: i for i in inputs}
    names = list(kinds)
    given: dict[str, Tensor] = {}
    for file in files:
        name, _, path = file.rpartition("=")
        if not name:
            unused = [n for n in names if n not in given]
            if not unused:
                raise PlanError(f"plan: there is no input for {path}; it takes {', '.join(map(str, inputs))}")
            name = unused[0]
        if name not in kinds:
            raise PlanError(f"plan: there is no input '{name}'; it takes {', '.join(map(str, inputs))}")
        given[name] = _as_dtype(name, torch.from_numpy(_array(Path(path))), kinds[name].dtype)
    return given


def named(result: Any) -> dict[str, np.ndarray]:
    """The tensors of a result by name: "output", or "logits" and "states.0" of larger ones."""
    tensors = named_tensors(result if isinstance(result, dict) else {"output": result})
    return {name: (t.float() if t.dtype is torch.bfloat16 else t).numpy() for name, t in tensors.items()}


def write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(path, **arrays)


def _array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError as failure:
        raise FormatError(f"{path.name} is no .npy file of numbers: {failure}") from failure
    if not isinstance(array, np.ndarray):
        raise FormatError(f"{path.name} holds several arrays; give one .npy file for each input")
    return array


def _as_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    converted = tensor.to(dtype)
    if dtype is not torch.bfloat16 and not torch.equal(converted.to(tensor.dtype), tensor):
        raise PlanError(f"plan: {name} is {tensor.dtype}, and not all of its values fit {dtype}")
    return converted
