"""Steppers: a further kind of step is a class of its own and one entry in a list."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines import Array
from latentrt.runtime import Pipeline
from latentrt.runtime.components import opening
from latentrt.runtime.denoising.batching import Share
from latentrt.runtime.denoising.run import Run
from latentrt.runtime.denoising.steppers import Stepper
from latentrt.runtime.engine_calls import Floats
from latentrt.runtime.noise import torch_randn
from latentrt.runtime.samplers import run_plan

OPTIONS: dict[str, Any] = {"sampler": "dpmpp-2m", "steps": 6, "guidance": 4.0}


class Skipping(Stepper):
    """Takes every second step without an engine, as if the denoiser predicted zeros."""

    label = "skipped"

    def __init__(self, engine: object, components: object, denoiser: str, *, fused: bool) -> None:
        self._fused = fused
        self.taken: list[int] = []

    def takes(self, run: Run) -> bool:
        return run.index % 2 == 1

    def step(self, shares: Sequence[Share], feeds: Mapping[str, Array]) -> Floats:
        self.taken += [len(share) for share in shares]
        if not self._fused:
            return np.zeros_like(feeds["sample"], np.float32)
        columns = feeds["update"].shape[2] - 2
        return np.einsum("brk,bk...->br...", feeds["update"][:, :, :columns], feeds["registers"])

    def step_on_device(
        self, share: Share, changing: Mapping[str, Array], constant: Callable[[], Mapping[str, Array]]
    ) -> Array:
        self.taken.append(len(share))
        return self.step([share], {**constant(), **changing})


@pytest.mark.parametrize("loop", ["plain", "fused"])
def test_a_step_without_an_engine(tiny_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, loop: str) -> None:
    """Its steps call no engine, the others do; the latents are those of the plan with that prediction in its place."""
    monkeypatch.setattr(opening, "STEPPERS", (*opening.STEPPERS, Skipping))
    with Pipeline.load(tiny_bundles["sd1"], "onnxruntime", loop=loop, threads=1) as pipe:
        skipping = next(each for each in pipe.loop.steppers if isinstance(each, Skipping))
        engine = pipe.engines["unet" if loop == "plain" else "unet_step"]
        calls: list[int] = []
        run_engine = engine.run
        monkeypatch.setattr(engine, "run", lambda feeds: (calls.append(1), run_engine(feeds))[1])
        skipped = pipe("a red apple", seed=7, **OPTIONS)
        assert (len(calls), skipping.taken) == (3, [1, 1, 1])
        run = pipe.start("a red apple", seed=7, **OPTIONS)
        plan, noise = run.plan, torch_randn(7, run.latent_shape)
    with Pipeline.load(tiny_bundles["sd1"], "onnxruntime", loop="plain", threads=1) as plain:
        unet, states = plain.engines["unet"], plain.start("a red apple", seed=7, **OPTIONS).rows

        def model(sample: Array, timestep: float) -> Array:
            if plan.timesteps.tolist().index(timestep) % 2:
                return np.zeros_like(sample)
            feeds = {"sample": np.concatenate([sample, sample]), "timestep": np.full(2, timestep, np.float32)}
            without, within = np.split(unet.run({**feeds, **states})["out_sample"], 2)
            return np.asarray(without + np.float32(4.0) * (within - without))

        np.testing.assert_allclose(skipped.latents, run_plan(plan, noise, model), rtol=1e-4, atol=1e-4)


def test_runs_whose_steps_differ_share_no_call(tiny_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs at an even and at an odd step advance together, each by its own stepper, and get what they get alone."""
    monkeypatch.setattr(opening, "STEPPERS", (*opening.STEPPERS, Skipping))
    with Pipeline.load(tiny_bundles["sd1"], "onnxruntime", threads=1) as pipe:
        alone = [pipe("a red apple", seed=seed, **OPTIONS).latents for seed in (7, 8)]
        runs = [pipe.start("a red apple", seed=seed, **OPTIONS) for seed in (7, 8)]
        pipe.advance(runs[:1])
        while running := [run for run in runs if not run.done]:
            pipe.advance(running)
    for run, expected in zip(runs, alone, strict=True):
        np.testing.assert_allclose(run.latents, expected, rtol=1e-4, atol=1e-4)
