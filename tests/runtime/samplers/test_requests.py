"""What is asked of a sampler, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime.samplers import SAMPLERS, compile_plan, default_sampler

CONFIG: dict[str, Any] = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, math.nan, True, "20"])
def test_a_number_of_steps_that_cannot_be_run_is_refused(steps: Any) -> None:
    """Steps must be a whole number from 1 to the number of trained timesteps."""
    with pytest.raises(InvalidRequestError, match="steps is"):
        compile_plan("euler", CONFIG, steps)


def test_numpy_integers_are_numbers_of_steps() -> None:
    """An integer of numpy's is as good as Python's."""
    assert len(compile_plan("ddim", CONFIG, np.int64(3))) == 3


def test_an_unknown_sampler_is_answered_with_the_known() -> None:
    """The message lists every sampler."""
    with pytest.raises(InvalidRequestError) as refusal:
        compile_plan("eular", CONFIG, 20)
    assert all(name in str(refusal.value) for name in SAMPLERS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_class_name": "FancyScheduler"}, "FancyScheduler"),
        ({"_class_name": 3}, "_class_name"),
        ({"beta_schedule": "cubic"}, "beta_schedule"),
        ({"beta_schedule": ["linear"]}, "beta_schedule"),
        ({"beta_start": -0.1}, "betas"),
        ({"beta_end": math.nan}, "beta_end"),
        ({"beta_end": "0.01"}, "beta_end"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"num_train_timesteps": 1e3}, "num_train_timesteps"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"trained_betas": "many"}, "trained_betas"),
        ({"timestep_spacing": "random"}, "timestep_spacing"),
        ({"prediction_type": "score"}, "prediction_type"),
        ({"steps_offset": 0.5}, "steps_offset"),
        ({"solver_order": 4}, "solver_order"),
        ({"solver_type": "magic"}, "solver_type"),
        ({"algorithm_type": "dpmsolver"}, "final_sigmas_type"),
        ({"thresholding": True}, "thresholding"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_beta_sigmas"),
        ({"use_karras_sigmas": 1}, "use_karras_sigmas"),
        ({"use_karras_sigmas": True, "sigma_min": -1.0}, "sigma_min"),
        ({"use_karras_sigmas": True, "sigma_min": 9.0, "sigma_max": 2.0}, "sigma_min"),
        ({"variance_type": "learned"}, "variance_type"),
        ({"lambda_min_clipped": 50.0}, "lambda_min_clipped"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused_by_key(change: dict[str, Any], named: str) -> None:
    """The message names the key or value that is wrong, in one sentence."""
    with pytest.raises(InvalidRequestError, match=named) as refusal:
        compile_plan("dpmpp-2m", {**CONFIG, **change}, 20)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("config", [None, [], {1: 2}, {"_use_default_values": "beta_start"}])
def test_a_config_that_is_no_mapping_of_names_is_refused(config: Any) -> None:
    """Anything but a JSON object is refused."""
    with pytest.raises(InvalidRequestError):
        compile_plan("euler", config, 20)


@pytest.mark.parametrize("order", [2, 3])
def test_a_solver_that_meets_noise_level_zero_at_full_order_is_refused(order: int) -> None:
    """UniPC's equations have no solution there (diffusers fails as well): one sentence, not numpy's own error."""
    config = {**CONFIG, "solver_order": order, "lower_order_final": False}
    with pytest.raises(InvalidRequestError, match="use fewer steps") as refusal:
        compile_plan("unipc", config, 5)
    assert "\n" not in str(refusal.value)


def test_clipping_is_refused_where_it_is_asked_for_and_off_where_a_switched_config_lacks_it() -> None:
    """Clipping is nonlinear; a DDIM config without the key asks for it, another class's config does not."""
    with pytest.raises(InvalidRequestError, match="clip_sample"):
        compile_plan("ddim", {"_class_name": "PNDMScheduler", "clip_sample": True}, 5)
    with pytest.raises(InvalidRequestError, match="clip_sample"):
        compile_plan("ddim", {"_class_name": "DDIMScheduler"}, 5)
    assert len(compile_plan("ddim", {"_class_name": "EulerDiscreteScheduler"}, 5)) == 5


