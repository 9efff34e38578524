"""The layers that a LoRA may change: found again in an exported graph, and told to whoever runs it.

torch's exporter folds the transposition of a linear layer's weights into them and gives them a name of its own. Here
they get the layer's name back, so that the runtime can open a graph with other weights in their place.
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

_SAMPLED = 16  # rows and columns that are compared before whole matrices are


def adaptable(component: Component) -> bool:
    """Whether a LoRA may change a component: the denoiser and text encoders, and no ControlNet."""
    roles = component.roles
    return (roles is not None and not roles.residuals) or component.name.startswith("text_encoder")


def name_folded_weights(graph: ir.Graph, module: nn.Module) -> None:
    """Name matrices that were transposed into a graph after the layers that they come from.

    Cases:
        1. A constant that is one layer's weights transposed, and no other's, gets that parameter's name with
           :data:`~latentrt.runtime.components.lora_weights.TRANSPOSED` behind it.
        2. Everything else keeps its name: weights that the graph uses as they are have it already.

    Args:
        graph: Changed in place.
        module: What it was exported from.
    """
    folded: dict[bytes, list[tuple[str, Tensor]]] = {}
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2 and name.endswith(".weight") and name not in graph.initializers:
            folded.setdefault(_sample(parameter), []).append((name, parameter))
    for value in list(graph.initializers.values()):
        constant = value.const_value
        if constant is None or len(constant.shape) != 2 or value.dtype is None or not value.dtype.is_floating_point():
            continue
        matrix = constant.numpy().T
        alike = [name for name, weight in folded.get(_sample(matrix), ()) if _equal(matrix, weight)]
        if len(alike) == 1 and (new := f"{alike[0]}{TRANSPOSED}") not in graph.initializers:
            value.name = new


def record_layers(component: Component, directory: Path) -> None:
    """Write the layers of a component that a LoRA may change, with the shapes of their weights, into the bundle.

    Layers whose weights are equal are told without a shape: in a graph they may be one constant, which cannot be
    changed for one of them alone.

    Args:
        component: Adaptable or not; nothing is written for one that is not.
        directory: The bundle under construction; what its file has of other components stays.
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
    """Some of a matrix's values, as fp32."""
    rows, columns = matrix.shape
    few = matrix[:: max(1, rows // _SAMPLED), :: max(1, columns // _SAMPLED)]
    values = few.detach().float().numpy() if isinstance(few, Tensor) else few
    return np.ascontiguousarray(values, np.float32).tobytes()


def _equal(matrix: NDArray[np.generic], weight: Tensor) -> bool:
    return matrix.shape == tuple(weight.shape) and np.array_equal(
        matrix.astype(np.float32, copy=False), weight.detach().float().numpy()
    )
