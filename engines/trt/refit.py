"""Other weights for a plan that was built refittable, checked before any of them is touched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..base import Array
from ..errors import EngineError, InvalidRequestError, TensorMismatchError
from .sdk import Sdk, failure, sdk_errors, sdk_log

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT64": "int64", "INT32": "int32", "INT8": "int8", "BOOL": "bool"}


def list_weights(sdk: Sdk, engine: Any, label: str) -> dict[str, tuple[str, int]]:
    """Weights that can be refitted: name -> element type and number of values."""
    with sdk_errors(sdk, f"list the weights of {label}"):
        refitter = sdk.module.Refitter(engine, sdk_log(sdk).handle)
        found = {}
        for name in refitter.get_all_weights():
            prototype = refitter.get_weights_prototype(name)
            found[name] = _DTYPES.get(prototype.dtype.name, prototype.dtype.name), int(prototype.size)
        return found


def check_weights(sdk: Sdk, engine: Any, weights: Mapping[str, Array], label: str) -> None:
    """Hold weights against those of the plan.

    Raises:
        InvalidRequestError: for a name that the plan has no weights of.
        TensorMismatchError: for another size or element type.
    """
    if not weights:
        return
    known = list_weights(sdk, engine, label)
    if unknown := sorted(weights.keys() - known.keys()):
        raise InvalidRequestError(
            f"{label} has no weights {unknown[0]!r} to refit (and {len(unknown) - 1} more that it lacks); it has "
            f"{len(known)}, named as the initializers of its graph, e.g. {min(known, default='none')!r}"
        )
    for name, array in weights.items():
        dtype, count = known[name]
        if str(array.dtype) != dtype or math.prod(array.shape) != count:
            raise TensorMismatchError(
                f"{label}: weights {name!r} are {array.dtype}, {math.prod(array.shape)} values; "
                f"expected {dtype}, {count} values"
            )


def put_weights(sdk: Sdk, engine: Any, weights: Mapping[str, Array], label: str) -> None:
    """Put weights in place, while nothing runs.

    Raises:
        EngineError: if the SDK refuses; some weights may be in place then.
    """
    # Held until the SDK is done: it reads them where they lie.
    held = {name: np.ascontiguousarray(array) for name, array in weights.items()}
    module = sdk.module
    with sdk_errors(sdk, f"refit {label}") as errors:
        refitter = module.Refitter(engine, sdk_log(sdk).handle)
        for name, array in held.items():
            kind = refitter.get_weights_prototype(name).dtype
            if not refitter.set_named_weights(name, module.Weights(kind, array.ctypes.data, array.size)):
                raise failure(sdk, f"refit {name!r} of {label}", errors)
        if missing := refitter.get_missing_weights():
            raise EngineError(
                f"{label} merges weights that must be refitted together; give also {', '.join(sorted(missing)[:8])}"
            )
        if not refitter.refit_cuda_engine():
            raise failure(sdk, f"refit {label}", errors)
