"""lamina: compiled kernels that drop into PyTorch models.

    fast = lamina.accelerate(model, example_inputs)   # measured, verified, never slower
    report = lamina.swap_(model, lamina.Int8Dynamic())  # the plain rewrite, in place

Importing lamina never initialises CUDA and needs no network.
"""

from importlib.metadata import version as _version

from lamina import compile, integrations, nn, ops, prune, quant, reference
from lamina._backends import force_isa, info
from lamina.accelerate import Accelerated, accelerate
from lamina.configs import (
    FusedAttention,
    FusedConv,
    FusedRNN,
    Int4WeightOnly,
    Int8Dynamic,
    Int8RNN,
    Int8Static,
    Int8WeightOnly,
    Sparse,
    SparseInt8,
)
from lamina.errors import FormatError, PlanError
from lamina.plan.model import Plan, load_plan, make_plan
from lamina.serialization import load_, save
from lamina.swap import LayerDecision, SwapReport, swap_

__version__ = _version("lamina")

__all__ = [
    "Accelerated",
    "FormatError",
    "FusedAttention",
    "FusedConv",
    "FusedRNN",
    "Int4WeightOnly",
    "Int8Dynamic",
    "Int8RNN",
    "Int8Static",
    "Int8WeightOnly",
    "LayerDecision",
    "Plan",
    "PlanError",
    "Sparse",
    "SparseInt8",
    "SwapReport",
    "__version__",
    "accelerate",
    "compile",
    "force_isa",
    "info",
    "integrations",
    "load_",
    "load_plan",
    "make_plan",
    "nn",
    "ops",
    "prune",
    "quant",
    "reference",
    "save",
    "swap_",
]
