"""Weights of a bundle's graphs with LoRAs added, to open the graphs with: always computed from the bundle's own."""

from __future__ import annotations

import functools
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import TensorSpec
from latentrt.engines.checks import is_integer
from latentrt.engines.errors import BundleError, SourceError

from ..bundle.manifest import MAX_JSON_BYTES, Graph
from ..bundle.onnx_reader import ExternalTensor
from ..bundle.reader import Bundle
from ..families import Family
from ..lora.reading import Lora, Shapes, Target

LAYERS_FILE = "lora.json"
"""File of a bundle with the layers that a LoRA may change: by part and path the shape of the layer's weights."""

TRANSPOSED = ".T"
"""Suffix of the name of a weight that a graph holds transposed."""

_WEIGHT = ".weight"
_DTYPES = {1: "<f4", 10: "<f2"}  # by TensorProto.DataType
_THREADS = 4  # that compute weights; more wait for memory
_QUANTIZED = ("int8", "fp8", "int8-weights")


class SpareMemory:
    """Memory of weights that nobody uses any more, for those that come next. Safe from many threads.

    Memory that is new to a process has to be made by the system first, page by page. In a virtual machine that may take
    several times as long as computing the weights.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, dict[int, list[NDArray[np.uint8]]]] = {}
        self._closed = False
        self._lock = threading.RLock()  # keep may be called by the garbage collector, in the midst of either

    def array(self, component: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array of any content, for weights of a component."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            known = self._blocks.get(component, {}).get(size)
            block = known.pop() if known else None
        return (np.empty(size, np.uint8) if block is None else block).view(dtype).reshape(shape)

    def keep(self, component: str, arrays: Iterable[NDArray[Any]]) -> None:
        """Keep the memory of a component's arrays, of which there is no other view, in place of that kept before."""
        blocks: dict[int, list[NDArray[np.uint8]]] = {}
        for array in arrays:
            blocks.setdefault(array.nbytes, []).append(array.reshape(-1).view(np.uint8))
        with self._lock:
            if not self._closed:
                self._blocks[component] = blocks

    def close(self) -> None:
        """Keep nothing, now and later."""
        with self._lock:
            self._closed = True
            self._blocks = {}


def target_of(bundle: Bundle, family: Family) -> Target:
    """The layers of a bundle that a LoRA may change.

    Raises:
        BundleError: if it does not say, as those of older versions and of graphs that others exported.
    """
    parts = _layers(bundle)
    return Target(bundle.manifest.source.name or bundle.path.name, family.denoiser, parts.keys(), parts.__getitem__)


def changed_weights(
    bundle: Bundle,
    family: Family,
    graphs: Mapping[str, Graph],
    loras: Sequence[Lora],
    memory: SpareMemory | None = None,
) -> dict[str, dict[str, NDArray[np.generic]]]:
    """The weights that LoRAs change, by component and by their names in its graph.

    Args:
        bundle: The bundle.
        family: Its family.
        graphs: Graphs that are opened, by component.
        loras: Are added one after the other.
        memory: Spare memory for the arrays.

    Raises:
        SourceError: if a layer is quantised in these graphs, or leaves the range of its numbers.
        BundleError: if a graph's weights are not where they can be exchanged.
    """
    shapes, memory = _layers(bundle), memory or SpareMemory()
    wanted: list[tuple[str, str, Callable[[], NDArray[np.generic]]]] = []
    for part in dict.fromkeys(part for lora in loras for part in lora.factors):
        own = {name: graph for name, graph in graphs.items() if part_of(name, family) == part}
        placed = {name: dict(_places(bundle, graph)) for name, graph in own.items()}
        for path in dict.fromkeys(path for lora in loras for path in lora.factors.get(part, ())):
            changing = [lora for lora in loras if path in lora.factors.get(part, ())]
            users = [name for name, places in placed.items() if path in places]
            if not users and any(graph.precision in _QUANTIZED for graph in own.values()):
                raise SourceError(
                    f"{changing[0].name} changes {part}.{path}, which is quantised in this bundle; take a higher "
                    "precision, or fuse the LoRA when the bundle is built"
                )
            for name in users:  # a layer that no graph has does not matter, such as a text encoder's last
                tensor = placed[name][path]
                if (tensor.dims[::-1] if tensor.name.endswith(TRANSPOSED) else tensor.dims) != shapes[part][path]:
                    raise BundleError(f"{own[name].file} has other weights than {LAYERS_FILE} says; build it again")
                compute = functools.partial(_changed, bundle, name, own[name], tensor, part, path, changing, memory)
                wanted.append((name, tensor.name, compute))
    found: dict[str, dict[str, NDArray[np.generic]]] = {}
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _THREADS)) as pool:  # numpy lets others run meanwhile
        computed = pool.map(lambda each: each[2](), wanted)
        for (name, weight, _), values in zip(wanted, computed, strict=True):
            found.setdefault(name, {})[weight] = values
    return found


