"""Reading a scheduler config: every value that is read is checked, and a wrong one is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime.samplers.config import Config, parse_request


def test_keys_that_count_as_missing() -> None:
    """Nulls, and keys that only record a default, take the default of the sampler that reads."""
    config = Config.parse({"a": None, "b": 3, "c": 5, "_use_default_values": ["c"], "_class_name": "DDIMScheduler"})
    assert [config.integer(key, 7, 0, 9) for key in "abcd"] == [7, 3, 7, 7]
    assert config.class_name == "DDIMScheduler"
    assert config.positive("a") is None


def test_numpys_values_are_read_like_pythons() -> None:
    """A config made in a program may hold either."""
    config = Config.parse({"flag": np.True_, "count": np.int64(4), "beta": np.float32(0.5), "word": "linear"})
    read = (config.flag("flag"), config.integer("count", 1, 1, 9), config.number("beta", 0), config.positive("beta"))
    assert read == (True, 4, 0.5, 0.5)
    assert list(map(type, read)) == [bool, int, float, float]
    assert config.choice("word", ("linear", "scaled_linear"), "linear") == "linear"


@pytest.mark.parametrize(
    ("read", "value", "expected"),
    [
        (lambda config: config.flag("it"), 1, "true or false"),
        (lambda config: config.integer("it", 1, 1, 9), 2.0, "a whole number"),
        (lambda config: config.integer("it", 1, 1, 9), True, "a whole number"),
        (lambda config: config.integer("it", 1, 1, 9), 10, "1 to 9"),
        (lambda config: config.number("it", 1), "1", "a number"),
        (lambda config: config.number("it", 1), float("nan"), "a finite number"),
        (lambda config: config.number("it", 1), np.float32("inf"), "a finite number"),
        (lambda config: config.positive("it"), 0, "a number above zero"),
        (lambda config: config.choice("it", ("a", "b", "c"), "a"), "d", "one of a, b, c"),
        (lambda config: config.choice("it", ("a", "b", "c"), "a"), ["a"], "one of a, b, c"),
    ],
)
def test_a_wrong_value_is_named(read: Any, value: Any, expected: str) -> None:
    """The sentence says where it stands, what was received, and what would do."""
    with pytest.raises(InvalidRequestError, match=rf"^scheduler config: it is .+, expected {expected}$"):
        read(Config.parse({"it": value}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (["a"], "scheduler_config is list, expected a mapping"),
        ({1: 2}, "scheduler_config is dict, expected a mapping"),
        ({"_class_name": 3}, "_class_name is 3, expected the name"),
        ({"_use_default_values": "abc"}, "_use_default_values is 'abc', expected a list"),
    ],
)
def test_what_is_no_config(config: Any, message: str) -> None:
    """Its form is checked before its values."""
    with pytest.raises(InvalidRequestError, match=message):
        Config.parse(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": True}, "steps is True, expected a whole number"),
        ({"steps": 0}, "steps is 0, expected 1 or more"),
        ({"steps": np.array(4)}, r"steps is array\(4\), expected a whole number"),
        ({"steps": 4, "eta": 1.5}, "eta is 1.5, expected 0 to 1"),
        ({"steps": 4, "mu": float("inf")}, "mu is inf, expected a finite number"),
        ({"sigmas": []}, r"sigmas is \[\], expected at least one number, all finite"),
        ({"sigmas": "123"}, "sigmas is '123', expected at least one number, all finite"),
        ({"timesteps": 5}, "timesteps is 5, expected a sequence of numbers"),
        ({"timesteps": [9, float("nan")]}, "expected at least one number, all finite"),
        ({"timesteps": [9], "sigmas": [1]}, "both timesteps and sigmas are given"),
        ({"timesteps": [9, 8], "steps": 3}, "steps is 3, but 2 custom timesteps are given"),
        ({}, "steps is missing"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    """The argument is named."""
    with pytest.raises(InvalidRequestError, match=message):
        parse_request(**{"steps": None, "timesteps": None, "sigmas": None, "eta": None, "mu": None, **options})


def test_numpys_options_are_taken() -> None:
    """They come out as Python's."""
    request = parse_request(np.int32(2), np.array([900, 100]), None, np.float32(0.5), np.float64(1))
    assert (request.steps, request.timesteps, request.eta, request.mu) == (2, (900.0, 100.0), 0.5, 1.0)
    assert type(request.steps) is int
