"""Calling an engine: inputs cast to what it takes, outputs by name, values checked for NaN and infinity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Array, Engine
from latentrt.engines.device import to_numpy
from latentrt.engines.errors import BundleError, EngineError

Floats = NDArray[np.float32]


_DTYPES = {name: np.dtype(name) for name in ("float32", "float16", "int64", "int32")}


def cast_feeds(engine: Engine, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs in the element types that an engine takes."""
    specs = engine.inputs
    return {name: _cast(array, specs[name].dtype) if name in specs else array for name, array in feeds.items()}


def _cast(array: Any, dtype: str) -> Array:
    if array.dtype is _DTYPES.get(dtype):  # of the usual ones there is one object each
        return cast(Array, array)
    if not isinstance(array, np.ndarray):
        if str(array.dtype) == dtype:
            return cast(Array, array)  # stays on the device
        array = to_numpy(array)
    return cast(Array, array.astype(dtype, copy=False))


def output_of(engine: Engine, component: str, output: str, feeds: Mapping[str, Array]) -> Floats:
    """One output of an engine, see :func:`outputs_of`."""
    return outputs_of(engine, component, (output,), feeds)[output]


def outputs_of(engine: Engine, component: str, names: Sequence[str], feeds: Mapping[str, Array]) -> dict[str, Floats]:
    """Outputs of an engine in float32, on the host; every input is cast to the element type that its graph takes.

    Raises:
        BundleError: if the engine lacks one of the outputs.
        EngineError: if the engine fails, or an output holds NaN or infinity, which would end in a black picture.
    """
    found = engine.run(cast_feeds(engine, feeds))
    values = {name: to_numpy(output_named(found, component, name)).astype(np.float32, copy=False) for name in names}
    for each in values.values():
        require_finite(each, component)
    return values


def output_named(outputs: Mapping[str, Array], component: str, output: str) -> Array:
    """One of the outputs.

    Raises:
        BundleError: if there is no such output.
    """
    if output not in outputs:
        raise BundleError(f"{component} has no output {output!r}; it has {', '.join(outputs)}")
    return outputs[output]


def require_finite(values: Floats, component: str) -> None:
    """Refuse what would end in a black picture.

    Raises:
        EngineError: if there is a NaN or an infinity.
    """
    if not np.isfinite(values).all():
        raise EngineError(
            f"{component} computed values that are not finite (NaN or infinity); "
            "run it at precision fp32, or with a lower guidance"
        )


def to_host(outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs of an engine, on the host."""
    return {name: to_numpy(values) for name, values in outputs.items()}


Floats = NDArray[np.float32]


Floats = NDArray[np.float32]


Floats = NDArray[np.float32]


Conditioning: TypeAlias = Mapping[str, Array]
"""What one text comes to for the denoiser: tensors by name, with a leading dimension of 1."""


Floats = NDArray[np.float32]


Floats = NDArray[np.float32]
