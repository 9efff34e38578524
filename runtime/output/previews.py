"""Previews: images of unfinished latents, while a request is drawn."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from latentrt.engines.checks import check_integer
from latentrt.engines.errors import InvalidRequestError

from .result import StepInfo

PREVIEW_EVERY = 5
"""Calls of the denoiser between previews by default."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Preview:
    """Images of unfinished latents, with the noise that is left.

    Attributes:
        index: Number of the call of the denoiser that they follow, from 0.
        total: Number of calls of the whole run.
        images: uint8 ``[images, height, width, 3]``: how the output kind shows its latents.
    """

    index: int
    total: int
    images: NDArray[np.uint8] = field(repr=False)


class PreviewOptions(TypedDict, total=False):
    """Keywords of a request for previews."""

    on_preview: Callable[[Preview], object] | None
    preview_every: int | None


@dataclass(frozen=True)
class Previews:
    """The receiver of previews, and how often it gets one.

    Attributes:
        show: A function that is called with each preview.
        every: Calls of the denoiser between two previews.
    """

    show: Callable[[Preview], object]
    every: int

    def of(
        self, steps: Generator[StepInfo, None, _T], draw: Callable[[StepInfo], NDArray[np.uint8]]
    ) -> Generator[StepInfo, None, _T]:
        """The same steps, with previews shown after some; not after the last, which the result follows.

        Args:
            steps: The steps of a request; they are closed with this generator.
            draw: Makes the preview of a step, uint8 ``[images, height, width, 3]``.
        """
        try:
            while True:
                try:
                    step = next(steps)
                except StopIteration as stop:
                    result: _T = stop.value
                    return result
                if (step.index + 1) % self.every == 0 and step.index + 1 < step.total:
                    self.show(Preview(step.index, step.total, draw(step)))
                yield step
        finally:
            steps.close()


def take_previews(options: Mapping[str, Any]) -> tuple[dict[str, Any], Previews | None]:
    """Separate the options of previews from the other options of a request.

    Returns:
        The other options, and the previews, if any are wanted.

    Raises:
        InvalidRequestError: if a value is wrong.
    """
    rest = {name: value for name, value in options.items() if name not in PreviewOptions.__annotations__}
    show, every = options.get("on_preview"), options.get("preview_every")
    if every is not None:
        every = check_integer("preview_every", every, 1)
    if show is None:
        if every is not None:
            raise InvalidRequestError("preview_every is given without on_preview, a function that takes the previews")
        return rest, None
    if not callable(show):
        raise InvalidRequestError(f"on_preview is a {type(show).__name__}, expected a function that takes a preview")
    return rest, Previews(show, PREVIEW_EVERY if every is None else every)
