"""int8_lstm: its distance from float, streams, values that are not finite, bad input; lstm tests the rest."""

import pytest
import recurrent

from lamina import _C


@pytest.fixture(autouse=True)
def on_its_isa(request, as_found):
    if "isa" in request.fixturenames:
        _C.force_isa(request.getfixturevalue("isa"))


@pytest.mark.parametrize("batch", [1, 9])
def test_int8_lstm_is_near_the_float_layer(isa, batch):
    recurrent.check_int8_is_near_the_float_layer("int8_lstm", batch)


def test_int8_lstm_takes_its_own_state_again():
    recurrent.check_takes_its_own_state_again("int8_lstm")


def test_int8_lstm_keeps_nan_in_its_sequence(isa):
    recurrent.check_keeps_nan_in_its_sequence("int8_lstm")


def test_int8_lstm_sees_new_weights():
    recurrent.check_int8_sees_new_weights("int8_lstm")


def test_int8_lstm_refuses():
    recurrent.check_int8_refuses("int8_lstm")
