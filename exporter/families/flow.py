"""Base of the families of flow matching (Lipman et al. 2022, arXiv 2210.02747)."""

from __future__ import annotations

from typing import ClassVar

from latentrt.runtime.families.flow import flow_scheduler, flow_shift
from latentrt.runtime.samplers import Plan, compile_plan

from .base import Config, Family

_TOKENS = 4096  # of an image of 1024x1024


class FlowFamily(Family):
    """A family whose denoiser predicts a flow."""

    denoiser: ClassVar[str] = "transformer"
    prediction = "flow_prediction"
    steps = 28

    def compile_plan(self, scheduler: Config, sampler: str, steps: int) -> Plan:
        """Compile a sampler; noise levels that the configuration shifts by size are those of 1024x1024 pixels."""
        mu = flow_shift(scheduler, sampler, _TOKENS)
        return compile_plan(sampler, flow_scheduler(scheduler, sampler), steps, mu=mu)
