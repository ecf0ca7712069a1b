"""What elementwise computes, in plain PyTorch."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Each instruction; what compares or combines truths gives 1 and 0.
INSTRUCTIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "abs": torch.abs,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "square": lambda x: x * x,
    "cube": lambda x: x * x * x,
    "pow": torch.pow,
    "exp": torch.exp,
    "log": torch.log,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "floor": torch.floor,
    "round": torch.round,
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_not": torch.logical_not,
    "where": lambda condition, x, y: torch.where(condition != 0, x, y),
}


def elementwise(inputs: Sequence[Tensor], program: Sequence[tuple], constants: Sequence[float] = ()) -> Tensor:
    """Runs instructions (name, operand, ...) in the widest dtype of the inputs (float32 if all are bool).

    Operands are counted: inputs, then constants, then the results of instructions; the last result is returned, of the
    shape that all inputs broadcast to.
    """
    dtype = torch.float32
    for t in inputs:
        dtype = torch.promote_types(dtype, t.dtype)
    values = [t.to(dtype) for t in inputs]
    values += [torch.tensor(constant, dtype=dtype, device=inputs[0].device) for constant in constants]
    for name, *operands in program:
        values.append(INSTRUCTIONS[name](*(values[i] for i in operands)).to(dtype))
    return values[-1].expand(torch.broadcast_shapes(*(t.shape for t in inputs)))
