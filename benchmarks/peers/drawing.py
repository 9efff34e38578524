"""Parts that the peers with a pipeline of diffusers' share: schedulers, seeds, and the seconds of each stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import wire

_WITHIN_RANGE: Mapping[str, Any] = {"clip_sample": False}
SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # Where a config does not say, these two clip latents to [-1, 1], which is meant for pixels.
    "ddim": ("DDIMScheduler", _WITHIN_RANGE),
    "ddpm": ("DDPMScheduler", _WITHIN_RANGE),
    "pndm": ("PNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp-2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
"""By LatentRT's name of a sampler, diffusers' class and its settings besides the checkpoint's own config."""


def scheduler(sampler: str, config: Any) -> Any:
    """diffusers' scheduler for a sampler of LatentRT's, with the config of a checkpoint's own scheduler.

    Raises:
        UnsupportedError: if diffusers' pipeline has no scheduler that computes the same.
    """
    import diffusers

    if sampler not in SCHEDULERS:
        raise wire.UnsupportedError(f"diffusers' pipeline has no scheduler for the sampler {sampler!r}")
    name, settings = SCHEDULERS[sampler]
    return getattr(diffusers, name).from_config(config, **settings)


class HostClock:
    """A clock of moments on the processor."""

    def mark(self) -> Any:
        """The current moment."""
        return time.perf_counter()

    def between(self, begin: Any, end: Any) -> float:
        """Seconds from one moment to another."""
        return float(end - begin)


class CudaClock:
    """A clock of moments in the GPU's order of work; nothing waits for them before :meth:`between`."""

    def mark(self) -> Any:
        """The moment at which the GPU finishes the work that it has so far."""
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Wait for the second moment; returns the seconds between the two."""
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


class Drawing:
    """A pipeline of diffusers' that measures each stage.

    Args:
        pipe: The pipeline; three of its methods are replaced by ones that read the clock.
        clock: The clock for the pipeline's device.
    """

    def __init__(self, pipe: Any, clock: HostClock | CudaClock) -> None:
        self._pipe, self._clock = pipe, clock
        self._spans: dict[str, tuple[Any, Any]] = {}
        self._steps: list[Any] = []
        pipe.set_progress_bar_config(disable=True)
        pipe.encode_prompt = self._spanned("text_encoder", pipe.encode_prompt)
        pipe.vae.decode = self._spanned("vae_decoder", pipe.vae.decode)
        progress_bar = pipe.progress_bar

        def begin_loop(*arguments: Any, **options: Any) -> Any:
            self._steps = [clock.mark()]  # the pipeline asks for its progress bar where the loop begins
            return progress_bar(*arguments, **options)

        pipe.progress_bar = begin_loop

    def draw(self, request: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
        """Draw a job's images; returns the answer to ``draw``."""
        import numpy as np
        import torch

        self._spans, self._steps = {}, []
        begin = time.perf_counter()
        with torch.inference_mode():
            pictures = self._pipe(
                job["prompt"],
                negative_prompt=job["negative_prompt"],
                height=job["height"],
                width=job["width"],
                num_inference_steps=request.get("steps") or job["steps"],
                guidance_scale=job["guidance"],
                num_images_per_prompt=request.get("images") or job["images"],
                generator=torch.Generator("cpu").manual_seed(job["seed"]),
                output_type="np",
                callback_on_step_end=self._after_step,
                callback_on_step_end_tensor_inputs=[],
            ).images
        pixels = np.round(pictures * 255).astype(np.uint8)
        total = time.perf_counter() - begin
        if request.get("picture") is not None:
            np.save(request["picture"], pixels)
        seconds = {name: self._clock.between(*span) for name, span in self._spans.items()}
        steps = [self._clock.between(*pair) for pair in zip(self._steps, self._steps[1:])]  # noqa: B905 - one is shorter
        return {"total": total, "prompt": None, "schedule": None, "steps": steps, **seconds}

    def _after_step(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self._steps.append(self._clock.mark())
        return tensors

    def _spanned(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            begin = self._clock.mark()
            result = function(*arguments, **options)
            self._spans[stage] = (begin, self._clock.mark())
            return result

        return call


def check_options(options: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]) -> None:
    """Check the options of a job.

    Args:
        options: The job's options.
        known: The possible values of each option, by name.

    Raises:
        UnsupportedError: if a name or a value is not in ``known``.
    """
    for name, value in options.items():
        if name not in known:
            raise wire.UnsupportedError(f"option {name!r} is unknown, expected one of {', '.join(known)}")
        if value not in known[name]:
            raise wire.UnsupportedError(
                f"option {name} is {value!r}, expected one of {', '.join(map(repr, known[name]))}"
            )


def size(folder: Path, *patterns: str) -> int:
    """Size of a folder's files that match any of the patterns, in bytes."""
    return sum(path.stat().st_size for pattern in patterns for path in folder.rglob(pattern))
