"""The base class of flow matching families: the samplers that run their scheduler configurations, and the shift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from latentrt.engines.errors import BundleError, InvalidRequestError

from ..bundle.manifest import Manifest
from ..request.request import Request
from ..samplers import Plan, flow_shift_mu
from .base import Family

SOLVERS = ("dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m-sde", "unipc", "deis")
"""Samplers of diffusion models that also run flow models, with the configuration of :func:`flow_scheduler`."""
SHIFTING = ("flow-euler", *SOLVERS)
"""Samplers that can shift their levels by the size of the image."""

_LARGEST_PATCH = 16


def flow_scheduler(scheduler: Mapping[str, Any], sampler: str) -> dict[str, Any]:
    """A flow scheduler's configuration, in the form that a sampler takes.

    A solver of diffusion models gets the keys that its diffusers class needs for a flow model: flow levels, the flow as
    the prediction type, and the static shift under that class's name for it.

    Args:
        scheduler: A diffusers ``scheduler_config.json``.
        sampler: The sampler's name.
    """
    if sampler not in SOLVERS or scheduler.get("use_flow_sigmas"):
        return dict(scheduler)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": scheduler.get("shift", 1.0)}
    return {**scheduler, **flow}


def flow_shift(scheduler: Mapping[str, Any], sampler: str, tokens: int) -> float | None:
    """The dynamic shift for an image, or ``None`` where the configuration asks for none.

    Args:
        scheduler: A diffusers ``scheduler_config.json``.
        sampler: The sampler's name.
        tokens: Number of the image's tokens.

    Raises:
        InvalidRequestError: if the sampler cannot shift its levels that way.
    """
    if not scheduler.get("use_dynamic_shifting"):
        return None
    if sampler not in SHIFTING:
        raise InvalidRequestError(
            f"sampler {sampler!r} cannot shift its schedule by the size of the image, as this model needs; "
            f"expected one of {', '.join(SHIFTING)}"
        )
    return flow_shift_mu(scheduler, tokens)


class FlowFamily(Family):
    """A family whose denoiser predicts a flow and sees the latents as patches."""

    strength = 0.6

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        if not 1 <= self.patch <= _LARGEST_PATCH:
            raise BundleError(f"settings.patch is {self.patch}, expected 1 to {_LARGEST_PATCH}")

    @property
    def patch(self) -> int:
        """Latents along one side of a patch, which is one token."""
        return int(self.manifest.settings["patch"])

    @property
    def size_multiple(self) -> int:
        """Pixels of a patch."""
        return self.manifest.latent.vae_scale_factor * self.patch

    def sigmas(self, request: Request) -> Sequence[float] | None:
        """Noise levels to visit where the request names none; ``None`` leaves them to the sampler."""
        return None

    def skipped_steps(self, request: Request) -> int:
        """Steps to leave out, counted as in diffusers: a step that is taken in part counts as taken."""
        if request.strength is None:
            return 0
        return int(max(request.steps - min(request.steps * request.strength, request.steps), 0))

    def plan(self, request: Request) -> Plan:
        """The plan of the request's sampler, shifted by the image's size if the model was trained so."""
        scheduler = self.manifest.scheduler
        mu = flow_shift(
            scheduler, request.sampler, request.width // self.size_multiple * (request.height // self.size_multiple)
        )
        sigmas, skipped_steps = self.sigmas(request), self.skipped_steps(request)
        return request.compile_plan(
            flow_scheduler(scheduler, request.sampler), sigmas=sigmas, mu=mu, skipped_steps=skipped_steps
        )
