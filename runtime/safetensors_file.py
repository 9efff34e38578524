"""Tensors of safetensors files, as numbers that numpy has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file holds it.

    Attributes:
        name: Its name.
        kind: Its element type, as the format calls it.
        shape: Its lengths.
        data: Its bytes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    data: bytes

    def floats(self) -> NDArray[np.float32] | None:
        """Its values, what fp32 cannot hold as infinity; ``None`` if its type is not F64, F32, F16 or BF16."""
        if self.kind == "BF16":  # the upper half of fp32
            values = (np.frombuffer(self.data, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif self.kind in _TYPES:
            with np.errstate(over="ignore"):
                values = np.frombuffer(self.data, _TYPES[self.kind]).astype(np.float32)
        else:
            return None
        return values.reshape(self.shape)


def stored_tensors(content: bytes) -> list[StoredTensor]:
    """Tensors of a whole file; names, types and places are checked by the safetensors library.

    Raises:
        ValueError: saying in one line what is wrong with the file.
    """
    import safetensors  # here, since most pipelines need no such file

    try:
        found: list[tuple[str, Mapping[str, Any]]] = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise ValueError((str(error).strip().splitlines() or [type(error).__name__])[0][:200]) from error
    return [StoredTensor(name, each["dtype"], tuple(each["shape"]), each["data"]) for name, each in found]
