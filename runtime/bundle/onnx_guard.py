"""Which files an ONNX graph may name, decided before any SDK opens it.

A tensor of an ONNX graph may live in another file ("external data"). The graph gives that file's path, and the
ONNX package and the runtimes were led out of the model's directory that way again and again: by parent paths
(CVE-2022-25882, CVE-2024-27318), by symbolic and hard links (CVE-2026-27489, CVE-2026-34446, CVE-2026-34447),
by unknown keys of the external data (CVE-2026-34445), and by ONNX Runtime's own marker for "this tensor is at
that address in memory". So the runtime reads the graph itself, see :mod:`latentrt.runtime.bundle.onnx_reader`.

Not covered are a file that someone exchanges between this check and the SDK's own opening of it
(whoever can write into the bundle while it is in use has to be trusted), and what nodes compute at run time.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from latentrt.engines.errors import BundleError, BundleIntegrityError

from .manifest import Graph
from .onnx_reader import ExternalTensor, OnnxReader
from .paths import check_path, plain_file

MAX_GRAPH_BYTES = 2**31 - 1
"""Largest graph file; protobuf itself reads no larger message."""


@dataclass(frozen=True)
class GraphSummary:
    """Counts of an ONNX file.

    Attributes:
        nodes: Nodes, those of sub-graphs among them.
        weights: Elements of its initializers.
        nbytes: Their size in bytes, wherever they are stored.
    """

    nodes: int
    weights: int
    nbytes: int


def check_graph(root: Path, graph: Graph) -> tuple[ExternalTensor, ...]:
    """Make sure that an SDK which opens ``graph`` reads nothing but the files that the manifest lists for it.

    Args:
        root: Directory of the bundle.
        graph: One of its manifest's graphs.

    Returns:
        The external tensors.

    Raises:
        BundleIntegrityError: naming the graph, and the tensor where there is one.
    """
    plain_file(root, graph.file)
    sizes = {path: plain_file(root, path).st_size for path in graph.external}
    directory = graph.file.rpartition("/")[0]
    tensors = external_tensors(root / graph.file)
    for tensor in tensors:
        where = f"{root / graph.file}: tensor {tensor.name!r}"
        try:
            check_path(tensor.location, "its external file")
        except BundleError as error:
            raise BundleIntegrityError(f"{where}: {error}") from None
        path = f"{directory}/{tensor.location}" if directory else tensor.location
        if path not in sizes:
            raise BundleIntegrityError(
                f"{where} names the file {path!r}, which the manifest does not list for the graph"
            )
        size, first = sizes[path], tensor.offset
        length = max(size - first, 0) if tensor.length is None else tensor.length
        if first + length > size:
            raise BundleIntegrityError(f"{where} is at bytes {first} to {first + length} of {path!r}, which has {size}")
        if length != tensor.nbytes:
            raise BundleIntegrityError(
                f"{where} has {length} bytes, but its shape {list(tensor.dims)} needs {tensor.nbytes}"
            )
    return tensors


def summarize(path: Path) -> GraphSummary:
    """Count the nodes and weights of an ONNX file.

    Raises:
        BundleIntegrityError: as :func:`external_tensors` does.
    """
    reader = _read(path)
    return GraphSummary(reader.nodes, reader.weights, reader.weight_bytes)


def external_tensors(path: Path) -> tuple[ExternalTensor, ...]:
    """Read all tensors of an ONNX file and return those that are in other files.

    Initializers, sparse initializers and attributes are visited in the graph, its sub-graphs, the functions and
    the training information.

    Raises:
        BundleIntegrityError: if the file is not an ONNX model, is damaged, or has contents that no exported model has.
    """
    return tuple(_read(path).found)


def _read(path: Path) -> OnnxReader:
    """Walk through a file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not 0 < size <= MAX_GRAPH_BYTES:
                raise BundleIntegrityError(f"{path} has {size} bytes, expected an ONNX model of 1 to {MAX_GRAPH_BYTES}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                reader = OnnxReader(data, str(path))
                reader.read()
                return reader
    except OSError as error:
        raise BundleIntegrityError(f"{path} cannot be read: {error.strerror or error}") from error
