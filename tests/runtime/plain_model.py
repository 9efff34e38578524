"""A model of plain functions, of which every output row depends on that row's inputs alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from latentrt.engines import Array, FakeEngine, TensorSpec
from latentrt.runtime import Result, StepInfo

Function = Callable[[Mapping[str, Array]], Mapping[str, Array]]


def encode(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """A state for each token that tells the prompts apart."""
    ids = feeds["input_ids"]
    states = np.sin(ids[..., None] * np.arange(1, 33, dtype=np.float32) / 10).astype(np.float32)
    return {"last_hidden_state": states, "penultimate_hidden_state": states / 2}


def denoise(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """A prediction that depends on sample, timestep and prompt."""
    prompt = feeds["encoder_hidden_states"].mean(axis=(1, 2), dtype=np.float32)
    time_part = feeds["timestep"] / np.float32(1000)
    return {"out_sample": np.tanh(feeds["sample"] * np.float32(0.3) + (prompt + time_part)[:, None, None, None])}


def decode(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Three of the channels, each element as 2x2 pixels."""
    return {"sample": feeds["latent_sample"][:, :3].repeat(2, axis=2).repeat(2, axis=3)}


FUNCTIONS: dict[str, Function] = {"text_encoder": encode, "unet": denoise, "vae_decoder": decode}
"""The functions by component."""


def fakes(text: Function = encode, unet: Function = denoise, vae: Function = decode) -> dict[str, FakeEngine]:
    states, latents = ("batch", "sequence", 32), ("batch", 4, "height", "width")
    return {
        "text_encoder": FakeEngine(
            [TensorSpec("input_ids", "int64", ("batch", "sequence"))],
            [TensorSpec(name, "float32", states) for name in ("last_hidden_state", "penultimate_hidden_state")],
            text,
        ).open(),
        "unet": FakeEngine(
            [
                TensorSpec("sample", "float32", latents),
                TensorSpec("timestep", "float32", ("batch",)),
                TensorSpec("encoder_hidden_states", "float32", states),
            ],
            [TensorSpec("out_sample", "float32", latents)],
            unet,
        ).open(),
        "vae_decoder": FakeEngine(
            [TensorSpec("latent_sample", "float32", latents)],
            [TensorSpec("sample", "float32", ("batch", 3, "h", "w"))],
            vae,
        ).open(),
    }


def finish(stream: Any) -> tuple[list[StepInfo], Result]:
    """All steps of a stream, and its result."""
    steps = []
    while True:
        try:
            steps.append(next(stream))
        except StopIteration as stop:
            return steps, stop.value
