"""Each tensor of a single file goes to the weight that it is in the directory, and that diffusers reads it as."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from latentrt.exporter.graphs.export import export_component
from latentrt.exporter.graphs.targets import PORTABLE
from latentrt.exporter.model import Model
from latentrt.exporter.source.opening import Reading, open_source
from latentrt.runtime import Bundle

Checkpoints = Callable[[str], Path]

KINDS = ("sd1", "sd2", "sdxl")


def their_reading(kind: str, file: Path, directory: Path) -> dict[str, dict[str, Tensor]]:
    """What diffusers reads, by part."""
    tensors = load_file(file)
    found: dict[str, dict[str, Tensor]] = {}
    for name, model in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        config = dict(model.load_config(directory / name))
        convert = theirs.convert_ldm_unet_checkpoint if name == "unet" else theirs.convert_ldm_vae_checkpoint
        found[name] = convert(dict(tensors), config)
    if kind == "sd2":
        text = CLIPTextModel.from_pretrained(directory / "text_encoder")
        found["text_encoder"] = theirs.convert_open_clip_checkpoint(text, tensors)
    else:
        found["text_encoder"] = theirs.convert_ldm_clip_checkpoint(dict(tensors))
    if kind == "sdxl":
        text = CLIPTextModelWithProjection.from_pretrained(directory / "text_encoder_2")
        prefix = "conditioner.embedders.1.model."
        found["text_encoder_2"] = theirs.convert_open_clip_checkpoint(text, tensors, prefix)
    return found


def bare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names that transformers' versions agree on."""
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_directory(checkpoints: Checkpoints, tiny: Any, kind: str) -> None:
    """Each weight of a single file is, bit for bit, that of the directory it comes from, and what diffusers reads."""
    file, directory = checkpoints(kind), tiny.source(kind)
    ours, original = open_source(file, Reading(config=directory)), open_source(directory)
    assert ours.family is original.family
    assert ours.name == kind
    expected = their_reading(kind, file, directory)
    for part in original.family.parts:
        found, known = ours.load(part).state_dict(), original.load(part).state_dict()
        assert found.keys() == known.keys()
        assert all(torch.equal(tensor, known[name]) for name, tensor in found.items())
        read = bare(expected[part])
        assert all(torch.equal(tensor, read[name]) for name, tensor in bare(found).items())


@pytest.mark.heavy
def test_graphs_are_those_of_the_directory(
    checkpoints: Checkpoints, tiny: Any, shared_exports: Any, tmp_path: Path
) -> None:
    """Graphs exported from a single file are, bit for bit, those of the directory, weights and all.

    What decides an export is the same for every component, and one is exported again.
    """
    bundle, directory = Bundle.open(tiny.bundle("sd1")), open_source(tiny.source("sd1"))
    source = open_source(checkpoints("sd1"), Reading(config=tiny.source("sd1")))
    for name in source.family.components:
        keys = {shared_exports.key(Model(each).load_component(name), PORTABLE) for each in (source, directory)}
        assert len(keys) == 1, name
    graph = export_component(Model(source).load_component("text_encoder"), PORTABLE, tmp_path)
    assert graph == bundle.graph("text_encoder", PORTABLE.name)
    for file in (graph.file, *graph.external):
        assert (tmp_path / file).read_bytes() == bundle.file(file).read_bytes()
