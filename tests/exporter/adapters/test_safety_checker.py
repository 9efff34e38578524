"""A safety checker as a component: what is taken, what is refused, and what its graph computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.exporter.adapters.registry import open_model
from latentrt.exporter.adapters.safety_checker import SafetyChecker, SafetyCheckerFiles
from latentrt.exporter.components import Component
from latentrt.exporter.graphs.export import export_component
from latentrt.exporter.graphs.targets import Form
from latentrt.exporter.source.opening import open_source
from latentrt.exporter.source.optimum import GraphFolders
from latentrt.exporter.verification.bundle import graph_psnr
from latentrt.runtime.images.clip_vision import clip_pixels


@pytest.fixture
def directory(tiny: Any, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny.safety_checker(), tmp_path / "checker"))


def loaded(tiny: Any, directory: Path) -> Component:
    """The component that is exported, beside some model."""
    model = open_model(open_source(tiny.source("sd1")), [SafetyCheckerFiles(directory)])
    return model.load_component("safety_checker")


def scores(tiny: Any, directory: Path, pixels: torch.Tensor) -> torch.Tensor:
    """The component's results, computed by torch."""
    component = loaded(tiny, directory)
    with torch.no_grad():
        found: torch.Tensor = torch.cat(component.module(pixels), dim=1)
    return found


def changed(directory: Path, file: str, change: dict[str, Any]) -> None:
    config = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps(config | change))


def renamed(directory: Path, name: Callable[[str], str]) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file({name(key): each for key, each in tensors.items()}, directory / "model.safetensors")


def test_a_checker_goes_with_models_of_every_family(tiny: Any) -> None:
    """It is one component more, part of the fingerprint, and none where none is given."""
    for kind in ("sd1", "sdxl", "flux-schnell"):
        plain = open_source(tiny.source(kind))
        source = open_model(plain, [SafetyCheckerFiles(tiny.safety_checker())])
        assert source.components == (*plain.family.components, "safety_checker")
        assert source.fingerprint != plain.fingerprint
        assert source.notes == plain.notes


