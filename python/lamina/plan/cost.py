"""What a step has to do at least: floating-point or integer operations, two for a multiply-add.

Counted from the operands of the functions in csrc/ops, and for torch's ops by torch's own registry. Ops that only move
or look at memory count none; their bytes say what they take.
"""

from collections.abc import Callable
from math import prod
from typing import Any

from lamina.plan.record import Ref, Step, TorchCall


def flops(step: Step | TorchCall) -> int:
    """Operations of one run of a step, 0 where nobody counts them."""
    if isinstance(step, TorchCall):
        from torch.utils.flop_counter import flop_registry  # here: it imports Triton where that is installed

        count = flop_registry.get(step.op.overloadpacket)
        if count is None:
            return 0
        shaped = [ref.shape if isinstance(ref, Ref) else ref for ref in step.args]
        outputs = [ref.shape for ref in step.outputs if ref is not None]
        return int(_counted(count, shaped, step.kwargs, outputs))
    count = _COUNTS.get(step.op)
    return int(count(step.arguments)) if count else 0


def precision(step: Step | TorchCall) -> str:
    """The peak a step is measured against: "int8", "bf16" or "float32"."""
    if step.op in ("int8_linear", "int8_conv2d", "sparse_int8_linear", "int8_lstm", "int8_gru"):
        return "int8"
    if step.op == "attention" and any(str(ref.dtype) == "torch.bfloat16" for ref in step.refs()):
        return "bf16"
    return "float32"


def _counted(count: Callable[..., Any], shapes: list[Any], kwargs: dict[str, Any], outputs: list[tuple]) -> int:
    try:
        return count(*shapes, **kwargs, out_val=None, out_shape=outputs[0]) or 0
    except (TypeError, AttributeError, IndexError):
        return 0  # it wants the tensors themselves


def _out(arguments: list[Any]) -> Ref:
    return next(a for a in reversed(arguments) if isinstance(a, Ref))


def _linear(arguments: list[Any]) -> int:
    return 2 * _out(arguments).numel * arguments[0].shape[-1]


def _attention(arguments: list[Any]) -> int:
    query, key, value = arguments[:3]
    scores = prod(query.shape[:-1]) * key.shape[-2]
    share = 0.5 if arguments[4] else 1.0
    return int(2 * scores * (query.shape[-1] + value.shape[-1]) * share)


def _conv2d(arguments: list[Any]) -> int:
    # Of the outputs before a pool.
    kh, kw, sh, sw, dh, dw, top, bottom, left, right, groups = arguments[4][:11]
    images, channels, height, width = arguments[0].shape
    rows = (height + top + bottom - dh * (kh - 1) - 1) // sh + 1
    columns = (width + left + right - dw * (kw - 1) - 1) // sw + 1
    return 2 * images * _out(arguments).shape[1] * rows * columns * kh * kw * channels // groups


def _int8_conv2d(arguments: list[Any]) -> int:
    return 2 * _out(arguments).numel * prod(arguments[4][1:])


def _rnn(gates: int) -> Callable[[list[Any]], int]:
    """Of one direction of each layer: inputs and state times the gates."""

    def count(arguments: list[Any]) -> int:
        tensors = [a for a in arguments if isinstance(a, Ref)]
        hidden = next(t for t in reversed(tensors) if len(t.shape) == 3)
        parts, _, width = hidden.shape
        rows = prod(arguments[0].shape[:-1])
        return 2 * rows * gates * width * (arguments[0].shape[-1] + width + (parts - 1) * 2 * width)

    return count


_COUNTS: dict[str, Callable[[list[Any]], int]] = {
    "linear": _linear,
    "int8_linear": _linear,
    "weight_only_linear": _linear,
    "sparse_linear": _linear,
    "sparse_int8_linear": _linear,
    "attention": _attention,
    "conv2d": _conv2d,
    "int8_conv2d": _int8_conv2d,
    "lstm": _rnn(4),
    "int8_lstm": _rnn(4),
    "gru": _rnn(3),
    "int8_gru": _rnn(3),
}
