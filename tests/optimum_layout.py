"""Directories of ONNX graphs as Optimum exports them, with its names of inputs, outputs and dimensions, for tests."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

BATCH, TEXT = {0: "batch_size"}, {0: "batch_size", 1: "sequence_length"}
LATENTS = {0: "batch_size", 2: "height", 3: "width"}


class _Text(nn.Module):
    """Optimum gives the states of all layers where the pipeline wants more than the last."""

    def __init__(self, model: Any, *, states: bool) -> None:
        super().__init__()
        self.model, self.states = model, states

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        output = self.model(input_ids, output_hidden_states=True)
        pooled = getattr(output, "text_embeds", None)
        first = (
            (output.last_hidden_state, output.pooler_output) if pooled is None else (pooled, output.last_hidden_state)
        )
        return (*first, *output.hidden_states) if self.states else first


class _Unet(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor, *added: Tensor) -> Tensor:
        more = dict(zip(("text_embeds", "time_ids"), added, strict=False)) or None
        prediction: Tensor = self.unet(sample, timestep, states, added_cond_kwargs=more, return_dict=False)[0]
        return prediction


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        pixels: Tensor = self.vae.decode(latent_sample, return_dict=False)[0]
        return pixels


def _export(path: Path, module: nn.Module, inputs: Mapping[str, Tensor], outputs: list[str], axes: Any) -> None:
    path.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            str(path / "model.onnx"),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_axes=axes,
            opset_version=18,
            dynamo=False,
        )


def write(path: Path, source: Path, kind: str) -> Path:
    """Export a diffusers directory.

    Args:
        path: Where to.
        source: The directory.
        kind: ``sd1`` or ``sdxl``.
    """
    xl = kind == "sdxl"
    encoders = {"text_encoder": CLIPTextModel, **({"text_encoder_2": CLIPTextModelWithProjection} if xl else {})}
    width = 0
    for name, model in encoders.items():
        loaded = model.from_pretrained(source / name)
        width += loaded.config.hidden_size
        states = [f"hidden_states.{layer}" for layer in range(loaded.config.num_hidden_layers + 1)] if xl else []
        first = (
            ["text_embeds", "last_hidden_state"] if name == "text_encoder_2" else ["last_hidden_state", "pooler_output"]
        )
        ids = torch.randint(100, (2, 77))
        named = {"input_ids": ids}
        axes = dict.fromkeys(("input_ids", "last_hidden_state", *states), TEXT)
        axes |= {each: BATCH for each in first if each != "last_hidden_state"}
        _export(path / name, _Text(loaded, states=xl), named, [*first, *states], axes)
    unet = UNet2DConditionModel.from_pretrained(source / "unet")
    inputs = {
        "sample": torch.randn(2, unet.config.in_channels, 16, 16),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(2, 77, width),
    }
    if xl:
        inputs |= {"text_embeds": torch.randn(2, 24), "time_ids": torch.rand(2, 6) * 64}
    axes = {
        "sample": LATENTS,
        "encoder_hidden_states": TEXT,
        "out_sample": LATENTS,
        "text_embeds": BATCH,
        "time_ids": BATCH,
    }
    named_axes = {name: axis for name, axis in axes.items() if name in (*inputs, "out_sample")}
    _export(path / "unet", _Unet(unet), inputs, ["out_sample"], named_axes)
    vae = AutoencoderKL.from_pretrained(source / "vae")
    latents = {"latent_sample": torch.randn(2, 4, 16, 16)}
    decoded = {0: "batch_size", 2: "latent_height", 3: "latent_width"}
    _export(path / "vae_decoder", _Decoder(vae), latents, ["sample"], {"latent_sample": decoded, "sample": LATENTS})
    for name, part in {**{name: name for name in encoders}, "unet": "unet", "vae_decoder": "vae"}.items():
        shutil.copyfile(source / part / "config.json", path / name / "config.json")
    for name in ("scheduler", "tokenizer", *(["tokenizer_2"] if xl else [])):
        shutil.copytree(source / name, path / name)
    index = json.loads((source / "model_index.json").read_text())
    index["_class_name"] = f"ORT{index['_class_name']}"  # as its pipelines save themselves
    (path / "model_index.json").write_text(json.dumps(index))
    return path
