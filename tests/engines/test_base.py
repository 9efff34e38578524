"""Inputs and outputs of engines are checked, inputs stay bound, and a closed engine says so (``errors``)."""

from __future__ import annotations

import builtins
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import latentrt.engines
from latentrt.engines import Array, Engine, FakeEngine, TensorSpec, errors
from latentrt.engines.base import BaseEngine, check_feeds, check_outputs, nbytes
from latentrt.engines.errors import EngineClosedError, EngineError, LatentRTError, TensorMismatchError

SPECS = {
    spec.name: spec
    for spec in (
        TensorSpec("sample", "float32", ("batch", 4, "height", "width")),
        TensorSpec("timestep", "float32", ("batch",)),
    )
}


def feeds(**changes: object) -> dict[str, Array]:
    """Feeds that fit, with some of them replaced."""
    fitting = {"sample": np.zeros((2, 4, 8, 6), np.float32), "timestep": np.zeros(2, np.float32)}
    return {**fitting, **changes}  # type: ignore[dict-item]


def adder() -> FakeEngine:
    """``sum = left + right``."""
    inputs = [TensorSpec("left", "float32", ("n",)), TensorSpec("right", "float32", ("n",))]
    return FakeEngine(inputs, [TensorSpec("sum", "float32", ("n",))], lambda f: {"sum": f["left"] + f["right"]})


def one(value: float, length: int = 1) -> Array:
    return np.full(length, value, np.float32)


# --- specs and checks


def test_a_spec_reads_as_a_declaration() -> None:
    """A spec prints its name, dtype and shape."""
    assert str(SPECS["sample"]) == "sample: float32[batch, 4, height, width]"


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2), ("int64", 8), ("int8", 1), ("bool", 1)]
)
def test_a_tensors_size(dtype: str, size: int) -> None:
    """A tensor has its element's size times its lengths; a symbol without a length is a KeyError."""
    spec = TensorSpec("x", dtype, ("batch", 3))
    assert nbytes(spec, {"batch": 5}) == 15 * size
    with pytest.raises(KeyError):
        nbytes(spec, {})


def test_feeds_that_fit_pass() -> None:
    """Symbols take any length that agrees, zero included."""
    check_feeds(SPECS, feeds())
    check_feeds(SPECS, feeds(sample=np.zeros((0, 4, 1, 1), np.float32), timestep=np.zeros(0, np.float32)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": one(1)}, "unknown input 'extra'; expected sample, timestep"),
        ({"timestep": np.zeros(2)}, "input 'timestep' is float64, expected float32"),
        ({"timestep": np.zeros(2, ">f4")}, "input 'timestep' is >f4, expected float32"),
        ({"timestep": [0.0, 0.0]}, "input 'timestep' is a list, expected an array timestep: float32[batch]"),
        ({"timestep": np.float32(0)}, "input 'timestep' has shape (), expected timestep: float32[batch]"),
        (
            {"sample": np.zeros((2, 4, 8), np.float32)},
            "input 'sample' has shape (2, 4, 8), expected sample: float32[batch, 4, height, width]",
        ),
        (
            {"sample": np.zeros((2, 3, 8, 6), np.float32)},
            "input 'sample' has shape (2, 3, 8, 6), expected sample: float32[batch, 4, height, width]",
        ),
        ({"timestep": one(0, 3)}, "input 'timestep' has batch=3, but input 'sample' has batch=2"),
    ],
)
def test_feeds_that_do_not_fit(changes: Mapping[str, object], message: str) -> None:
    """The message names the tensor, what was received and what is expected."""
    with pytest.raises(TensorMismatchError) as caught:
        check_feeds(SPECS, feeds(**changes))
    assert str(caught.value) == message


def test_a_missing_feed() -> None:
    """What is missing, expected and received is named."""
    with pytest.raises(TensorMismatchError) as caught:
        check_feeds(SPECS, {"timestep": one(0)})
    assert str(caught.value) == "missing input 'sample'; expected sample, timestep, received timestep"
    with pytest.raises(TensorMismatchError, match="received none"):
        check_feeds(SPECS, {})