def exchangeable_weights(bundle: Bundle, component: str, graph: Graph, family: Family) -> tuple[TensorSpec, ...]:
    """Weights of a component that LoRAs may change and that are matrices, or kernels of one pixel.

    Raises:
        BundleError: if the bundle does not say which layers it has.
    """
    known = _layers(bundle).get(part_of(component, family), {})
    return tuple(
        TensorSpec(tensor.name, str(np.dtype(_DTYPES[tensor.data_type])), tensor.dims)
        for path, tensor in (_places(bundle, graph) if known else ())
        if known.get(path) is not None and tensor.data_type in _DTYPES and set(tensor.dims[2:]) <= {1}
    )


def part_of(component: str, family: Family) -> str:
    """The part of the model that a component's weights are of: the denoiser for each of its stages."""
    return family.denoiser if component.startswith(f"{family.denoiser}_") else component


def _changed(
    bundle: Bundle,
    component: str,
    graph: Graph,
    tensor: ExternalTensor,
    part: str,
    path: str,
    loras: Sequence[Lora],
    memory: SpareMemory,
) -> NDArray[np.generic]:
    if tensor.data_type not in _DTYPES:
        raise BundleError(f"{graph.file} is {graph.precision}, in which no LoRA can be put on; take fp32 or fp16")
    folder = graph.file.rpartition("/")[0]
    file = bundle.file(f"{folder}/{tensor.location}" if folder else tensor.location)
    dtype = np.dtype(_DTYPES[tensor.data_type])
    stored = memory.array(component, tensor.dims, dtype)
    # Read, not mapped: the sum needs memory of its own anyway, and pages of a mapping cost more than a copy.
    with file.open("rb", buffering=0) as stream:
        stream.seek(tensor.offset)
        if stream.readinto(stored.reshape(-1).view(np.uint8).data) != stored.nbytes:
            raise BundleError(f"{file} ends before the weights of {part}.{path}; build the bundle again")
    weight = stored.astype(np.float32, copy=False)
    for lora in loras:
        lora.add_to(part, path, weight, transposed=tensor.name.endswith(TRANSPOSED))
    if stored.dtype == np.float32:
        return weight
    with np.errstate(over="ignore"):
        changed = weight.astype(stored.dtype)
    if not np.isfinite(changed).all():
        raise SourceError(f"with {loras[-1].name} the weights of {part}.{path} leave the range of {graph.precision}")
    return changed


def _places(bundle: Bundle, graph: Graph) -> Iterator[tuple[str, ExternalTensor]]:
    """The weights of a graph that can be exchanged, by the path of their layer."""
    for tensor in bundle.external_tensors(graph):
        # The first part of a name is what the exporter's wrapper calls the model.
        path = tensor.name.removesuffix(TRANSPOSED).partition(".")[2]
        if path.endswith(_WEIGHT) and len(tensor.dims) > 1:
            yield path.removesuffix(_WEIGHT), tensor


def _layers(bundle: Bundle) -> dict[str, Shapes]:
    """Content of the file of layers; whoever wrote it, it is a mapping from paths to shapes.

    Raises:
        BundleError: if the bundle has none, as those of older versions and of graphs that others exported.
    """
    if LAYERS_FILE not in bundle.manifest.files:
        raise BundleError(
            f"{bundle.path} does not say which layers it has, so no LoRA can be put on; build it again from the "
            "model's weights, or fuse the LoRA with build-engine --lora"
        )
    path = bundle.file(LAYERS_FILE)
    with path.open("rb") as stream:
        content = stream.read(MAX_JSON_BYTES + 1)
    try:
        parts: Any = json.loads(content) if len(content) <= MAX_JSON_BYTES else None
        return {
            str(part): {
                str(layer): None if shape is None else tuple(map(_length, shape)) for layer, shape in of.items()
            }
            for part, of in parts.items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path} is not a list of layers; build the bundle again") from error


def _length(value: object) -> int:
    if not is_integer(value) or not 0 < value < 2**31:
        raise ValueError
    return value
