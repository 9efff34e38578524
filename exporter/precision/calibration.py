"""Record the inputs that the parts of a model receive while real images are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Array, Engine, TensorSpec
from latentrt.engines.checks import check_integer
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
"""Prompts of a calibration for which the caller gives none."""

MAX_PROMPTS = 1000
"""Most prompts of a calibration."""
_MAX_FILE = 1 << 20


@dataclass(frozen=True)
class Calibration:
    """How to draw the images that a build of reduced precision is calibrated on and measured by.

    Attributes:
        prompts: Prompts; one image is drawn for each.
        steps: Steps of each image.
        checked: Number of prompts that are drawn again, from another seed, to compare precisions.
        recorded: Largest number of the denoiser's calls to keep, spread over prompts and timesteps.

    Raises:
        InvalidRequestError: if there are no prompts or too many, or a number is below 1.
    """

    prompts: tuple[str, ...] = PROMPTS
    steps: int = 8
    checked: int = 4
    recorded: int = 16

    def __post_init__(self) -> None:
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise InvalidRequestError(f"calibration has {len(self.prompts)} prompts, expected 1 to {MAX_PROMPTS}")
        for name in ("steps", "checked", "recorded"):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), 1))


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read prompts from a text file, one on each line; blank lines and lines that begin with ``#`` do not count.

    Raises:
        InvalidRequestError: if the file cannot be read, is not UTF-8 text, or holds no prompts or too many.
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
    """An engine that runs another engine and keeps copies of its inputs.

    Args:
        engine: The other engine, opened.

    Attributes:
        inputs: Inputs of the other engine.
        outputs: Outputs of the other engine.
        calls: Inputs of the calls that were kept.
        keep: Whether to keep the inputs of the next call.
    """

    def __init__(self, engine: Engine) -> None:
        self.inputs: Mapping[str, TensorSpec] = engine.inputs
        self.outputs: Mapping[str, TensorSpec] = engine.outputs
        self.calls: list[Mapping[str, Array]] = []
        self.keep = True
        self._engine = engine
        self._bound: dict[str, Array] = {}

    def open(self) -> Recorder:
        """Return the recorder: the engine is open already."""
        return self

    def bind(self, feeds: Mapping[str, Array]) -> None:
        """Bind inputs that stay the same for the calls to come."""
        self._bound |= feeds
        self._engine.bind(feeds)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the other engine, and keep a copy of all inputs, bound ones too, if ``keep`` is set."""
        if self.keep:
            self.calls.append({name: np.array(values) for name, values in (self._bound | dict(feeds)).items()})
        return self._engine.run(feeds)

    def close(self) -> None:
        """Close the other engine."""
        self._engine.close()


@dataclass(frozen=True)
class Recording:
    """The inputs of a model's components while images were drawn, and the images.

    Attributes:
        calls: Inputs of the calls that were kept, by component.
        images: uint8 ``[prompts, height, width, 3]``.
    """

    calls: Mapping[str, list[Mapping[str, Array]]]
    images: NDArray[np.uint8]


def record(
    pipeline: Pipeline, calibration: Calibration, *, width: int | None = None, height: int | None = None
) -> Recording:
    """Draw an image for each prompt, and keep the inputs of each component's calls.

    At most ``calibration.recorded`` calls of the denoiser are kept, equally many for each prompt, at timesteps that
    together cover the whole run. Each call holds both halves of guidance.

    Args:
        pipeline: The pipeline whose engines are recorded; it stays unchanged.
        calibration: Prompts, steps, and the number of calls to keep.
        width: Width of the images in pixels; ``None`` takes the bundle's default.
        height: Height of the images in pixels; ``None`` takes the bundle's default.
    """
    recorders = {name: Recorder(engine) for name, engine in pipeline.engines.items()}
    family = pipeline.family
    step = recorders[family.stages()[-1] if family.stages()[-1] in recorders else family.denoiser]
    per_prompt = max(1, calibration.recorded // len(calibration.prompts))
    images = []
    with Pipeline(pipeline.bundle, recorders, prompt_cache=0) as recorded:
        for number, prompt in enumerate(calibration.prompts):
            run = recorded.start(prompt, steps=calibration.steps, seed=number, width=width, height=height)
            # Evenly spread steps; each prompt's begin a little later than those of the prompt before it.
            offset = number / len(calibration.prompts)
            wanted = {int((place + offset) * len(run) / per_prompt) for place in range(per_prompt)}
            while not run.done:
                step.keep = run.index in wanted and len(step.calls) < calibration.recorded
                recorded.advance([run])
            images.append(recorded.finish(run))
    return Recording({name: recorder.calls for name, recorder in recorders.items()}, np.concatenate(images))
