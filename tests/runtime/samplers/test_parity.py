"""Each sampler against the diffusers class that is its reference, over the config keys that change numbers."""

from __future__ import annotations

from typing import Any

import pytest

STEPS = (1, 2, 3, 4, 5, 20, 50)

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
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "ddim": {**ZERO_SNR, "alpha-to-one": {"set_alpha_to_one": True}},
    "euler": {
        **RESPACED,
        **ZERO_SNR,
        "final-sigma-min": {"final_sigmas_type": "sigma_min"},
        "log-linear": {"interpolation_type": "log_linear"},
        "continuous": {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True},
    },
    "euler-a": {**ZERO_SNR},
    "dpmpp-2m": {
        **RESPACED,
        **ZERO_SNR,
        "lu": {"use_lu_lambdas": True},
        "final-sigma-min": {"final_sigmas_type": "sigma_min"},
        "euler-at-final": {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
        "not-lower-order-final": {"lower_order_final": False},
        "order-1": {"solver_order": 1},
        "order-3": {"solver_order": 3},
        "order-3-full": {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
        "heun": {"solver_type": "heun"},
        "other-solver": {"solver_type": "bh2", "algorithm_type": "deis", "final_sigmas_type": "sigma_min"},
        "lambda-clipped": {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
        "dpmsolver": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        "dpmsolver-heun": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_type": "heun"},
        "dpmsolver-3": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
        "sde": {"algorithm_type": "sde-dpmsolver++"},
        "sde-heun": {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        "sde-dpmsolver": {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        "sde-dpmsolver-heun": {
            "algorithm_type": "sde-dpmsolver",
            "final_sigmas_type": "sigma_min",
            "solver_type": "heun",
        },
        "flow": {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    },
}


# Where diffusers' own latents are not finite for some numbers of steps: the ancestral split of cosine betas' noise
# levels takes the root of a number that float32 rounds below zero.
NOT_FINITE_IN_DIFFUSERS = {"euler-a": ("cosine-betas",)}


def cases() -> list[Any]:
    return [
        pytest.param(
            sampler,
            {**STABLE_DIFFUSION, **variant},
            name in NOT_FINITE_IN_DIFFUSERS.get(sampler, ()),
            id=f"{sampler}-{name}",
        )
        for sampler, own in OWN.items()
        for name, variant in {**COMMON, **own}.items()
    ]


@pytest.mark.parametrize(("sampler", "config", "not_finite"), cases())
def test_a_sampler_gives_the_latents_of_its_diffusers_class(
    parity: Any, sampler: str, config: dict[str, Any], not_finite: bool
) -> None:
    """A sampler reaches diffusers' latents from the same noise stream, for every number of steps."""
    for steps in STEPS:
        parity.check(sampler, config, steps, not_finite=not_finite)


def test_every_oracle_has_cases(parity: Any) -> None:
    """No sampler with a diffusers class is left out of the table."""
    assert set(OWN) == set(parity.samplers)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_with_eta_draws_the_noise_that_diffusers_draws(parity: Any, eta: float, prediction: str) -> None:
    """DDIM with eta follows diffusers' noise stream."""
    for steps in STEPS:
        parity.check("ddim", {**STABLE_DIFFUSION, "prediction_type": prediction}, steps, eta=eta)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp-2m"])
def test_custom_timesteps_are_followed(parity: Any, sampler: str) -> None:
    """Custom timesteps give what diffusers gives for them."""
    parity.check(sampler, STABLE_DIFFUSION, None, {"timesteps": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]})


def test_custom_sigmas_are_followed(parity: Any) -> None:
    """Custom noise levels give what diffusers gives for them."""
    parity.check("euler", STABLE_DIFFUSION, None, {"sigmas": [14.6, 6.5, 3.9, 2.1, 1.2, 0.5, 0.1, 0.0]})
