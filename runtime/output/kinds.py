"""Output kinds: how the latents of a family's models become the payload of a result, its previews, and a file.

A family names its kind (:attr:`latentrt.runtime.families.base.Family.output_kind`), and :data:`OUTPUT_KINDS` has the
kind by that name. A new kind is a class on top of :class:`OutputKind`, and an entry there.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Engine
from latentrt.engines.errors import InvalidRequestError

from ..bundle.manifest import TINY_DECODER, Manifest
from ..engine_calls import Floats
from ..families import Family
from ..request.request import Request
from ..vae.decoding import decode_latents
from ..vae.tiling import Tiling
from .safety_checker import check_images

_MOST_COLUMNS = 4


@dataclass(frozen=True)
class Decoding:
    """The means of decoding, and how the caller wants it done.

    Attributes:
        engine: Gives the opened engine of a component.
        manifest: The bundle's.
        max_batch: Most entries to decode at a time; ``None`` sets no limit.
        tiling: How to cut large images into tiles; ``None`` decodes them whole.
        decoder: Which of a bundle's decoders, by the name that requests have for it; ``None`` is the model's own.
    """

    engine: Callable[[str], Engine]
    manifest: Manifest
    max_batch: int | None = None
    tiling: Tiling | None = None
    decoder: str | None = None


class OutputKind(ABC):
    """A kind of output. Stateless, so one object serves all threads."""

    name: ClassVar[str]
    """Its name: the key of :data:`OUTPUT_KINDS`."""
    dtype: ClassVar[str]
    """Element type of a payload, in numpy's words."""
    previews: ClassVar[bool] = False
    """Whether :meth:`preview` can show unfinished latents."""

    @abstractmethod
    def shape(self, family: Family, request: Request) -> tuple[int, ...]:
        """The shape of a request's payload; the first dimension is the number of its images (or clips, or sounds)."""

    @abstractmethod
    def decode(self, decoding: Decoding, latents: Floats) -> NDArray[Any]:
        """Decode latents ``[number, ...]`` to a payload ``[number, ...]`` of :attr:`dtype`.

        Raises:
            InvalidRequestError: if there is no such decoder.
            EngineError: if an engine fails, or computes values that are not finite.
        """

    @abstractmethod
    def write(
        self, path: str | os.PathLike[str], payload: NDArray[Any], parameters: str, texts: Mapping[str, str]
    ) -> None:
        """Write a payload to a file, whole or not at all.

        Args:
            path: The file.
            payload: The payload of a result, with at least one entry.
            parameters: The parameters of the request as one text, in the form that other tools read.
            texts: Further texts by keyword.

        Raises:
            OutputError: if the file cannot be written.
        """

    def check(self, request: Request) -> None:
        """Refuse a request for what this kind of output does not have; called before anything is computed.

        Raises:
            InvalidRequestError: naming the first option that does not fit.
        """
        if request.safety != "off":
            raise InvalidRequestError(
                f"safety is {request.safety!r}, but the output is {self.name}, and safety checkers take images alone; "
                "leave it out"
            )
        if request.keep_outside:
            raise InvalidRequestError(
                f"keep_outside is asked for, but the output is {self.name}, which cannot be put into an image; "
                "leave it out"
            )

    def empty(self, family: Family, request: Request) -> NDArray[Any]:
        """The payload of a request that ends in latents: no entry."""
        return np.empty((0, *self.shape(family, request)[1:]), self.dtype)

    def check_safety(
        self, engine: Callable[[str], Engine], payload: NDArray[Any], safety: str
    ) -> tuple[NDArray[Any], tuple[bool, ...] | None]:
        """A payload as a request wants it handed out, and which entries are unsafe; ``None`` where nothing is checked.

        Args:
            engine: Gives the opened engine of a component.
            payload: The payload.
            safety: One of :data:`latentrt.runtime.request.options.SAFETY`; :meth:`check` let it pass.
        """
        return payload, None

    def preview(self, decoding: Decoding, latents: Floats) -> NDArray[np.uint8]:
        """Images that show unfinished latents, uint8 ``[number, height, width, 3]``.

        Args:
            decoding: The means of decoding; a kind chooses the decoder itself.
            latents: Latents with the noise that is left, scaled to about the size of those without.

        Raises:
            InvalidRequestError: if this kind has no previews.
            EngineError: if an engine fails.
        """
        raise InvalidRequestError(f"there are no previews of {self.name}; leave on_preview out")


class ImageOutput(OutputKind):
    """RGB images, uint8 ``[images, height, width, 3]``, decoded by a VAE or a tiny autoencoder."""

    name = "image"
    dtype = "uint8"
    previews = True

    def shape(self, family: Family, request: Request) -> tuple[int, ...]:
        """Images, height, width, and the three colours."""
        return request.images, request.height, request.width, 3

    def check(self, request: Request) -> None:
        """Images have all that a request can ask for."""

    def decode(self, decoding: Decoding, latents: Floats) -> NDArray[np.uint8]:
        """Latents ``[images, channels, h, w]`` to pixels."""
        return decode_latents(
            decoding.engine, decoding.manifest, latents, decoding.tiling, decoding.decoder, decoding.max_batch
        )

    def check_safety(
        self, engine: Callable[[str], Engine], payload: NDArray[Any], safety: str
    ) -> tuple[NDArray[Any], tuple[bool, ...] | None]:
        """See :func:`~latentrt.runtime.output.safety_checker.check_images`."""
        return check_images(engine, payload, safety)

    def preview(self, decoding: Decoding, latents: Floats) -> NDArray[np.uint8]:
        """The images with their noise, by the tiny decoder where the bundle has one."""
        decoder = "tiny" if TINY_DECODER in decoding.manifest.components else "full"
        return decode_latents(decoding.engine, decoding.manifest, latents, decoding.tiling, decoder, decoding.max_batch)

    def write(
        self, path: str | os.PathLike[str], payload: NDArray[Any], parameters: str, texts: Mapping[str, str]
    ) -> None:
        """A PNG file of the image, or of a contact sheet of several."""
        from ..images.png import sheet, write_png  # pillow's PNG module is loaded where one is written

        several = len(payload) > 1
        pixels = sheet(payload, columns=min(_MOST_COLUMNS, len(payload))) if several else payload[0]
        write_png(path, pixels, parameters, texts)


OUTPUT_KINDS: dict[str, OutputKind] = {kind.name: kind for kind in (ImageOutput(),)}
"""Output kinds by the name that families have for them; a further kind is one more entry."""


def output_kind(name: str) -> OutputKind:
    """The output kind of a name.

    Raises:
        InvalidRequestError: if there is none.
    """
    if name not in OUTPUT_KINDS:
        raise InvalidRequestError(f"unknown output kind {name!r}; known kinds: {', '.join(OUTPUT_KINDS)}")
    return OUTPUT_KINDS[name]
