"""``ddim``, ``ddpm``, ``deis``, ``dpm_multistep``, ``edm``, ``euler``, ``flow`` and ``unipc`` agree with diffusers.

Each sampler against the diffusers class that is its reference, over the config keys that change numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

STEPS = (1, 2, 3, 4, 5, 20)
MANY = 50
"""For each sampler's plainest case: where few steps agree and 20 too, another variant adds nothing at 50."""

STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}

# Variants of the trained schedule and of the way through it, which every sampler is asked for.
COMMON: dict[str, dict[str, Any]] = {
    "stable-diffusion": {},
    "v-prediction": {"prediction_type": "v_prediction"},
    "sample-prediction": {"prediction_type": "sample"},
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace", "steps_offset": 0},
    "linear-betas": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "cosine-betas": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "trained-betas": {"num_train_timesteps": 200, "trained_betas": [0.001 + 0.0001 * i for i in range(200)]},
    "fewer-trained": {"num_train_timesteps": 250, "timestep_spacing": "trailing"},
}
RESPACED: dict[str, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "karras-bounds": {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0},
    "karras-cosine": {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True, "prediction_type": "v_prediction"},
}
ZERO_SNR: dict[str, dict[str, Any]] = {
    "zero-snr": {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
}
MULTISTEP: dict[str, dict[str, Any]] = {
    "order-1": {"solver_order": 1},
    "order-3": {"solver_order": 3},
    "order-3-full": {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
    "flow": {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
}
DPM: dict[str, dict[str, Any]] = {
    **RESPACED,
    **ZERO_SNR,
    "lu": {"use_lu_lambdas": True},
    "final-sigma-min": {"final_sigmas_type": "sigma_min"},
    "euler-at-final": {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
    "not-lower-order-final": {"lower_order_final": False},
    "order-1": {"solver_order": 1},
    "heun": {"solver_type": "heun"},
    "lambda-clipped": {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
    "flow": MULTISTEP["flow"],
}
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "ddim": {**ZERO_SNR, "alpha-to-one": {"set_alpha_to_one": True}},
    "ddpm": {
        **ZERO_SNR,
        **{kind: {"variance_type": kind} for kind in ("fixed_small", "fixed_small_log", "fixed_large")},
        "null-variance": {"variance_type": None},
    },
    "pndm": {"alpha-to-one": {"set_alpha_to_one": True}},
    "lms": RESPACED,
    "euler": {
        **RESPACED,
        **ZERO_SNR,
        "final-sigma-min": {"final_sigmas_type": "sigma_min"},
        "log-linear": {"interpolation_type": "log_linear"},
        "continuous": {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True},
    },
    "euler-a": ZERO_SNR,
    "heun": {**RESPACED, "exp-betas": {"beta_schedule": "exp", "prediction_type": "v_prediction"}},
    "dpm2": RESPACED,
    "dpm2-a": RESPACED,
    "dpmpp-2m": {
        **DPM,
        **MULTISTEP,
        "other-solver": {"solver_type": "bh2", "algorithm_type": "deis", "final_sigmas_type": "sigma_min"},
        "dpmsolver": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        "dpmsolver-heun": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_type": "heun"},
        "dpmsolver-3": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
        "sde": {"algorithm_type": "sde-dpmsolver++"},
        "sde-dpmsolver": {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        "sde-dpmsolver-heun": {
            "algorithm_type": "sde-dpmsolver",
            "final_sigmas_type": "sigma_min",
            "solver_type": "heun",
        },
    },
    "dpmpp-2m-sde": DPM,
    "dpmpp-sde": RESPACED,
    "unipc": {
        **RESPACED,
        **ZERO_SNR,
        **MULTISTEP,
        "bh1": {"solver_type": "bh1", "final_sigmas_type": "sigma_min", "solver_order": 3},
        "noise": {"predict_x0": False, "final_sigmas_type": "sigma_min"},
        "noise-3": {"predict_x0": False, "final_sigmas_type": "sigma_min", "solver_order": 3, "solver_type": "bh1"},
        "some-uncorrected": {"disable_corrector": [0, 2]},
        "final-sigma-min-karras": {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
        "flow-sigma-min": {**MULTISTEP["flow"], "final_sigmas_type": "sigma_min"},
    },
    "deis": {**RESPACED, **MULTISTEP, "other-solver": {"solver_type": "midpoint", "algorithm_type": "dpmsolver++"}},
    "lcm": {**ZERO_SNR, "scaling": {"timestep_scaling": 1.0}, "original": {"original_inference_steps": 100}},
    "tcd": {**ZERO_SNR, "original": {"original_inference_steps": 100}},
}

EDM = {"_class_name": "EDMEulerScheduler"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
OTHER_KINDS = [
    ("edm-euler", EDM),
    ("edm-euler", {**EDM, "prediction_type": "v_prediction", "final_sigmas_type": "sigma_min", "sigma_data": 1.0}),
    ("edm-euler", {**EDM, "sigma_schedule": "exponential", "sigma_max": 60.0, "sigma_min": 0.01}),
    ("edm-euler", {**EDM, "rho": 5.0}),
    ("flow-euler", FLOW),
    ("flow-euler", {**FLOW, "shift": 1.0, "use_karras_sigmas": True}),
    ("flow-euler", {**FLOW, "use_exponential_sigmas": True}),
    ("flow-euler", {**FLOW, "use_beta_sigmas": True, "num_train_timesteps": 500}),
    ("flow-euler", {**FLOW, "invert_sigmas": True}),
    ("flow-euler", {**FLOW, "stochastic_sampling": True}),
    ("flow-heun", FLOW),
    ("flow-heun", {**FLOW, "num_train_timesteps": 100, "shift": 1.15}),
]


def cases() -> list[Any]:
    return [
        pytest.param(sampler, {**STABLE_DIFFUSION, **variant}, id=f"{sampler}-{name}")
        for sampler, own in OWN.items()
        for name, variant in {**COMMON, **own}.items()
    ]


@pytest.mark.parametrize(("sampler", "config"), cases())
def test_a_sampler_gives_the_latents_of_its_diffusers_class(parity: Any, sampler: str, config: dict[str, Any]) -> None:
    """A sampler reaches diffusers' latents from the same noise stream, for every number of steps."""
    for steps in (*STEPS, MANY) if config == STABLE_DIFFUSION else STEPS:
        parity.check(sampler, config, steps)


@pytest.mark.parametrize(("sampler", "config"), OTHER_KINDS)
def test_flow_and_edm_samplers_give_the_latents_of_their_diffusers_class(
    parity: Any, sampler: str, config: dict[str, Any]
) -> None:
    """Samplers without a table of trained noise levels agree with diffusers too."""
    for steps in (*STEPS, MANY) if config in (EDM, FLOW) else STEPS:
        parity.check(sampler, config, steps)


def test_every_oracle_has_cases(parity: Any) -> None:
    """No sampler with a diffusers class is left out of the tables."""
    assert {*OWN, *(sampler for sampler, _ in OTHER_KINDS)} == set(parity.samplers)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_pndm_starts_with_runge_kutta_steps_unless_they_are_skipped(parity: Any, spacing: str, prediction: str) -> None:
    """Without skip_prk_steps PNDM takes three Runge-Kutta steps of four evaluations first, as in the paper."""
    config = {
        **STABLE_DIFFUSION,
        "skip_prk_steps": False,
        "timestep_spacing": spacing,
        "prediction_type": prediction,
    }
    for steps in (4, 5, 20):
        parity.check("pndm", config, steps)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("terminal", [None, 0.1])
def test_dynamic_shifts_are_those_of_diffusers(parity: Any, kind: str, terminal: float | None) -> None:
    """A flow schedule shifted by mu, and stretched to a terminal level, follows diffusers."""
    config = {**FLOW, "use_dynamic_shifting": True, "time_shift_type": kind, "shift_terminal": terminal}
    for steps in STEPS[1:]:
        parity.check("flow-euler", config, steps, {"mu": 0.8})
    solver = {"use_flow_sigmas": True, "use_dynamic_shifting": True, "prediction_type": "flow_prediction"}
    for sampler in ("dpmpp-2m", "deis", "unipc"):
        if kind == "exponential" and (terminal is None or sampler == "unipc"):
            parity.check(sampler, {**solver, "shift_terminal": terminal}, 20, {"mu": 0.8})


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_tcd_with_eta_draws_the_noise_that_diffusers_draws(parity: Any, eta: float, prediction: str) -> None:
    """TCD with eta follows diffusers' noise stream."""
    for steps in STEPS:
        parity.check("tcd", {**STABLE_DIFFUSION, "prediction_type": prediction}, steps, eta=eta)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_with_eta_draws_the_noise_that_diffusers_draws(parity: Any, eta: float, prediction: str) -> None:
    """DDIM with eta follows diffusers' noise stream."""
    for steps in STEPS:
        parity.check("ddim", {**STABLE_DIFFUSION, "prediction_type": prediction}, steps, eta=eta)


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddpm", "dpmpp-2m", "dpmpp-2m-sde", "lcm", "tcd"])
def test_custom_timesteps_are_followed(parity: Any, sampler: str) -> None:
    """Custom timesteps give what diffusers gives for them."""
    parity.check(sampler, STABLE_DIFFUSION, None, {"timesteps": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]})


def test_custom_sigmas_are_followed(parity: Any) -> None:
    """Custom noise levels give what diffusers gives for them."""
    parity.check("euler", STABLE_DIFFUSION, None, {"sigmas": [14.6, 6.5, 3.9, 2.1, 1.2, 0.5, 0.1, 0.0]})
    parity.check("flow-euler", FLOW, None, {"sigmas": [1.0, 0.8, 0.5, 0.3, 0.1]})
    parity.check("flow-euler", FLOW, None, {"timesteps": [999.0, 850.0, 400.0, 100.0]})
    flow = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    parity.check("unipc", flow, None, {"sigmas": np.array([1.0, 0.8, 0.5, 0.3, 0.1])})
