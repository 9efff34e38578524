"""Find the layers that a LoRA may change in an exported graph, and record them for the runtime.

torch's exporter folds the transposition of a linear layer's weights into the constant, under a name of its own. This
module gives the constant its layer's name, so that the runtime can open the graph with other weights in its place.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor, nn

from latentrt.runtime.components.lora_weights import LAYERS_FILE, TRANSPOSED

from ..components import Component

_SAMPLED = 16  # rows and columns, at most about twice as many, that stand for a matrix in a first comparison


def adaptable(component: Component) -> bool:
    """Whether a LoRA may change a component: a denoiser or text encoder may be changed, a ControlNet may not."""
    roles = component.roles
    return (roles is not None and not roles.residuals) or component.name.startswith("text_encoder")


def name_folded_weights(graph: ir.Graph, module: nn.Module) -> None:
    """Name the matrices that the exporter transposed after the layers that they come from.

    Cases:
        1. A constant equals the transposed weights of exactly one layer: it gets that parameter's name, with
           :data:`~latentrt.runtime.components.lora_weights.TRANSPOSED` behind it.
        2. A constant equals those of several layers, or of none, or is no matrix of floating point: it keeps its name.
        3. A layer whose weights the graph has under their own name is left out of the search.

    Args:
        graph: Changed in place.
        module: The module that the graph was exported from.
    """
    # Case 3. Layers are found by a sample of their values; whole matrices are compared where samples are equal.
    folded: dict[bytes, list[tuple[str, Tensor]]] = {}
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2 and name.endswith(".weight") and name not in graph.initializers:
            folded.setdefault(_sample(parameter), []).append((name, parameter))
    for value in list(graph.initializers.values()):
        # Case 2.
        constant = value.const_value
        if constant is None or len(constant.shape) != 2 or value.dtype is None or not value.dtype.is_floating_point():
            continue
        # Case 1.
        matrix = constant.numpy().T
        alike = [name for name, weight in folded.get(_sample(matrix), ()) if _equal(matrix, weight)]
        if len(alike) == 1 and (new := f"{alike[0]}{TRANSPOSED}") not in graph.initializers:
            value.name = new


def record_layers(component: Component, directory: Path) -> None:
    """Write the layers of a component that a LoRA may change, with the shapes of their weights, into the bundle.

    Layers with equal weights are written with ``null`` for a shape: in a graph they may be one constant, which cannot
    change for one of them alone.

    Args:
        component: The component. If it is not :func:`adaptable`, nothing is written.
        directory: The bundle under construction. Entries of other components in its file stay.
    """
    if not adaptable(component):
        return
    path = directory / LAYERS_FILE
    parts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    weights = {
        name.partition(".")[2]: layer.weight
        for name, layer in component.module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    alike: dict[tuple[tuple[int, ...], bytes], list[str]] = {}
    for name, weight in weights.items():
        alike.setdefault((tuple(weight.shape), _sample(weight.flatten(1))), []).append(name)
    shared = {
        name
        for names in alike.values()
        for name in names
        if any(other != name and bool((weights[other] == weights[name]).all()) for other in names)
    }
    parts[component.name] = {name: None if name in shared else list(weight.shape) for name, weight in weights.items()}
    path.write_text(json.dumps(parts, sort_keys=True, separators=(",", ":")) + "\n", encoding="utf-8")


def _sample(matrix: Tensor | NDArray[np.generic]) -> bytes:
    """Return values of a matrix, evenly spread over it, as the bytes of fp32."""
    rows, columns = matrix.shape
    few = matrix[:: max(1, rows // _SAMPLED), :: max(1, columns // _SAMPLED)]
    values = few.detach().float().numpy() if isinstance(few, Tensor) else few
    return np.ascontiguousarray(values, np.float32).tobytes()


def _equal(matrix: NDArray[np.generic], weight: Tensor) -> bool:
    return matrix.shape == tuple(weight.shape) and np.array_equal(
        matrix.astype(np.float32, copy=False), weight.detach().float().numpy()
    )