def test_old_and_new_layouts_are_one(tiny: Any, directory: Path, tmp_path: Path) -> None:
    """The published checkpoint's names, its two configurations, and its place in a model's directory are understood."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = scores(tiny, tiny.safety_checker(), pixels)
    renamed(directory, lambda key: f"vision_model.{key}" if key.startswith("vision_model.") else key)
    positions = {"vision_model.vision_model.embeddings.position_ids": torch.arange(17)[None]}
    save_file(load_file(directory / "model.safetensors") | positions, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    changed(directory, "config.json", {"vision_config_dict": config["vision_config"], "vision_config": {}})
    model = tmp_path / "model"
    (model / "feature_extractor").mkdir(parents=True)
    directory.rename(model / "safety_checker")
    (model / "model_index.json").write_text("{}")
    preparation = model / "safety_checker" / "preprocessor_config.json"
    (model / "feature_extractor" / preparation.name).write_text(
        json.dumps({"crop_size": 32, "size": 32, "resample": 3})
    )
    preparation.unlink()
    for path in (model, model / "safety_checker"):
        torch.testing.assert_close(scores(tiny, path, pixels), expected, rtol=0, atol=0)
        assert SafetyChecker.open(path).notes == ()
    shutil.rmtree(model / "feature_extractor")
    source = open_model(open_source(tiny.source("sd1")), [SafetyCheckerFiles(model)])
    assert source.notes[-1].startswith(
        "safety_checker has no preprocessor_config.json; its images are prepared as CLIP"
    )


def test_other_means_are_part_of_the_graph(directory: Path, tiny: Any) -> None:
    """A checker whose pictures are normalised otherwise sees what transformers would show it."""
    changed(directory, "preprocessor_config.json", {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]})
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    processor = CLIPImageProcessor.from_pretrained(directory)
    theirs = processor(Image.fromarray(picture), return_tensors="pt").pixel_values
    found = scores(tiny, directory, torch.from_numpy(clip_pixels(picture, 32)))
    torch.testing.assert_close(found, scores(tiny, tiny.safety_checker(), theirs), rtol=0, atol=1e-5)


@pytest.mark.heavy
def test_scores_are_fp32_in_half_precision(directory: Path, tiny: Any, tmp_path: Path) -> None:
    """The tower is fp16, while thresholds and what follows the embedding keep their bits."""
    component = loaded(tiny, directory)
    graph = export_component(component, Form(23, "fp16"), tmp_path)
    assert [each.dtype for each in (*graph.inputs, *graph.outputs)] == ["float16", "float32", "float32"]
    assert graph_psnr(component, graph, tmp_path) > 40


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Damage to the tensors."""

    def apply(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return apply


def config(**change: Any) -> Callable[[Path], object]:
    """Damage to the configuration."""
    return lambda directory: changed(directory, "config.json", change)


def preparation(**change: Any) -> Callable[[Path], object]:
    """Damage to the settings of the feature extractor."""
    return lambda directory: changed(directory, "preprocessor_config.json", change)


def linked(directory: Path) -> None:
    """A file that is somewhere else."""
    file = directory / "preprocessor_config.json"
    file.symlink_to(file.rename(directory.parent / "elsewhere.json"))


VISION = {"hidden_size": 32, "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "num_hidden_layers": 2}
DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (shutil.rmtree, "the safety checker '.*checker' does not exist"),
    (
        lambda path: (path / "config.json").unlink(),
        "checker/config.json is missing: a directory of a StableDiffusionSafe",
    ),
    (lambda path: (path / "config.json").write_text("[]"), "holds a list, expected a JSON object"),
    (
        config(architectures=["CLIPModel"]),
        r"'architectures' is \['CLIPModel'\], expected \['StableDiffusionSafetyCheck",
    ),
    (config(vision_config=3), "'vision_config' is 3, expected the configuration of CLIP's vision tower"),
    (config(vision_config={**VISION, "image_size": 4096}), "images have 4096 pixels a side"),
    (config(vision_config={**VISION, "num_hidden_layers": 10**4}), "'num_hidden_layers' is 10000, which no model has"),
    (config(vision_config={**VISION, "num_attention_heads": 5}), "does not describe a model"),
    (config(projection_dim="wide"), "'projection_dim' is 'wide', expected a whole number"),
    (config(projection_dim=25), r"has the shape \[24, 32\], expected \[25, 32\]"),
    (
        weights(lambda each: each.pop("special_care_embeds")),
        "'special_care_embeds' is missing; expected all of a Stable",
    ),
    (weights(lambda each: each.pop("visual_projection.weight")), "'visual_projection.weight' is missing"),
    (
        weights(lambda each: each.update(concept_embeds_weights=torch.ones(18))),
        r"'concept_embeds_weights' has the shape \[18\], expected \[17\]",
    ),
    (weights(lambda each: each.update(more=torch.ones(1))), "'more' has no place in a StableDiffusionSafetyChecker"),
    (
        weights(lambda each: each.update(concept_embeds=torch.ones(17, 24, dtype=torch.int8))),
        "'concept_embeds' is I8; quantised weights are not supported",
    ),
    (
        weights(lambda each: each["concept_embeds_weights"].fill_(torch.nan)),
        "the tensor 'concept_embeds_weights' holds NaN or infinity",
    ),
    (lambda path: (path / "model.safetensors").write_bytes(b"{}"), "model.safetensors is damaged"),
    (lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), "has only pickled weights"),
    (preparation(resample=2), "preprocessor_config.json: 'resample' is 2, which is not supported; expected 3"),
    (
        preparation(size={"height": 32, "width": 32}),
        "'size' is .*, which is not supported; expected {'shortest_edge': 32}",
    ),
    (preparation(crop_size=64), "'crop_size' is 64, which is not supported"),
    (preparation(do_normalize=False), "'do_normalize' is False, which is not supported; expected True"),
    (preparation(rescale_factor=float("nan")), "'rescale_factor' is nan, which no model has"),
    (preparation(rescale_factor=1), "'rescale_factor' is 1, which is not supported; expected 1/255"),
    (preparation(image_mean=[0.5]), r"'image_mean' is \[0.5\], expected three numbers"),
    (preparation(image_std=[0.5, 0, 0.5]), r"'image_std' is \[0.5, 0.0, 0.5\], expected three numbers above zero"),
    (linked, "preprocessor_config.json is a link out of checker"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message[:40] for _, message in DAMAGE])
def test_a_checker_that_is_none_or_damaged(
    directory: Path, tiny: Any, damage: Callable[[Path], object], message: str
) -> None:
    """One sentence names what is wrong."""
    damage(directory)
    with pytest.raises(SourceError, match=message):
        loaded(tiny, directory)


def test_graphs_of_others_take_none(tiny: Any) -> None:
    """What was exported elsewhere is run as it is."""
    graphs = open_source(tiny.source("sd1"))
    object.__setattr__(graphs, "weights", object.__new__(GraphFolders))
    with pytest.raises(
        InvalidRequestError, match="graphs that are run as they are; a safety checker goes with weights"
    ):
        open_model(graphs, [SafetyCheckerFiles(tiny.safety_checker())])
