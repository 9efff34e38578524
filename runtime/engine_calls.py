"""Calling an engine: inputs cast to what it takes, outputs by name, values checked for NaN and infinity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Array, Engine
from latentrt.engines.device import to_numpy
from latentrt.engines.errors import BundleError, EngineError

Floats: TypeAlias = NDArray[np.float32]
"""Values on the host, in single precision."""

Conditioning: TypeAlias = Mapping[str, Array]
"""The denoiser's inputs that follow from one text: tensors by name, with a leading dimension of 1."""

_DTYPES = {name: np.dtype(name) for name in ("float32", "float16", "int64", "int32")}


def cast_feeds(engine: Engine, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs, each cast to the element type that the engine takes; arrays on a device stay there where none is needed.

    Inputs that the engine does not know pass as they are: the engine names them in its error.
    """
    specs = engine.inputs
    return {name: _cast(array, specs[name].dtype) if name in specs else array for name, array in feeds.items()}


def _cast(array: Any, dtype: str) -> Array:
    if array.dtype is _DTYPES.get(dtype):  # numpy has one object for each common dtype, and comparing it is cheap
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

    Args:
        engine: The opened engine.
        component: The component's name, for messages.
        names: The outputs to return.
        feeds: Inputs by name.

    Raises:
        BundleError: if the engine lacks one of the outputs.
        EngineError: if the engine fails, or an output holds NaN or infinity, which would end in a black image.
    """
    found = engine.run(cast_feeds(engine, feeds))
    values = {name: to_numpy(output_named(found, component, name)).astype(np.float32, copy=False) for name in names}
    for each in values.values():
        require_finite(each, component)
    return values


def output_named(outputs: Mapping[str, Array], component: str, output: str) -> Array:
    """One of an engine's outputs, wherever it is.

    Raises:
        BundleError: if there is no such output.
    """
    if output not in outputs:
        raise BundleError(f"{component} has no output {output!r}; it has {', '.join(outputs)}")
    return outputs[output]


def require_finite(values: Floats, component: str) -> None:
    """Refuse NaN and infinity, which would end in a black image.

    Raises:
        EngineError: naming the component that computed them.
    """
    if not np.isfinite(values).all():
        raise EngineError(
            f"{component} computed values that are not finite (NaN or infinity); "
            "run it at precision fp32, or with a lower guidance"
        )


def to_host(outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs of an engine, copied from the device where they are on one."""
    return {name: to_numpy(values) for name, values in outputs.items()}
