"""The request that every contender of a contest serves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One request, the same for all contenders.

    Attributes:
        source: The diffusers directory that the bundle was built from, for peers; ``None`` where there is none.
        bundle: The bundle.
        workspace: The directory where peers keep the model in a form of their own.
        prompt: The prompt.
        negative_prompt: The negative prompt.
        seed: Seed of the noise, as ``torch.Generator("cpu")`` takes it.
        steps: Sampler steps.
        sampler: One of :data:`latentrt.runtime.samplers.SAMPLERS`.
        guidance: Scale of classifier-free guidance.
        width: Width in pixels.
        height: Height in pixels.
        images: Images of a request.
        threads: Threads on a CPU; 0 is the library's own choice.
        device: ``"cpu"`` or ``"cuda"``.
    """

    source: Path | None
    bundle: Path
    workspace: Path
    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    sampler: str
    guidance: float
    width: int
    height: int
    images: int
    threads: int
    device: str

    def message(self, options: dict[str, Any]) -> dict[str, Any]:
        """The job as a contender's program reads it, with the contender's own options."""
        paths = {name: None if (path := getattr(self, name)) is None else str(path) for name in _PATHS}
        return {**asdict(self), **paths, "options": options}

    def described(self) -> dict[str, Any]:
        """The job as a report describes it: everything that decides the images, and no paths."""
        return {name: value for name, value in asdict(self).items() if name not in _PATHS}


_PATHS = ("source", "bundle", "workspace")
