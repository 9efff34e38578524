"""Dependencies of values on graph inputs, on graphs small enough to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from latentrt.exporter.passes.dependencies import dependencies

Parse = Callable[[str], ir.Graph]
Run = Callable[[ir.Graph, Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]


def test_dependencies_follow_inputs_through_nodes(parse: Parse, denoiser: str) -> None:
    """A value depends on every graph input that reaches it, and a constant on none."""
    found = {value.name: set(names) for value, names in dependencies(parse(denoiser)).items()}
    assert found["keys"] == {"text"}
    assert found["clock"] == {"time"}
    assert found["third"] == {"latents", "time"}
    assert found["out"] == {"latents", "time", "text"}


def test_dependencies_see_what_a_subgraph_captures(parse: Parse) -> None:
    """An If depends on what its branches take from outside."""
    graph = parse(
        """
        branching (bool which, float[2] a, float[2] b) => (float[2] out) {
            out = If (which) <
                then_branch = yes () => (float[2] y) { y = Identity(a) },
                else_branch = no () => (float[2] n) { n = Neg(b) }
            >
        }
        """
    )
    found = {value.name: set(names) for value, names in dependencies(graph).items()}
    assert found["out"] == {"which", "a", "b"}
