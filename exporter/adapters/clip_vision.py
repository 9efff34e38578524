"""CLIP's vision tower with its projection: its configuration checked, and built from weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from latentrt.engines.errors import SourceError

from ..families.checks import natural
from ..families.parts import known
from ..source.weights import assign, empty_module

STEM = "model"
"""Name of its files of weights, without ending."""
DEFAULT_SIDE = 224
"""Pixels a side of the images that it takes, where a configuration does not say."""

_LARGEST_SIDE = 1024  # pixels


def check_vision(name: str, config: Mapping[str, Any]) -> None:
    """Check the configuration of a vision tower; its numbers must be within bounds already.

    Args:
        name: Name of its directory.
        config: Entries of transformers' ``CLIPVisionConfig``.

    Raises:
        SourceError: naming the first thing that is wrong.
    """
    where = f"{name}/config.json"
    for key, default in (("num_hidden_layers", 12), ("num_attention_heads", 12), ("hidden_size", 768)):
        natural(name, config, key, default)
    side, patch = natural(name, config, "image_size", DEFAULT_SIDE), natural(name, config, "patch_size", 32)
    if side > _LARGEST_SIDE or patch > side:
        raise SourceError(
            f"{where}: images have {side} pixels a side and patches {patch}, expected at most {_LARGEST_SIDE} and "
            "patches that fit"
        )
    if natural(name, config, "num_channels", 3) != 3:
        raise SourceError(f"{where}: 'num_channels' is {config['num_channels']}, expected 3")


def empty_vision(name: str, config: Mapping[str, Any]) -> nn.Module:
    """A tower without weights: ``vision_model`` and ``visual_projection``.

    Raises:
        SourceError: if the configuration describes none.
    """
    return empty_module(_build, config, name)


def load_vision(name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """A tower that gives ``image_embeds`` ``[batch, projection_dim]`` of images ``[batch, 3, side, side]``.

    Raises:
        SourceError: if configuration and weights do not fit each other.
    """
    own = {key: each for key, each in tensors.items() if not key.endswith("position_ids")}  # a constant, once stored
    model = empty_vision(name, config)
    assign(model, own, name)
    if any(buffer.is_meta for buffer in model.buffers()):  # tables that are not stored, such as position ids
        model = _build(config)
        assign(model, own, name)
    return model


def _build(config: Mapping[str, Any]) -> nn.Module:
    model: nn.Module = CLIPVisionModelWithProjection(CLIPVisionConfig(**known(config, CLIPVisionConfig)))
    return model.eval()
