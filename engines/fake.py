"""An engine made of a Python function: for tests of code that uses engines, here and elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from .base import Array, BaseEngine, TensorSpec


class FakeEngine(BaseEngine):
    """Runs ``function`` in place of a graph, with the same checks as a real engine, and records its calls.

    Args:
        inputs: Specs of the function's inputs.
        outputs: Specs of its outputs.
        function: Maps inputs by name to outputs by name.

    Example:
        >>> spec = TensorSpec("x", "float32", ("n",))
        >>> double = FakeEngine([spec], [TensorSpec("y", "float32", ("n",))], lambda feeds: {"y": feeds["x"] * 2})
        >>> with double as engine:
        ...     engine.run({"x": np.ones(2, np.float32)})["y"]
        array([2., 2.], dtype=float32)
    """

    def __init__(
        self,
        inputs: Iterable[TensorSpec],
        outputs: Iterable[TensorSpec],
        function: Callable[[Mapping[str, Array]], Mapping[str, Array]],
    ) -> None:
        super().__init__("fake engine")
        self._declared = {spec.name: spec for spec in inputs}, {spec.name: spec for spec in outputs}
        self._function = function
        self.calls: list[dict[str, Array]] = []
        """Copies of the inputs of every run, oldest first."""

    def _open(self) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
        return self._declared

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        self.calls.append({name: np.array(array) for name, array in feeds.items()})
        return {name: np.asarray(array) for name, array in self._function(feeds).items()}