def test_one_symbol_twice_in_a_tensor() -> None:
    """A symbol stands for one length within a tensor too."""
    square = {"x": TensorSpec("x", "int64", ("n", "n"))}
    check_feeds(square, {"x": np.zeros((3, 3), np.int64)})
    with pytest.raises(TensorMismatchError, match="n=4, but input 'x' has n=3"):
        check_feeds(square, {"x": np.zeros((3, 4), np.int64)})


def test_a_mismatch_names_the_engine_and_never_reaches_it() -> None:
    """Checks run before the function, and their message begins with the engine's label."""
    with adder() as engine:
        with pytest.raises(TensorMismatchError, match=r"^fake engine: input 'right' has n=2, but input 'left' has n=1"):
            engine.run({"left": one(1), "right": one(1, 2)})
        assert engine.calls == []


# --- bound inputs


def test_a_bound_input_stays_until_it_is_bound_again() -> None:
    """A bound value serves every run; binding one name leaves the others bound."""
    with adder() as engine:
        engine.bind({"left": one(1), "right": one(10)})
        assert engine.run({})["sum"] == engine.run({})["sum"] == 11
        engine.bind({"left": one(2)})
        assert engine.run({})["sum"] == 12


def test_a_feed_overrides_a_bound_input_for_one_run() -> None:
    """The next run sees the bound value again."""
    with adder() as engine:
        engine.bind({"left": one(1)})
        assert engine.run({"left": one(5), "right": one(10)})["sum"] == 15
        assert engine.run({"right": one(10)})["sum"] == 11


def test_binding_an_unknown_name() -> None:
    """The message says what there is, and nothing of that call is bound."""
    with adder() as engine:
        with pytest.raises(TensorMismatchError, match="fake engine: unknown input 'x'; expected left, right"):
            engine.bind({"left": one(1), "x": one(1)})
        with pytest.raises(TensorMismatchError, match="missing input 'left'"):
            engine.run({"right": one(1)})


def test_a_bound_input_is_checked_at_run() -> None:
    """A bound value that does not fit the other inputs is refused when they meet."""
    with adder() as engine:
        engine.bind({"left": one(1, 3)})
        with pytest.raises(TensorMismatchError, match="n=2, but input 'left' has n=3"):
            engine.run({"right": one(1, 2)})


def test_bound_inputs_belong_to_a_thread() -> None:
    """Threads that bind different values at the same time each see their own."""
    with adder() as engine:
        engine.bind({"left": one(-1)})
        barrier = threading.Barrier(8)

        def work(value: int) -> list[float]:
            engine.bind({"left": one(value)})
            barrier.wait(10)
            return [float(engine.run({"right": one(100 * i)})["sum"][0]) for i in range(20)]

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(work, range(8)))
        assert results == [[value + 100 * i for i in range(20)] for value in range(8)]
        assert engine.run({"right": one(0)})["sum"] == -1


def test_a_thread_that_bound_nothing_has_nothing_bound() -> None:
    """What one thread bound is missing in another."""
    with adder() as engine, ThreadPoolExecutor(1) as pool:
        engine.bind({"left": one(1)})
        with pytest.raises(TensorMismatchError, match="missing input 'left'"):
            pool.submit(engine.run, {"right": one(1)}).result()


def test_bound_inputs_do_not_outlive_close() -> None:
    """An engine opened again starts with nothing bound."""
    engine = adder().open()
    engine.bind({"left": one(1)})
    engine.close()
    with engine, pytest.raises(TensorMismatchError, match="missing input 'left'"):
        engine.run({"right": one(1)})


# --- outputs


