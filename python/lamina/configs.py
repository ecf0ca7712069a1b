"""What a user asks for: one frozen dataclass per kind of replacement.

`swap_` and `accelerate` take one config, a sequence of them (tried in order, the first that concerns a layer decides),
or a dict policy `{fqn or "re:pattern": config or None, "_default": config}`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lamina.ops.sparse_int8_linear import GPU_PATTERNS as GPU_INT8_PATTERNS
from lamina.ops.sparse_int8_linear import PATTERNS as INT8_PATTERNS
from lamina.ops.sparse_linear import GPU_PATTERNS, PATTERNS
from lamina.quant.calibration import Calibration, check_calibration
from lamina.quant.observers import check_observer


@dataclass(frozen=True)
class Config:
    """Base of all configs."""


@dataclass(frozen=True)
class Int8Dynamic(Config):
    """nn.Linear -> lamina.nn.Int8Linear: int8 weights per channel, activations quantized per row on the fly; nn.Conv1d,
    Conv2d, ConvTranspose2d -> lamina.nn.Int8Conv1d, Int8Conv2d, Int8ConvTranspose2d: per image on the fly."""


@dataclass(frozen=True, eq=False)
class Int8Static(Config):
    """nn.Linear, Conv1d, Conv2d, ConvTranspose2d -> lamina.nn.Int8Linear, Int8Conv1d, Int8Conv2d, Int8ConvTranspose2d
    with one fixed scale for its input, found by running the model on examples.

    calibration: an iterable of example inputs of the whole model, each a tuple of positional or a dict of keyword
        arguments, read once (a generator is fine); or what `lamina.quant.calibrate` returned, to be used again.
    observer: "minmax" (nothing is clipped), "percentile" (the largest values are) or "mse" (least squared error).
    percentile: of the values that are not clipped, for observer="percentile".

    Each layer's range is collected in one pass, in eval mode. A layer that calibration never calls, or whose range is
    not finite, is left alone. Two Int8Static are equal only if they are the same object: data has no equality.

    >>> report = lamina.swap_(model, lamina.Int8Static([(x,) for x in batches], observer="mse"))
    """

    calibration: Iterable[Any] | Calibration = field(repr=False)
    observer: str = "minmax"
    percentile: float = 99.99

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        check_observer(self.observer, self.percentile)
        check_calibration("Int8Static: calibration", self.calibration)


@dataclass(frozen=True)
class SparseInt8(Config):
    """nn.Linear -> lamina.nn.SparseInt8Linear: int8, and only the blocks of the weight that hold a nonzero.

    pattern: the blocks that pruning made zero, output channels x inputs: "1x4", "2x4", "4x4", "16x16", "32x32" or
        "64x64" (the last three as they are on a GPU, as "4x4" on the CPU); or "2:4", on a GPU alone. A layer with too
        few zero blocks to be faster than the dense int8 layer is left alone.
    """

    pattern: str = "4x4"

    def __post_init__(self) -> None:
        known = *INT8_PATTERNS, *GPU_INT8_PATTERNS
        if self.pattern not in known:
            raise ValueError(f"SparseInt8: pattern '{self.pattern}' is unknown; use one of {', '.join(known)}")


@dataclass(frozen=True)
class Int8WeightOnly(Config):
    """nn.Linear -> lamina.nn.Int8WeightOnlyLinear: int8 weights per channel, float activations; for few rows."""


@dataclass(frozen=True)
class Int4WeightOnly(Config):
    """nn.Linear -> lamina.nn.Int4WeightOnlyLinear: int4 weights in groups of inputs, float activations; for few rows.

    group_size: inputs that share a scale, a multiple of 32. 32 takes 14.1% of the float32 bytes; larger groups take
    less and are less accurate.
    """

    group_size: int = 32

    def __post_init__(self) -> None:
        if self.group_size <= 0 or self.group_size % 32:
            raise ValueError(f"Int4WeightOnly: group_size is {self.group_size}, but must be a positive multiple of 32")


@dataclass(frozen=True)
class Sparse(Config):
    """nn.Linear, Conv2d -> lamina.nn.SparseLinear, SparseConv2d, for pruned models: of their weights only blocks that
    hold other values than zero are stored and multiplied.

    pattern: output channels x inputs of a block: "unstructured" (1 x 1), "2x1", "4x1", "16x16", "32x32" or "64x64" (the
        last three as they are on a GPU, as "4x1" on the CPU), or "2:4" (by the GPU's sparse tensor cores where that is
        faster than the dense layer; as "unstructured" on the CPU); or "auto": the one in which the layer is fastest,
        and none, with the reason in the report, where the dense layer is faster.
    rows: of input on which "auto" times a linear layer, on torch's threads; None counts zeros only, for those who
        measure by themselves, as `accelerate` does.

    Layers without zeros are left alone.

    >>> report = lamina.swap_(model, lamina.Sparse("4x1"))
    """

    pattern: str = "unstructured"
    rows: int | None = 128

    def __post_init__(self) -> None:
        known = *PATTERNS, *GPU_PATTERNS
        if self.pattern not in (*known, "auto"):
            raise ValueError(f"Sparse: pattern '{self.pattern}' is unknown; use one of {', '.join(known)} or auto")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"Sparse: rows is {self.rows}, but must be positive or None")


@dataclass(frozen=True)
class FusedAttention(Config):
    """Attention -> lamina.ops.attention: torch's attention layers, transformers models (attn_implementation="lamina"),
    and calls of scaled_dot_product_attention in a model's own modules. On a GPU calls that torch has a flash kernel for
    (half precision, no mask) stay torch's.
    """


@dataclass(frozen=True)
class FusedRNN(Config):
    """nn.LSTM, GRU, RNN and their cells -> lamina.nn's: all layers, directions and steps in one call, in the weights'
    dtype."""


@dataclass(frozen=True)
class Int8RNN(Config):
    """nn.LSTM, nn.GRU -> lamina.nn.Int8LSTM, Int8GRU: int8 weights, inputs and states quantized per row and step."""


@dataclass(frozen=True)
class FusedConv(Config):
    """nn.Conv2d -> lamina.nn.Conv2d in the weights' dtype: Winograd for 3 x 3 kernels, channels_last throughout.

    winograd: as in lamina.nn.Conv2d; 4 allows F(4x4), which loses about a digit of float32's seven.
    channels_last: lays the weight out channels_last, so that (by torch's rule) outputs are channels_last too, which the
        kernels read and write as it is. A model that calls `.view` on them needs False, or `.reshape`.
    """

    winograd: int = 2
    channels_last: bool = True

    def __post_init__(self) -> None:
        if self.winograd not in (0, 2, 4):
            raise ValueError(f"FusedConv: winograd is {self.winograd}, but must be 0, 2 or 4")


ConfigLike = Config | Sequence[Config] | Mapping[str, Config | Sequence[Config] | None]

AUTO: tuple[Config, ...] = (
    *(Int8Dynamic(), FusedAttention(), FusedRNN(), Int8RNN(), FusedConv(winograd=4)),
    Sparse("auto", rows=None),
)
# Of a model on a GPU: what lamina has kernels for there. Between rows that are quantized too and weights only, which
# pay where rows are few, time decides.
AUTO_ON_GPU: tuple[Config, ...] = (Int8Dynamic(), Int8WeightOnly(), FusedAttention(), Sparse("auto", rows=None))


def resolve(config: ConfigLike | str) -> Callable[[str], tuple[Config, ...]]:
    """A function from a module's name to the configs that may take it. Raises for anything that is no policy."""
    if isinstance(config, str):
        if config != "auto":
            raise ValueError(f"config '{config}' is unknown; use 'auto', a config, a sequence of configs or a dict")
        config = AUTO
    if isinstance(config, Mapping):
        policy = by_name(config, _as_tuple)
        return lambda fqn: policy(fqn) or ()
    configs = _as_tuple(config)
    return lambda fqn: configs


def by_name(policy: Mapping[str, Any], convert: Callable[[Any], Any]) -> Callable[[str], Any]:
    """A function from a module's name to `convert` of its value in `{fqn or "re:pattern": value, "_default": value}`.

    A name by itself goes before patterns, of which the first that matches the whole name decides; None if nothing does.
    """
    exact = {key: convert(value) for key, value in policy.items() if not key.startswith("re:")}
    patterns = [(_pattern(key), convert(value)) for key, value in policy.items() if key.startswith("re:")]
    default = exact.pop("_default", None)

    def value_of(fqn: str) -> Any:
        if fqn in exact:
            return exact[fqn]
        return next((value for pattern, value in patterns if pattern.fullmatch(fqn)), default)

    return value_of


def _as_tuple(config: Config | Sequence[Config] | None) -> tuple[Config, ...]:
    if config is None:
        return ()
    configs = tuple(config) if isinstance(config, Sequence) and not isinstance(config, str) else (config,)
    for item in configs:
        if not isinstance(item, Config):
            raise TypeError(f"{item!r} is no lamina config; use for example lamina.Int8Dynamic()")
    return configs


def _pattern(key: str) -> re.Pattern[str]:
    try:
        return re.compile(key.removeprefix("re:"))
    except re.error as error:
        raise ValueError(f"config key '{key}' is no regular expression: {error}") from None
