"""Checkpoints in a single safetensors file with the original names: their model, and the place of each tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentrt.engines.errors import SourceError

from ..families import Family
from .single_file_configs import (
    Published,
    stable_diffusion_1,
    stable_diffusion_2,
    stable_diffusion_xl,
    stable_diffusion_xl_refiner,
)
from .single_file_names import Names, Target, clip, openclip, openclip_projected, unet, vae
from .weights import empty_module, first_line, opened, read_tensors

PREDICTIONS = ("epsilon", "v_prediction")
"""Predictions of models that come in a single file."""

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_CLIP, _OPENCLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
_CLIP_XL, _OPENCLIP_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_OPENCLIP_REFINER = "conditioner.embedders.0.model."

# Where a part may be; the first that is there counts.
_PLACES: Mapping[str, tuple[tuple[str, Names], ...]] = {
    "unet": ((_UNET, unet),),
    "vae": ((_VAE, vae),),
    "text_encoder": ((_CLIP, clip), (_OPENCLIP, openclip), (_CLIP_XL, clip)),
    "text_encoder_2": ((_OPENCLIP_XL, openclip_projected), (_OPENCLIP_REFINER, openclip_projected)),
}

# Left out: averages of the weights in training, tables that follow from the schedule, the discriminator of the
# autoencoder's training, tensors of CLIP that no part uses, and marks.
_UNUSED_PREFIXES = ("model_ema.", "first_stage_model.loss.", "first_stage_model.model_ema.")
_UNUSED = frozenset(
    {
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
        *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
        *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
        *("lvlb_weights", "logvar", "scale_factor", "global_step", "denoiser.sigmas", "v_pred"),
        *("cond_stage_model.logit_scale", "cond_stage_model.text_projection"),
        *("conditioner.embedders.0.logit_scale", "conditioner.embedders.0.text_projection"),
    }
)


@dataclass(frozen=True)
class Header:
    """Names, shapes and metadata of a safetensors file; no weight is read.

    Attributes:
        path: The file.
        shapes: Shapes by name of the tensor.
        metadata: Texts that the program which wrote the file put there.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> Header:
        """Read the header.

        Raises:
            SourceError: if it is damaged, does not describe the file, or the file is no whole model.
        """
        with opened(path, path.name) as content:
            shapes = {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
            header = cls(path, shapes, content.metadata() or {})
        header._require_model()
        return header

    @property
    def licence(self) -> str:
        """The licence that the metadata name, or ``"unknown"``."""
        return " ".join(self.metadata.get("modelspec.license", "").split())[:200] or "unknown"

    def has(self, prefix: str) -> bool:
        """Whether a tensor's name begins with a prefix."""
        return any(name.startswith(prefix) for name in self.shapes)

    def _require_model(self) -> None:
        """Refuse files of other things than models, each by its own name."""
        kinds = {
            "LoRA weights, which change a model": ("lora_", "lycoris_"),
            "one part of a model, with diffusers' names": ("down_blocks.", "encoder.down_blocks.", "text_model."),
            "an autoencoder alone": ("encoder.down.", "decoder.up."),
            "a ControlNet": ("control_model.", "controlnet_"),
            "Stable Diffusion 3": (f"{_UNET}joint_blocks.", "joint_blocks."),
            "FLUX": (f"{_UNET}double_blocks.", "double_blocks."),
        }
        for kind, prefixes in kinds.items():
            if any(map(self.has, prefixes)):
                raise SourceError(
                    f"{self.path.name} holds {kind}; single files are read of whole models of Stable Diffusion 1.x, "
                    "2.x and XL, everything else as a diffusers directory"
                )
        if not self.has(_UNET):
            raise SourceError(
                f"{self.path.name} holds no model of the original layout: no tensor's name begins with {_UNET}"
            )


def recognise(header: Header, prediction: str | None = None) -> tuple[Published, tuple[str, ...]]:
    """Find out which published model a file has the layout of.

    Whether a model predicts noise or velocity does not show in its weights. ``prediction`` decides; without it the file
    (a tensor ``v_pred``, as trainers of velocity models write it, or the metadata of Stability's ModelSpec); without
    that the layout: velocity for 2.x, noise for all others.

    Args:
        header: The header of the file.
        prediction: One of :data:`PREDICTIONS`, or ``None``.

    Returns:
        The model, and the assumptions that were made, a sentence each.

    Raises:
        SourceError: if it has no text encoder that is known.
    """
    layouts: Mapping[str, tuple[Callable[[str], Published], str]] = {
        _OPENCLIP_XL: (stable_diffusion_xl, "epsilon"),
        _OPENCLIP_REFINER: (stable_diffusion_xl_refiner, "epsilon"),
        _OPENCLIP: (stable_diffusion_2, "v_prediction"),
        _CLIP: (stable_diffusion_1, "epsilon"),
    }
    found = next((prefix for prefix in layouts if header.has(prefix)), None)
    if found is None:
        raise SourceError(f"{header.path.name} holds no text encoder: no tensor's name begins with {_CLIP} or the like")
    make, default = layouts[found]
    said = {"v": "v_prediction", "epsilon": "epsilon"}.get(header.metadata.get("modelspec.prediction_type", ""))
    said = "v_prediction" if "v_pred" in header.shapes else said
    published = make(prediction or said or default)
    notes = [f"{header.path.name} has the layout of {published.title}"]
    if prediction is None and said is None:
        other = next(each for each in PREDICTIONS if each != default)
        notes.append(f"assumed that it predicts {default}, which the file does not say; else give --prediction {other}")
    first = header.shapes.get(f"{_UNET}input_blocks.0.0.weight", ())
    if len(first) == 4:  # models for inpainting and editing take more, and are refused by their number
        configs = {**published.configs, "unet": {**published.configs["unet"], "in_channels": first[1]}}
        published = Published(published.title, published.index, configs, published.scheduler, published.padding)
    return published, tuple(notes)


class SingleFileWeights:
    """Weights in a single file, each of which has its place in a part of the model.

    Args:
        header: The header of the file.
        family: The family of the model.
        configs: Configurations of its parts.
        hint: Advice for shapes that do not fit, as the end of a message.

    Raises:
        SourceError: if a tensor is missing, of another shape, or has no place.
    """

    def __init__(self, header: Header, family: Family, configs: Mapping[str, Mapping[str, Any]], hint: str) -> None:
        self._header, self._hint = header, hint
        self._targets: dict[str, dict[str, list[Target]]] = {}
        rest = {name for name in header.shapes if name not in _UNUSED and not name.startswith(_UNUSED_PREFIXES)}
        for name in family.parts:
            self._targets[name] = self._place(name, family, configs[name], rest)
            rest -= self._targets[name].keys()
        if rest:
            raise SourceError(
                f"{header.path.name} has the tensor {min(rest)!r}, for which models of {family.name} have no place"
            )

    def read(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors of a part with the names that its class has for them, see :func:`.weights.read_tensors`."""
        path, targets = self._header.path, self._targets[name]
        tensors = {}
        with opened(path, path.name) as content:
            for key, tensor in read_tensors(content, targets, path.name, dtype):
                for target in targets[key]:
                    tensors[target.name] = target.change(tensor)
        return tensors

    def _place(self, name: str, family: Family, config: Mapping[str, Any], rest: set[str]) -> dict[str, list[Target]]:
        """Where the tensors of a part go, checked against its configuration."""
        file = self._header.path.name
        if name not in _PLACES:
            raise SourceError(f"models of the family {family.name} are not read from single files; give a directory")
        places = [(prefix, names) for prefix, names in _PLACES[name] if self._header.has(prefix)]
        if not places:
            raise SourceError(f"{file} holds no {name}: no tensor's name begins with {_PLACES[name][0][0]}")
        prefix, names = places[0]
        part = family.parts[name]
        module = empty_module(part.build, config, name)
        known: Any = module.config  # with the defaults of what config.json leaves out
        settings = known if isinstance(known, Mapping) else known.to_dict()
        expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        placed: dict[str, list[Target]] = {}
        tensors: dict[str, Tensor] = {}
        origin: dict[int, str] = {}
        for key in sorted(each for each in rest if each.startswith(prefix)):
            targets = names(key.removeprefix(prefix), settings)
            if targets is None:
                continue
            placed[key] = targets
            for target in targets:
                try:
                    tensor = target.change(torch.empty(self._header.shapes[key], device="meta"))
                except (RuntimeError, TypeError, IndexError) as error:
                    shape = list(self._header.shapes[key])
                    raise SourceError(f"{file}: {key!r} has the shape {shape}: {first_line(error)}") from error
                tensors[target.name] = tensor
                origin[id(tensor)] = key
        found = part.rename(dict(tensors), module)
        for target_name, tensor in found.items():
            key = origin.get(id(tensor), target_name)
            if target_name not in expected:
                raise SourceError(f"{file} has the tensor {key!r}, for which its {name} has no place{self._hint}")
            if tuple(tensor.shape) != expected[target_name]:
                raise SourceError(
                    f"{file}: {key!r} gives the shape {list(tensor.shape)}, expected {list(expected[target_name])}"
                    f"{self._hint}"
                )
        if missing := sorted(expected.keys() - found.keys()):
            raise SourceError(f"{file} lacks {missing[0]!r} of its {name}, below {prefix}{self._hint}")
        return placed