def giving(function: Callable[[Mapping[str, Array]], Mapping[str, Array]]) -> FakeEngine:
    """An engine of two inputs and two outputs that share a symbol, one of which has a symbol of its own."""
    inputs = [TensorSpec("x", "float32", ("n",)), TensorSpec("y", "float32", ("n", 2))]
    outputs = [TensorSpec("same", "float32", ("n",)), TensorSpec("own", "int64", ("m", "m"))]
    return FakeEngine(inputs, outputs, function)


SAME, OWN = np.zeros(3, np.float32), np.zeros((5, 5), np.int64)


@pytest.mark.parametrize(
    ("received", "message"),
    [
        ({"same": SAME}, "missing output 'own'; expected same, own, received same"),
        ({"same": SAME, "own": OWN, "more": SAME}, "unknown output 'more'; expected same, own"),
        ({"same": SAME.astype(np.float64), "own": OWN}, "output 'same' is float64, expected float32"),
        ({"same": SAME[None], "own": OWN}, "output 'same' has shape (1, 3), expected same: float32[n]"),
        ({"same": SAME[:2], "own": OWN}, "output 'same' has n=2, but input 'x' has n=3"),
        ({"same": SAME, "own": OWN[:4]}, "output 'own' has m=5, but output 'own' has m=4"),
    ],
)
def test_outputs_are_checked(received: Mapping[str, Array], message: str) -> None:
    """An engine that computes anything but what it declares is at fault, and the message says how."""
    feeds = {"x": SAME, "y": np.zeros((3, 2), np.float32)}
    with giving(lambda _: received) as engine, pytest.raises(EngineError) as caught:
        engine.run(feeds)
    assert str(caught.value) == f"fake engine broke its declaration: {message}"
    assert not isinstance(caught.value, ValueError)


def test_outputs_are_checked_at_every_run() -> None:
    """Outputs that were right are not taken for right when inputs or outputs change."""
    results = {"same": SAME, "own": OWN}
    with giving(lambda _: results) as engine:
        feeds = {"x": SAME, "y": np.zeros((3, 2), np.float32)}
        assert engine.run(feeds)["own"] is OWN
        results["own"] = OWN[:2, :2]  # a symbol that no input has is free from run to run
        assert engine.run(feeds)["own"].shape == (2, 2)
        with pytest.raises(EngineError, match="output 'same' has n=3, but input 'x' has n=1"):
            engine.run({"x": SAME[:1], "y": np.zeros((1, 2), np.float32)})
        results["same"] = SAME[:1]
        with pytest.raises(EngineError, match="output 'same' has n=1, but input 'x' has n=3"):
            engine.run(feeds)


def test_arrays_on_a_device_are_checked_where_they_are() -> None:
    """Shape and element type are compared, and nothing is copied."""

    class OnDevice:
        dtype, shape = "bfloat16", (3,)

    class Remote(Counting):
        def _open(self) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
            return {}, {"y": TensorSpec("y", "bfloat16", ("n",))}

        def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
            results: Any = {"y": OnDevice()}
            return dict(results)

    with Remote() as engine:
        assert isinstance(engine.run({})["y"], OnDevice)
        OnDevice.dtype = "float16"
        with pytest.raises(EngineError, match=r"^counting broke its declaration: output 'y' is float16, expected bf"):
            engine.run({})


def test_an_output_without_a_declared_shape_may_have_any() -> None:
    """Names and element types still hold."""
    outputs = {"y": TensorSpec("y", "float32", ())}
    check_outputs(outputs, {"y": SAME}, {}, shapeless={"y"})
    with pytest.raises(EngineError, match="output 'y' is int64"):
        check_outputs(outputs, {"y": OWN}, {}, shapeless={"y"})
    with pytest.raises(EngineError, match=r"has shape \(3,\), expected y: float32\[\]"):
        check_outputs(outputs, {"y": SAME}, {})


