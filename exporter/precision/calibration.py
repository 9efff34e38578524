"""Calibration: what the parts of a model see while real pictures are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Array, Engine, TensorSpec
from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime.pipeline import Pipeline

PROMPTS = (
    "a photo of a cat lying on a sofa",
    "a red apple",
    "portrait of an old sailor, oil painting",
    "a mountain lake at sunrise, wide angle",
    "a busy street in the rain at night, neon signs",
    "a bowl of soup on a wooden table",
    "a rocket over the moon, line drawing",
    "a yellow flower in front of a blue wall",
)
"""Prompts of a calibration for which none are given."""

MAX_PROMPTS = 1000
_MAX_FILE = 1 << 20


@dataclass(frozen=True)
class Calibration:
    """How to draw the pictures that a build of reduced precision learns from, and is judged by.

    Attributes:
        prompts: Prompts, with one picture each.
        steps: Steps of each picture.
        checked: How many of the prompts are drawn once more, from another seed, to compare precisions.
        recorded: Most calls of the denoiser to keep, spread over prompts and timesteps.
    """

    prompts: tuple[str, ...] = PROMPTS
    steps: int = 8
    checked: int = 4
    recorded: int = 16

    def __post_init__(self) -> None:
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise InvalidRequestError(f"calibration has {len(self.prompts)} prompts, expected 1 to {MAX_PROMPTS}")
        for name in ("steps", "checked", "recorded"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} is {getattr(self, name)!r}, expected a whole number from 1 on")


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts from a text file, one a line; blank lines and lines that begin with ``#`` are left out.

    Raises:
        InvalidRequestError: if the file cannot be read, is no UTF-8 text, or holds none or too many.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE + 1)
        if len(content) > _MAX_FILE:  # before it is decoded: the end may cut a character in two
            raise InvalidRequestError(f"the prompts {path} have more than {_MAX_FILE} bytes; give fewer")
        lines = content.decode().splitlines()
    except OSError as error:
        raise InvalidRequestError(f"the prompts {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the prompts {path} are not UTF-8 text: {error.reason}") from error
    prompts = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise InvalidRequestError(f"{path} holds {len(prompts)} prompts, expected 1 to {MAX_PROMPTS}, one a line")
    return prompts


class Recorder:
    """An engine that keeps the inputs of some of its calls.

    Args:
        engine: The opened engine.

    Attributes:
        calls: Inputs that were kept.
        keep: Whether to keep those of the next call.
    """

    def __init__(self, engine: Engine) -> None:
        self.inputs: Mapping[str, TensorSpec] = engine.inputs
        self.outputs: Mapping[str, TensorSpec] = engine.outputs
        self.calls: list[Mapping[str, Array]] = []
        self.keep = True
        self._engine = engine
        self._bound: dict[str, Array] = {}

    def open(self) -> Recorder:
        """It is open already."""
        return self

    def bind(self, feeds: Mapping[str, Array]) -> None:
        """Pass on."""
        self._bound |= feeds
        self._engine.bind(feeds)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Pass on, and keep a copy of the inputs."""
        if self.keep:
            self.calls.append({name: np.array(values) for name, values in (self._bound | dict(feeds)).items()})
        return self._engine.run(feeds)

    def close(self) -> None:
        """Pass on."""
        self._engine.close()


@dataclass(frozen=True)
class Recording:
    """What was seen while pictures were drawn.

    Attributes:
        calls: Inputs of the calls that were kept, by component.
        pictures: uint8 ``[prompts, height, width, 3]``.
    """

    calls: Mapping[str, list[Mapping[str, Array]]]
    pictures: NDArray[np.uint8]


def record(
    pipeline: Pipeline, calibration: Calibration, *, width: int | None = None, height: int | None = None
) -> Recording:
    """Draw the prompts, and keep what each component was called with.

    Of the denoiser's calls at most ``calibration.recorded`` are kept: every prompt has its share, at timesteps that
    together cover all of the run. Each holds both halves of guidance.

    Args:
        pipeline: Its engines are replaced by recorders.
        calibration: What to draw.
        width: Pixels; ``None`` is the bundle's default.
        height: Likewise.
    """
    recorders = {name: Recorder(engine) for name, engine in pipeline.engines.items()}
    family = pipeline.family
    step = recorders[family.stages()[-1] if family.stages()[-1] in recorders else family.denoiser]
    per_prompt = max(1, calibration.recorded // len(calibration.prompts))
    pictures = []
    with Pipeline(pipeline.bundle, recorders, prompt_cache=0) as recorded:
        for number, prompt in enumerate(calibration.prompts):
            run = recorded.start(prompt, steps=calibration.steps, seed=number, width=width, height=height)
            offset = number / len(calibration.prompts)
            wanted = {int((place + offset) * len(run) / per_prompt) for place in range(per_prompt)}
            while not run.done:
                step.keep = run.index in wanted and len(step.calls) < calibration.recorded
                recorded.advance([run])
            pictures.append(recorded.finish(run))
    return Recording({name: recorder.calls for name, recorder in recorders.items()}, np.concatenate(pictures))
