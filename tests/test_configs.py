"""Configs say what a user asks for, and anything else is refused by name."""

import dataclasses

import pytest

import lamina
from lamina.configs import AUTO, Config, resolve

INT8, ATTENTION = lamina.Int8Dynamic(), lamina.FusedAttention()


@pytest.mark.parametrize("config", AUTO, ids=lambda c: type(c).__name__)
def test_configs_are_values(config):
    """Frozen, comparable and hashable, so that they can stand in sets, dicts and default arguments."""
    assert dataclasses.is_dataclass(config)
    same = dataclasses.replace(config)
    assert config == same
    assert len({config, same}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.anything = 1


def test_every_config_has_a_handler():
    from lamina.swap import _HANDLERS, _PREPARERS

    kinds = {kind for kind in vars(lamina.configs).values() if isinstance(kind, type) and issubclass(kind, Config)}
    assert {type(config) for config in AUTO} < kinds
    assert kinds - {Config} <= _HANDLERS.keys() | _PREPARERS.keys()


@pytest.mark.parametrize(
    ("config", "expected"),
    [("auto", AUTO), (INT8, (INT8,)), ((INT8, ATTENTION), (INT8, ATTENTION)), ([ATTENTION], (ATTENTION,)), ((), ())],
)
def test_one_config_goes_everywhere(config, expected):
    policy = resolve(config)
    assert policy("") == policy("encoder.0.fc") == expected


def test_dict_policy():
    policy = resolve(
        {
            "head": None,
            "encoder.0.fc": ATTENTION,
            r"re:encoder\.\d+\..*": INT8,
            "re:.*head.*": ATTENTION,
            "_default": (),
        }
    )
    assert policy("head") == ()
    assert policy("encoder.0.fc") == (ATTENTION,)  # the exact name before the pattern
    assert policy("encoder.1.fc") == (INT8,)
    assert policy("xencoder.1.fc") == ()  # a pattern must match the whole name
    assert policy("encoder.1") == ()
    assert policy("my_heads") == (ATTENTION,)
    assert policy("") == ()


def test_the_first_pattern_decides():
    assert resolve({"re:a.*": INT8, "re:.*": ATTENTION})("abc") == (INT8,)
    assert resolve({"re:.*": ATTENTION, "re:a.*": INT8})("abc") == (ATTENTION,)


def test_dict_without_default_leaves_the_rest():
    assert resolve({"a": INT8})("b") == ()
    assert resolve({"a": None, "_default": [INT8, ATTENTION]})("b") == (INT8, ATTENTION)
    assert resolve({})("anything") == ()


@pytest.mark.parametrize("config", ["int8", "", "AUTO"])
def test_refuses_unknown_words(config):
    with pytest.raises(ValueError, match=f"config '{config}' is unknown; use 'auto'"):
        resolve(config)


@pytest.mark.parametrize(
    "config", [lamina.Int8Dynamic, [INT8, "int8"], {"a": 3.0}, {"re:x": [None]}, 5, {"_default": Config}]
)
def test_refuses_what_is_no_config(config):
    with pytest.raises(TypeError):
        resolve(config)


@pytest.mark.parametrize("config", [lamina.Int8Dynamic, [INT8, "int8"], {"a": 3.0}, 5])
def test_refusal_is_one_sentence_that_shows_the_way(config):
    with pytest.raises(TypeError, match=r"is no lamina config; use for example lamina.Int8Dynamic\(\)") as error:
        resolve(config)
    assert "\n" not in str(error.value)


def test_refuses_what_is_no_pattern():
    with pytest.raises(ValueError, match=r"re:\(") as error:
        resolve({"re:(": INT8})
    assert "\n" not in str(error.value)


def test_a_config_without_handler_is_named():
    @dataclasses.dataclass(frozen=True)
    class Unheard(Config):
        pass

    import torch

    with pytest.raises(TypeError, match="Unheard"):
        lamina.swap_(torch.nn.Sequential(torch.nn.Linear(2, 2)), Unheard())