def test_lengths_that_nobody_verified_are_not_held() -> None:
    """Of a graph that others exported, names, element types and numbers of dimensions hold, and lengths do not."""
    outputs = [TensorSpec("y", "float32", (7,))]
    engine = FakeEngine([], outputs, lambda _: {"y": SAME})
    with engine, pytest.raises(EngineError, match=r"has shape \(3,\), expected y: float32\[7\]"):
        engine.run({})
    engine.loose_outputs = True
    with engine:
        np.testing.assert_array_equal(engine.run({})["y"], SAME)
    wrong = FakeEngine([], outputs, lambda _: {"y": SAME[None]})
    wrong.loose_outputs = True
    with wrong, pytest.raises(EngineError, match=r"has shape \(1, 3\)"):
        wrong.run({})


# --- opening and closing


class Counting(BaseEngine):
    """Counts how often it is opened and closed."""

    def __init__(self) -> None:
        super().__init__("counting")
        self.opened = self.closed = 0

    def _open(self) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
        threading.Event().wait(0.01)
        self.opened += 1
        return {}, {}

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        return {}

    def _close(self) -> None:
        self.closed += 1


def test_opening_and_closing_twice_does_nothing() -> None:
    """open and close act once, close without open not at all, and an engine can be opened again."""
    engine = Counting()
    engine.close()
    assert engine.open() is engine.open() is engine
    assert (engine.opened, engine.closed) == (1, 0)
    engine.close()
    engine.close()
    assert (engine.opened, engine.closed) == (1, 1)
    with engine as same:
        assert same is engine
        assert engine.run({}) == {}
    assert (engine.opened, engine.closed) == (2, 2)


def test_many_threads_open_once() -> None:
    """Threads that open an engine at the same moment load it once."""
    engine = Counting()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: engine.open(), range(8)))
    assert engine.opened == 1


def test_a_with_statement_closes_after_an_error() -> None:
    """An exception passes through, and the engine is closed."""
    engine = Counting()
    with pytest.raises(ZeroDivisionError), engine:
        raise ZeroDivisionError
    assert engine.closed == 1


@pytest.mark.parametrize("state", ["never opened", "closed"])
@pytest.mark.parametrize("use", ["run", "bind", "inputs", "outputs"])
def test_an_engine_that_is_not_open_says_so(state: str, use: str) -> None:
    """Every use names the engine and the way out."""
    engine = adder()
    if state == "closed":
        engine.open().close()
    with pytest.raises(EngineClosedError, match=r"fake engine is not open; call open\(\) first"):
        getattr(engine, use)({}) if use in ("run", "bind") else getattr(engine, use)


# --- the package and its errors


def test_engines_follow_the_protocol() -> None:
    """The protocol can be checked at run time."""
    with adder() as engine:
        assert isinstance(engine, Engine)
    assert not isinstance(object(), Engine)


def test_public_names_resolve() -> None:
    """Every listed name is there, and another one is an AttributeError."""
    for name in latentrt.engines.__all__:
        assert getattr(latentrt.engines, name) is not None
    with pytest.raises(AttributeError, match=r"'latentrt.engines' has no attribute 'Nothing'"):
        _ = latentrt.engines.Nothing


def walk(base: type[Exception]) -> Iterator[type[Exception]]:
    yield base
    for child in base.__subclasses__():
        yield from walk(child)


def test_errors_form_one_tree() -> None:
    """Every exception class of the module descends from one base."""
    defined = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    tree = {kind for kind in walk(LatentRTError) if kind.__module__ == errors.__name__}
    assert defined == tree
    assert len(tree) > 8


@pytest.mark.parametrize("kind", [k for k in walk(LatentRTError) if k.__module__ == errors.__name__])
def test_every_error_is_a_builtin_too(kind: type[Exception]) -> None:
    """Code that knows nothing of this package can catch each error by a builtin that fits; the message survives."""
    if kind is not LatentRTError:
        general = {builtins.Exception, builtins.BaseException, builtins.object}
        fitting = [base for base in kind.__mro__ if base.__module__ == "builtins" and base not in general]
        assert set(fitting) & {ValueError, RuntimeError, OSError}
    assert kind.__doc__
    assert str(kind("what happened")) == "what happened"
