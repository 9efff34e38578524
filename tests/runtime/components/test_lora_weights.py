"""Weights of LoRAs: whose they are in a bundle, which can be exchanged, and memory that is used again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from latentrt.engines.errors import BundleError
from latentrt.runtime import Bundle
from latentrt.runtime.components.lora_switching import read_loras
from latentrt.runtime.components.lora_weights import (
    LAYERS_FILE,
    SpareMemory,
    exchangeable_weights,
    part_of,
    target_of,
)
from latentrt.runtime.families import family_of


def test_memory_is_used_again_by_its_own_component() -> None:
    """A block of the right size comes back whatever its type is; none goes to another component, or twice."""
    memory = SpareMemory()
    first = memory.array("unet", (4, 2), np.dtype(np.float32))
    address = first.__array_interface__["data"][0]
    memory.keep("unet", [first])
    other = memory.array("text_encoder", (4, 2), np.dtype(np.float32))
    assert other.__array_interface__["data"][0] != address
    again = memory.array("unet", (16,), np.dtype(np.float16))
    assert (again.shape, again.dtype, again.__array_interface__["data"][0]) == ((16,), np.float16, address)
    assert memory.array("unet", (16,), np.dtype(np.float16)).__array_interface__["data"][0] != address


def test_memory_that_is_closed_keeps_nothing() -> None:
    """Neither what was kept before nor what comes later."""
    memory = SpareMemory()
    first = memory.array("unet", (8,), np.dtype(np.float32))
    memory.close()
    memory.keep("unet", [first])
    assert not np.shares_memory(memory.array("unet", (8,), np.dtype(np.float32)), first)


def test_stages_have_the_weights_of_their_denoiser(tiny_bundles: dict[str, Path]) -> None:
    """Other components are parts of their own."""
    family = family_of(Bundle.open(tiny_bundles["sd1"]).manifest)
    assert [part_of(name, family) for name in ("unet_step", "unet_prompt", "unet", "text_encoder")] == [
        *("unet", "unet", "unet", "text_encoder")
    ]


def test_weights_that_can_be_exchanged_are_matrices(tiny_bundles: dict[str, Path]) -> None:
    """They are of the shape that the file of layers says, or of it transposed."""
    bundle = Bundle.open(tiny_bundles["sd1"])
    family, graph = family_of(bundle.manifest), bundle.graph("unet_step", "opset20-fp32")
    specs = exchangeable_weights(bundle, "unet_step", graph, family)
    assert specs
    assert {spec.dtype for spec in specs} == {"float32"}
    assert all(set(spec.shape[2:]) <= {1} for spec in specs)
    assert target_of(bundle, family).denoiser == "unet"


@pytest.mark.parametrize("length", [0, -1, 2.0, True, "3", 2**31])
def test_a_file_of_layers_with_lengths_that_are_none(tiny_bundle: Path, length: object) -> None:
    """The bundle is refused by name of the file, whoever wrote it."""
    path = tiny_bundle / LAYERS_FILE
    layers = json.loads(path.read_text())
    part = next(iter(layers.values()))
    part[next(name for name, shape in part.items() if shape)] = [length, 4]
    path.write_text(json.dumps(layers))
    manifest = json.loads((tiny_bundle / "bundle.json").read_text())
    manifest["files"][LAYERS_FILE]["size"] = path.stat().st_size
    (tiny_bundle / "bundle.json").write_text(json.dumps(manifest))
    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(BundleError, match=r"lora\.json is not a list of layers; build the bundle again"):
        target_of(bundle, family_of(bundle.manifest))
    assert read_loras(bundle, family_of(bundle.manifest), ()) == []
