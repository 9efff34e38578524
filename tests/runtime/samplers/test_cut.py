"""Parts of a run, such as a base model's share and its refiner's."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime.samplers import SAMPLERS, compile_plan, run_plan, step

CONFIG: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "skip_prk_steps": True,
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
ONE_CALL = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "dpmpp-2m": "DPMSolverMultistepScheduler",
    "dpmpp-2m-sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "deis": "DEISMultistepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
TWO_CALLS = {
    "heun": "HeunDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2-a": "KDPM2AncestralDiscreteScheduler",
}
SHAPE = (2, 4, 6, 5)
STEPS = 12


def config_of(sampler: str) -> dict[str, Any]:
    return FLOW if sampler.startswith("flow") else CONFIG


def model(x: np.ndarray, t: float) -> np.ndarray:
    """A smooth stand-in for a denoiser."""
    mixed = np.roll(x, 1, axis=-1) - 0.5 * np.roll(x, 2, axis=-2)
    return (0.6 * x + 0.4 * np.sin(1.3 * mixed + t / 170)).astype(np.float32)


def drawn(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(SHAPE, generator=generator).numpy()


def ours(sampler: str, latents: np.ndarray | None = None, steps: int = STEPS, **part: float) -> np.ndarray:
    """A part of a run, from its noise or from latents."""
    plan = compile_plan(sampler, config_of(sampler), steps, **part)
    noise = drawn(7)() if latents is None else latents / np.float32(plan.init_scale)
    return run_plan(plan, noise, model, drawn(11))


def theirs(
    sampler: str,
    latents: np.ndarray | None = None,
    steps: int = STEPS,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    rows: slice = slice(0, None),
) -> np.ndarray:
    """The same with diffusers' scheduler, cut where its pipelines of SDXL cut, or at given rows."""
    name = {**ONE_CALL, **TWO_CALLS, "lms": "LMSDiscreteScheduler", "pndm": "PNDMScheduler"}[sampler]
    extra = {"algorithm_type": "sde-dpmsolver++"} if sampler == "dpmpp-2m-sde" else {}
    scheduler = getattr(importlib.import_module("diffusers"), name).from_config({**CONFIG, **extra})
    scheduler.set_timesteps(steps)
    pipeline = SimpleNamespace(scheduler=scheduler)
    timesteps, _ = StableDiffusionXLImg2ImgPipeline.get_timesteps(pipeline, steps, 1.0, "cpu", denoising_start)  # type: ignore[arg-type]
    if rows.start:
        scheduler.set_begin_index(rows.start)
    timesteps = timesteps[rows]
    if denoising_end is not None:
        timesteps = [t for t in timesteps if t >= round(1000 - 1000 * denoising_end)]
    state = torch.from_numpy(drawn(7)()) * scheduler.init_noise_sigma if latents is None else torch.from_numpy(latents)
    takes = scheduler.step.__code__.co_varnames
    options = {"generator": torch.Generator().manual_seed(11)} if "generator" in takes else {}
    for t in timesteps:
        output = torch.from_numpy(model(scheduler.scale_model_input(state, t).numpy(), float(t)))
        state = scheduler.step(output, t, state, **options).prev_sample
    return state.numpy()


