"""Calls of engines: inputs are cast to what a graph takes, outputs are found by name and must be finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from latentrt.engines import FakeEngine, TensorSpec
from latentrt.engines.errors import BundleError, EngineError
from latentrt.runtime.engine_calls import cast_feeds, output_of, outputs_of, to_host


def engine(value: float = 1.0) -> FakeEngine:
    """Doubles its input in fp16, and counts its rows."""
    return FakeEngine(
        [TensorSpec("x", "float16", ("batch", 2)), TensorSpec("ids", "int32", ("batch",))],
        [TensorSpec("double", "float16", ("batch", 2)), TensorSpec("ids", "int32", ("batch",))],
        lambda feeds: {"double": feeds["x"] * np.float16(2 * value), "ids": feeds["ids"]},
    ).open()


FEEDS = {"x": np.array([[1.5, -2.0]], np.float32), "ids": np.array([7], np.int64)}


class OnDevice:
    """An array on a device, whose types have names alone."""

    def __init__(self, values: Any) -> None:
        self.values, self.dtype, self.shape = values, str(values.dtype), values.shape

    def numpy(self) -> Any:
        return self.values

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.values.__dlpack_device__()


def test_inputs_are_cast_to_what_the_engine_takes() -> None:
    """Names that the engine does not know pass as they are, and so does what has the right type."""
    exact = np.array([[1, 2]], np.float16)
    cast = cast_feeds(engine(), {**FEEDS, "other": FEEDS["x"]})
    assert {name: str(values.dtype) for name, values in cast.items()} == {
        "x": "float16",
        "ids": "int32",
        "other": "float32",
    }
    np.testing.assert_array_equal(cast["x"], FEEDS["x"])
    assert cast_feeds(engine(), {"x": exact})["x"] is exact


def test_what_is_on_a_device_stays_there_unless_it_is_cast() -> None:
    """An array of another type is fetched; :func:`to_host` fetches every one."""
    same, other = OnDevice(np.ones((1, 2), np.float16)), OnDevice(np.ones((1, 2), np.float32))
    cast: dict[str, Any] = cast_feeds(engine(), {"x": same})  # type: ignore[dict-item]
    assert cast["x"] is same
    cast = cast_feeds(engine(), {"x": other})  # type: ignore[dict-item]
    assert isinstance(cast["x"], np.ndarray)
    assert cast["x"].dtype == np.float16
    assert to_host({"x": other})["x"] is other.values  # type: ignore[dict-item]


def test_outputs_come_in_float32_by_name() -> None:
    """Only those that are asked for, and one alone without its name."""
    found = outputs_of(engine(), "unet", ("double",), FEEDS)
    assert list(found) == ["double"]
    assert found["double"].dtype == np.float32
    np.testing.assert_array_equal(found["double"], 2 * FEEDS["x"])
    np.testing.assert_array_equal(output_of(engine(), "unet", "ids", FEEDS), [7])


def test_a_missing_output_is_named() -> None:
    """The sentence lists those that there are."""
    with pytest.raises(BundleError, match="unet has no output 'sample'; it has double, ids"):
        output_of(engine(), "unet", "sample", FEEDS)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    """The component that computed them is named; outputs that nobody asked for are not looked at."""
    with pytest.raises(EngineError, match="unet computed values that are not finite"):
        outputs_of(engine(value), "unet", ("ids", "double"), FEEDS)
    assert outputs_of(engine(value), "unet", ("ids",), FEEDS)["ids"].tolist() == [7]
