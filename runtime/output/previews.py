"""Previews: what pictures look like while they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from latentrt.engines.errors import InvalidRequestError

if TYPE_CHECKING:
    from .result import StepInfo

PREVIEW_EVERY = 5
"""Calls of the denoiser between previews unless told otherwise."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Preview:
    """Pictures as they stand, with the noise that is left.

    Attributes:
        index: Number of the call of the denoiser that they come after, from 0.
        total: Number of calls of the whole run.
        images: uint8 ``[images, height, width, 3]``.
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
    """Whom to show previews, and how often.

    Attributes:
        show: Is called with each.
        every: Calls of the denoiser between two.
    """

    show: Callable[[Preview], object]
    every: int

    def of(
        self, steps: Generator[StepInfo, None, _T], draw: Callable[[StepInfo], NDArray[np.uint8]]
    ) -> Generator[StepInfo, None, _T]:
        """The same steps, with previews shown after some; not after the last, which the result follows."""
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
    """Take what concerns previews out of a request's options.

    Returns:
        The other options, and the previews, if any are wanted.

    Raises:
        InvalidRequestError: if a value is wrong.
    """
    rest = {name: value for name, value in options.items() if name not in PreviewOptions.__annotations__}
    show, every = options.get("on_preview"), options.get("preview_every")
    if every is not None and (type(every) is not int or every < 1):
        raise InvalidRequestError(f"preview_every is {every!r}, expected a whole number from 1 on")
    if show is None:
        if every is not None:
            raise InvalidRequestError("preview_every is given without on_preview, a function that takes the previews")
        return rest, None
    if not callable(show):
        raise InvalidRequestError(f"on_preview is a {type(show).__name__}, expected a function that takes a preview")
    return rest, Previews(show, PREVIEW_EVERY if every is None else every)
