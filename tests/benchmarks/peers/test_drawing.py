"""What peers with a pipeline of diffusers' share: samplers."""

from __future__ import annotations

import pytest

from latentrt.benchmarks.peers import drawing, wire


def test_samplers_are_those_of_the_parity_tests() -> None:
    """Every sampler has a class of diffusers' that takes the config of another, or is refused."""
    import diffusers

    from latentrt.runtime.samplers import SAMPLERS

    config = diffusers.PNDMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction").config
    assert set(drawing.SCHEDULERS) < set(SAMPLERS)
    for name, (kind, settings) in drawing.SCHEDULERS.items():
        made = drawing.scheduler(name, config)
        assert type(made).__name__ == kind
        assert {key: made.config[key] for key in settings} == dict(settings)
        assert made.config.prediction_type == "v_prediction"
    with pytest.raises(wire.UnsupportedError, match="'flow-euler'"):
        drawing.scheduler("flow-euler", config)