def test_keys_recorded_as_defaults_take_the_target_samplers_default() -> None:
    """A key under _use_default_values counts as missing, as in diffusers' from_config."""
    config = {**CONFIG, "timestep_spacing": "trailing", "_use_default_values": ["timestep_spacing"]}
    assert compile_plan("euler", config, 4).timesteps[0] == 999
    assert compile_plan("ddim", config, 4).timesteps[0] == 750


def test_keys_that_the_sampler_does_not_know_are_not_read() -> None:
    """A key of another class, or of a later version, changes nothing."""
    config = {**CONFIG, "solver_order": "of another class", "some_future_key": object()}
    assert np.array_equal(compile_plan("euler", config, 4).update, compile_plan("euler", CONFIG, 4).update)


def test_epsilon_prediction_at_zero_terminal_snr_is_refused() -> None:
    """Noise alone does not tell what the sample is; DDIM would divide by zero."""
    config = {**CONFIG, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(InvalidRequestError, match="zero terminal SNR"):
        compile_plan("ddim", config, 10)


@pytest.mark.parametrize(
    ("sampler", "arguments", "named"),
    [
        ("euler", {"eta": 0.5, "steps": 5}, "eta"),
        ("ddim", {"eta": 1.5, "steps": 5}, "eta"),
        ("ddim", {"eta": math.nan, "steps": 5}, "eta"),
        ("ddim", {"timesteps": [3, 2]}, "timesteps"),
        ("euler", {"timesteps": [3, 2], "sigmas": [3.0, 0.0]}, "both"),
        ("euler", {"timesteps": [2, 3]}, "timesteps"),
        ("euler", {"timesteps": [1000, 3]}, "timesteps"),
        ("euler", {"timesteps": []}, "timesteps"),
        ("euler", {"timesteps": 7}, "timesteps"),
        ("euler", {"timesteps": [3, 2], "steps": 3}, "steps"),
        ("euler", {"sigmas": [3.0]}, "sigmas"),
        ("euler", {"sigmas": [3.0, 4.0, 0.0]}, "sigmas"),
        ("euler", {"sigmas": [3.0, math.inf]}, "sigmas"),
        ("euler", {}, "steps"),
    ],
)
def test_arguments_that_contradict_the_sampler_or_each_other_are_refused(
    sampler: str, arguments: dict[str, Any], named: str
) -> None:
    """The message names the argument."""
    with pytest.raises(InvalidRequestError, match=named):
        compile_plan(sampler, CONFIG, **arguments)


def test_custom_timesteps_and_respaced_levels_exclude_each_other() -> None:
    """Diffusers refuses this too."""
    with pytest.raises(InvalidRequestError, match="karras"):
        compile_plan("euler", {**CONFIG, "use_karras_sigmas": True}, timesteps=[900, 500, 100])


def test_ancestral_draws_stop_where_nothing_depends_on_them() -> None:
    """The last ancestral step adds no noise, so that it draws none; a deterministic sampler never draws."""
    assert compile_plan("euler-a", CONFIG, 5).uses_noise.tolist() == [True] * 4 + [False]
    assert not compile_plan("euler", CONFIG, 5).uses_noise.any()
    assert not compile_plan("ddim", CONFIG, 5).uses_noise.any()


@pytest.mark.parametrize(
    ("class_name", "sampler"),
    [
        ("DDIMScheduler", "ddim"),
        ("EulerDiscreteScheduler", "euler"),
        ("EulerAncestralDiscreteScheduler", "euler-a"),
        ("DPMSolverMultistepScheduler", "dpmpp-2m"),
    ],
)
def test_the_default_sampler_is_the_configs_class(class_name: str, sampler: str) -> None:
    """A config's class decides which sampler a bundle starts with."""
    assert default_sampler({"_class_name": class_name}) == sampler


@pytest.mark.parametrize("config", [{}, {"_class_name": "DPMSolverSinglestepScheduler"}])
def test_a_class_without_a_sampler_has_no_default(config: dict[str, Any]) -> None:
    """The message lists what can be named instead."""
    with pytest.raises(InvalidRequestError, match="euler-a"):
        default_sampler(config)
