"""The ``plain`` loop: which rows the denoiser gets, how guidance joins them, and what follows from the plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from latentrt.engines import FakeEngine
from latentrt.runtime import Bundle, Pipeline
from latentrt.runtime.samplers import compile_plan, run_plan


@pytest.mark.parametrize("guidance", [0, 0.5, 1, 1.0])
def test_without_guidance_the_unconditional_half_is_not_run(
    pipe: Pipeline, engines: dict[str, FakeEngine], guidance: float
) -> None:
    """Text encoder and denoiser see the prompt's rows alone."""
    pipe("a red apple", negative_prompt="blurry", guidance=guidance, steps=2, images=3, sampler="euler")
    assert [len(call["input_ids"]) for call in engines["text_encoder"].calls] == [1]
    assert [len(call["sample"]) for call in engines["unet"].calls] == [3, 3]


def test_with_guidance_the_unconditional_rows_come_first(
    plain_model: Any, pipe: Pipeline, engines: dict[str, FakeEngine]
) -> None:
    """Both halves run in one call, on the same latents, each picture with its own prompt rows."""
    pipe("a red apple", negative_prompt="blurry", guidance=4, steps=2, images=3)
    ids = np.concatenate([call["input_ids"] for call in engines["text_encoder"].calls])
    np.testing.assert_array_equal(
        ids, [pipe.tokenizers["tokenizer"].encode(text) for text in ("blurry", "a red apple")]
    )
    states = plain_model.encode({"input_ids": ids})["last_hidden_state"]
    for call in engines["unet"].calls:
        np.testing.assert_array_equal(call["sample"][:3], call["sample"][3:])
        np.testing.assert_array_equal(call["encoder_hidden_states"], states[[0, 0, 0, 1, 1, 1]])


def test_outside_its_part_of_the_run_guidance_is_not_run(pipe: Pipeline, engines: dict[str, FakeEngine]) -> None:
    """Before guidance_start and from guidance_end on, the denoiser sees the conditional rows alone."""
    options = {"guidance_start": 0.25, "guidance_end": 0.75, "guidance": 4}
    pipe("a red apple", negative_prompt="blurry", steps=4, images=2, sampler="euler", **options)
    calls = engines["unet"].calls
    assert [len(call["sample"]) for call in calls] == [2, 4, 4, 2]
    np.testing.assert_array_equal(calls[0]["encoder_hidden_states"], calls[1]["encoder_hidden_states"][2:])


@pytest.mark.parametrize("sampler", ["euler", "euler-a", "dpmpp-2m", "ddpm"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("images", [1, 3])
def test_the_loop_is_the_plan_on_torchs_noise(
    plain_model: Any, pipe: Pipeline, bundle: Bundle, sampler: str, guidance: float, images: int
) -> None:
    """All noise comes from one stream of PyTorch's generator; guidance extrapolates from the unconditional half."""
    result = pipe("a red apple", seed=7, sampler=sampler, guidance=guidance, steps=4, images=images, width=40)
    generator = torch.Generator("cpu").manual_seed(7)

    def noise() -> Any:
        return torch.randn((images, 4, 16, 20), generator=generator).numpy()

    def model(x: Any, t: float) -> Any:
        def half(text: str) -> Any:
            states = plain_model.encode({"input_ids": pipe.tokenizers["tokenizer"].encode(text)[None]})[
                "last_hidden_state"
            ]
            timestep = np.full(images, t, np.float32)
            repeated = states.repeat(images, axis=0)
            return plain_model.denoise({"sample": x, "timestep": timestep, "encoder_hidden_states": repeated})[
                "out_sample"
            ]

        return half("") + guidance * (half("a red apple") - half(""))

    plan = compile_plan(sampler, bundle.manifest.scheduler, 4)
    np.testing.assert_allclose(result.latents, run_plan(plan, noise(), model, noise), atol=1e-4)
