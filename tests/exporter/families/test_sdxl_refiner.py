"""The refiner of Stable Diffusion XL: a base model that passes for it is refused, and it takes a score."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from latentrt.engines.errors import SourceError
from latentrt.exporter.model import Model
from latentrt.exporter.source.opening import open_source


@pytest.mark.parametrize("value", [False, None, "true", 1, ...])
def test_a_model_without_a_score(tiny: Any, tmp_path: Path, edit_json: Callable[..., None], value: Any) -> None:
    """Only ``true`` makes a refiner, and the message names the pipeline of the base model."""
    path = Path(shutil.copytree(tiny.source("sdxl-refiner"), tmp_path / "source"))
    edit_json(path / "model_index.json", requires_aesthetics_score=value)
    source = open_source(path)
    with pytest.raises(SourceError, match=r"has true; the base model's '_class_name' is StableDiffusionXLPipeline"):
        source.family.settings(source)


def test_the_unet_takes_height_width_crop_and_score(tiny: Any) -> None:
    """Five numbers go with the vector of the prompt, and the component predicts what diffusers' U-Net predicts."""
    path = tiny.source("sdxl-refiner")
    component = Model(open_source(path)).load_component("unet")
    example = dict(component.example)
    assert example["time_ids"].shape == (2, 5)
    theirs = UNet2DConditionModel.from_pretrained(path / "unet").eval()
    added = {name: example[name] for name in ("text_embeds", "time_ids")}
    with torch.no_grad():
        expected = theirs(
            example["sample"], example["timestep"], example["encoder_hidden_states"], added_cond_kwargs=added
        ).sample
        torch.testing.assert_close(component.module(*example.values()), expected, rtol=1e-4, atol=1e-5)
