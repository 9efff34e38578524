"""What families of flow matching share at export."""

from __future__ import annotations

from typing import ClassVar

from latentrt.runtime.families.flow import flow_scheduler, flow_shift
from latentrt.runtime.samplers import Plan, compile_plan

from .base import Config, Family

_USUAL_TOKENS = 4096  # of a picture of 1024x1024


class FlowFamily(Family):
    """A family whose denoiser predicts a flow."""

    denoiser: ClassVar[str] = "transformer"
    prediction = "flow_prediction"
    steps = 28

    def compile_plan(self, scheduler: Config, sampler: str, steps: int) -> Plan:
        """Shifted as for a picture of the usual size, where the configuration asks for that."""
        mu = flow_shift(scheduler, sampler, _USUAL_TOKENS)
        return compile_plan(sampler, flow_scheduler(scheduler, sampler), steps, mu=mu)
