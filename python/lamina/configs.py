"""What a user asks for: one frozen dataclass per kind of replacement.

`swap_` and `accelerate` take one config, a sequence of them (tried in order, the first that concerns a layer decides),
or a dict policy `{fqn or "re:pattern": config or None, "_default": config}`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Base of all configs."""


@dataclass(frozen=True)
class Int8Dynamic(Config):
    """nn.Linear -> lamina.nn.Int8Linear: int8 weights per channel, activations quantized per row on the fly."""


@dataclass(frozen=True)
class FusedAttention(Config):
    """Attention -> lamina.ops.attention: transformers models (attn_implementation="lamina") and reference models."""


ConfigLike = Config | Sequence[Config] | Mapping[str, Config | Sequence[Config] | None]

AUTO: tuple[Config, ...] = (Int8Dynamic(), FusedAttention())


def resolve(config: ConfigLike | str) -> Callable[[str], tuple[Config, ...]]:
    """A function from a module's name to the configs that may take it. Raises for anything that is no policy."""
    if isinstance(config, str):
        if config != "auto":
            raise ValueError(f"config '{config}' is unknown; use 'auto', a config, a sequence of configs or a dict")
        config = AUTO
    if isinstance(config, Mapping):
        exact = {key: _as_tuple(value) for key, value in config.items() if not key.startswith("re:")}
        patterns = [(_pattern(key), _as_tuple(value)) for key, value in config.items() if key.startswith("re:")]
        default = exact.pop("_default", ())

        def policy(fqn: str) -> tuple[Config, ...]:
            if fqn in exact:
                return exact[fqn]
            return next((configs for pattern, configs in patterns if pattern.fullmatch(fqn)), default)

        return policy
    configs = _as_tuple(config)
    return lambda fqn: configs


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
