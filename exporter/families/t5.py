"""T5's encoder (Raffel et al. 2019, arXiv 1910.10683) as a text encoder of SD3 and FLUX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from latentrt.engines.errors import SourceError
from latentrt.engines.trt import Range
from latentrt.runtime.request.options import LONGEST_SEQUENCE

from ..components import Checkpoint, Component
from .base import Config, Part, TokenizerPart
from .checks import natural
from .parts import LENGTH, TEXT_LENGTH, known

_TABLE = ("shared.weight", "encoder.embed_tokens.weight")
_EXAMPLE_LENGTH = 22


def t5_names(tensors: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Give T5's table of embeddings both of its names, of which files have one."""
    there = next((tensors[name] for name in _TABLE if name in tensors), None)
    return tensors if there is None else {**dict.fromkeys(_TABLE, there), **tensors}


T5_TEXT = Part(
    ("T5EncoderModel",), "model", lambda config: T5EncoderModel(T5Config(**known(config, T5Config))), t5_names
)


def t5_tokenizer(encoder: str) -> TokenizerPart:
    """The tokenizer of a T5 text encoder; a request chooses how many ids a prompt has, up to the length here."""
    return TokenizerPart(("T5Tokenizer", "T5TokenizerFast"), encoder, "t5", LONGEST_SEQUENCE)


class T5Encoder(nn.Module):
    """T5's encoder: token ids ``[batch, length]`` to states. It attends to padding too, as in diffusers' pipelines."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Encode to ``[batch, length, width]``."""
        states: Tensor = self.model(input_ids, return_dict=False)[0]
        return states


def check_t5(where: str, config: Config, width: int) -> None:
    """Check a T5 encoder.

    Args:
        where: Name of the part.
        config: Its configuration.
        width: Width of the states that the denoiser takes.

    Raises:
        SourceError: if a number is not above zero, or its states have another width.
    """
    for key, default in (("vocab_size", 32128), ("num_layers", 6), ("num_heads", 8), ("d_kv", 64), ("d_ff", 2048)):
        natural(where, config, key, default)
    own = natural(where, config, "d_model", 512)
    if own != width:
        raise SourceError(f"the states of {where} are {own} wide, but the transformer takes {width}")


def t5_encoder(checkpoint: Checkpoint, name: str, generator: torch.Generator) -> Component:
    """The component of a T5 text encoder, for prompts of any length, with an example drawn from ``generator``."""
    rows = int(checkpoint.configs[name].get("vocab_size", 32128))
    ids = torch.randint(rows, (2, _EXAMPLE_LENGTH), generator=generator)
    axes = {0: "batch", 1: LENGTH}
    return Component(
        name, T5Encoder(checkpoint.load(name)), {"input_ids": ids}, {"input_ids": axes}, ("last_hidden_state",)
    )


def text_ranges(common: int, before: int = 0) -> Mapping[str, Range]:
    """Ranges of the length of a prompt, in T5's tokens and in states that the denoiser takes.

    Args:
        common: Tokens of T5 that engines are tuned for.
        before: States of other encoders that the denoiser takes before T5's.
    """
    tokens = Range(1, common, LONGEST_SEQUENCE)
    return {LENGTH: tokens, TEXT_LENGTH: Range(before + 1, before + common, before + LONGEST_SEQUENCE)}