def distance(value: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("sampler", ONE_CALL)
@pytest.mark.parametrize("fraction", [0.31, 0.8])
def test_both_parts_are_those_of_diffusers(sampler: str, fraction: float) -> None:
    """A run that ends early leaves diffusers' latents, and one that goes on from them ends with diffusers'."""
    left = theirs(sampler, denoising_end=fraction)
    assert distance(ours(sampler, denoising_end=fraction), left) < 1e-4
    assert (
        distance(ours(sampler, left, denoising_start=fraction), theirs(sampler, left, denoising_start=fraction)) < 1e-4
    )


@pytest.mark.parametrize("sampler", TWO_CALLS)
@pytest.mark.parametrize("fraction", [0.31, 0.8])
def test_a_step_of_two_calls_is_never_cut(sampler: str, fraction: float) -> None:
    """It belongs to the part in which it begins; cut there, diffusers' scheduler gives the same latents."""
    calls = len(compile_plan(sampler, CONFIG, STEPS, denoising_end=fraction))
    assert calls % 2 == 0
    left = theirs(sampler, rows=slice(0, calls))
    assert distance(ours(sampler, denoising_end=fraction), left) < 1e-4
    rest = theirs(sampler, left, rows=slice(calls, None))
    assert distance(ours(sampler, left, denoising_start=fraction), rest) < 1e-4


@pytest.mark.parametrize("sampler", [sampler for sampler in SAMPLERS if sampler != "edm-euler"])
def test_two_parts_are_all_steps(sampler: str) -> None:
    """They take every step of the whole run once, and the second begins without a history."""
    whole = compile_plan(sampler, config_of(sampler), STEPS)
    parts = [
        compile_plan(sampler, config_of(sampler), STEPS, **{end: 0.55}) for end in ("denoising_end", "denoising_start")
    ]
    steps = [len(plan) - len(plan.within) for plan in (*parts, whole)]
    assert steps[0] + steps[1] == steps[2] == STEPS
    assert not parts[1].update[0, 0, 1 : parts[1].registers].any()
    assert 0 not in parts[1].within
    between = compile_plan(sampler, config_of(sampler), STEPS, denoising_start=0.3, denoising_end=0.7)
    assert 0 < len(between) < len(whole)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpm2", "flow-euler", "flow-heun"])
def test_parts_without_a_history_make_the_whole_run(sampler: str) -> None:
    """Nothing is lost between them: one after the other they end where the whole run ends."""
    left = ours(sampler, denoising_end=0.55)
    assert distance(ours(sampler, left, denoising_start=0.55), ours(sampler)) < 1e-5


@pytest.mark.parametrize("sampler", ["lms", "pndm"])
def test_a_history_that_is_begun_afresh_is_closer_to_the_whole_run_than_that_of_diffusers(sampler: str) -> None:
    """diffusers weighs, or skips, steps that this part never took; here it begins as every run begins."""
    whole = ours(sampler, steps=40)
    left = ours(sampler, steps=40, denoising_end=0.6)
    assert distance(left, theirs(sampler, steps=40, denoising_end=0.6)) < 1e-4
    own = distance(ours(sampler, left, steps=40, denoising_start=0.6), whole)
    other = distance(theirs(sampler, left, steps=40, denoising_start=0.6), whole)
    assert own < other / 5
    assert own < 0.01


@pytest.mark.parametrize(
    ("sampler", "config", "part", "message"),
    [
        ("euler", CONFIG, {"denoising_end": 1.0}, "denoising_end is 1.0, expected a number between 0 and 1"),
        ("euler", CONFIG, {"denoising_start": True}, "denoising_start is True, expected a number between 0 and 1"),
        ("euler", CONFIG, {"denoising_start": float("nan")}, "denoising_start is nan, expected"),
        ("euler", CONFIG, {"denoising_start": 0.8, "denoising_end": 0.8}, "0.8, expected less than denoising_end"),
        ("euler", CONFIG, {"denoising_end": 0.01}, "none of the 12 steps of euler begins before denoising_end 0.01"),
        (
            "heun",
            FLOW | CONFIG | {"_class_name": ""},
            {"denoising_start": 0.9999},
            "none of the 12 steps of heun begins after",
        ),
        (
            "dpmpp-2m",
            CONFIG,
            {"denoising_start": 0.5, "denoising_end": 0.501},
            "start 0.5 and before denoising_end 0.501",
        ),
        (
            "pndm",
            {**CONFIG, "skip_prk_steps": False},
            {"denoising_start": 0.5},
            "pndm's Runge-Kutta steps begin a whole",
        ),
        ("edm-euler", {"_class_name": "EDMEulerScheduler"}, {"denoising_end": 0.5}, "logarithms of noise levels"),
    ],
)
def test_a_part_that_cannot_be_had(sampler: str, config: dict[str, Any], part: Any, message: str) -> None:
    """The sentence names what is wrong."""
    with pytest.raises(InvalidRequestError, match=message):
        compile_plan(sampler, config, STEPS, **part)


def test_rows_that_do_not_begin_anything_are_no_first_rows() -> None:
    """A plan of a sampler with a history, or in the middle of a step, is not cut."""
    for sampler, first in (("dpmpp-2m", 3), ("heun", 3), ("euler", 12), ("euler", -1)):
        with pytest.raises(InvalidRequestError, match="row"):
            compile_plan(sampler, CONFIG, STEPS).part(first, STEPS)


def scheduler_of(sampler: str) -> Any:
    """diffusers' scheduler with our configuration, before its first step."""
    names = {**ONE_CALL, **TWO_CALLS, "lms": "LMSDiscreteScheduler", "pndm": "PNDMScheduler"}
    names |= {"flow-euler": "FlowMatchEulerDiscreteScheduler", "flow-heun": "FlowMatchHeunDiscreteScheduler"}
    extra = {"algorithm_type": "sde-dpmsolver++"} if sampler == "dpmpp-2m-sde" else {}
    kind = getattr(importlib.import_module("diffusers"), names[sampler])
    scheduler = kind.from_config({**config_of(sampler), **extra})
    scheduler.set_timesteps(STEPS)
    return scheduler


WITH_NOISE = [*ONE_CALL, *TWO_CALLS, "lms", "pndm", "flow-euler"]


@pytest.mark.parametrize("sampler", WITH_NOISE)
@pytest.mark.parametrize("strength", [0.09, 0.5, 1.0])
def test_a_sample_gets_the_noise_that_diffusers_gives_it(sampler: str, strength: float) -> None:
    """A picture is brought to the step that diffusers' pipelines begin at, with as much noise as there."""
    scheduler = scheduler_of(sampler)
    skipped_steps = STEPS - int(STEPS * strength)
    pipeline = SimpleNamespace(scheduler=scheduler)
    timesteps, _ = StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, STEPS, strength, "cpu")  # type: ignore[arg-type]
    plan = compile_plan(sampler, config_of(sampler), STEPS, skipped_steps=skipped_steps)
    assert abs(plan.timesteps[0] - float(timesteps[0])) < 0.02
    sample, noise = drawn(3)(), drawn(4)()
    add = getattr(scheduler, "scale_noise", None) or scheduler.add_noise
    order = (timesteps[:1], torch.from_numpy(noise))
    expected = add(torch.from_numpy(sample), *(order if hasattr(scheduler, "scale_noise") else order[::-1]))
    assert distance(plan.noised(0, sample, noise), expected.numpy()) < 1e-5
    np.testing.assert_array_equal(plan.noised(len(plan), sample, noise), sample)


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "edm-euler"])
def test_a_perfect_model_keeps_a_sample_at_its_levels(sampler: str) -> None:
    """With a model that knows the sample, a step goes from noise at one row's level to noise at the next one's."""
    config = {**config_of(sampler), "prediction_type": "sample"} if not sampler.startswith("flow") else FLOW
    plan = compile_plan(sampler, config, STEPS, eta=0.0 if sampler == "tcd" else None)
    if plan.uses_noise.any() or sampler == "lcm":
        pytest.skip("fresh noise is another noise")
    sample, noise = drawn(3)(), drawn(4)()
    registers = np.zeros((plan.registers, *SHAPE), np.float32)
    registers[0] = plan.noised(0, sample, noise)
    for row in range(len(plan)):
        assert plan.levels is not None
        output = noise - sample if sampler.startswith("flow") else sample
        registers = step(plan, row, registers, output)
        signal = plan.levels[row + 1, 0] if row + 1 < len(plan) else 1.0
        if row + 1 < len(plan) or not sampler.startswith(("deis", "ddim", "pndm", "tcd")):  # which end above no noise
            assert distance(registers[0], plan.noised(row + 1, sample, noise)) < 5e-3, (row, signal)


def test_a_strength_that_takes_no_step_is_refused() -> None:
    """The sentence says what to change."""
    for sampler, steps in (("euler", 4), ("heun", 4), ("pndm", 5)):
        with pytest.raises(InvalidRequestError, match=f"none of the 4 steps of {sampler} would be taken: use more"):
            compile_plan(sampler, CONFIG, 4, skipped_steps=steps)
    with pytest.raises(InvalidRequestError, match=r"strength is 0.1, which leaves 5 of the 50 timesteps"):
        compile_plan("lcm", CONFIG, 6, strength=0.1)
    with pytest.raises(InvalidRequestError, match="sampler 'euler' takes no strength"):
        compile_plan("euler", CONFIG, 6, strength=0.1)


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_a_distilled_model_takes_all_its_steps_within_the_strength(sampler: str, strength: float) -> None:
    """The timesteps are those of diffusers' scheduler with that strength."""
    scheduler = scheduler_of(sampler)
    scheduler.set_timesteps(4, strength=strength)
    plan = compile_plan(sampler, CONFIG, 4, strength=strength)
    assert plan.timesteps.tolist() == scheduler.timesteps.tolist()
