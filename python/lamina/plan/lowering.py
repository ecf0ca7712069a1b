"""torch's own ops, done by lamina's: what the recorder calls where a graph was left with one of torch's.

Each function takes the arguments of one op of torch and gives what it gives, or NotImplemented for arguments that
lamina's op does not take. They are asked only about what hangs on an input of the model.
"""

from collections.abc import Callable
from typing import Any

import torch

LOWERINGS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}

# Functions of `_C` that write to an argument which is not blank.
MUTATING = {"attention_decode_append"}
