"""Image to image and inpainting: what a request draws from besides texts, and what it leaves as it was.

A picture is encoded and given as much noise as the sampler's plan has at the row that the strength lets it begin at;
inpainting with models that were made for text to image brings what is outside of the mask back after every step, as in
RePaint (Lugmayr et al. 2022, arXiv 2201.09865, equation 8), and as diffusers' pipelines of both tasks do it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from latentrt.engines.device import to_numpy
from latentrt.engines.errors import InvalidRequestError

from .families import Family, family_of
from .manifest import VAE_ENCODER, Latent, Manifest
from .noise import Noise, varied_noise
from .pictures import ReadPicture, read_picture

if TYPE_CHECKING:
    from .request import Request
    from .run import Run
    from .samplers import Plan

Floats = NDArray[np.float32]
Region = tuple[int, int, int, int]
"""Left, top, right and bottom, in pixels."""

IMAGE_TO_IMAGE, INPAINTING = "image-to-image", "inpainting"
"""What a bundle with a VAE's encoder is for besides its family's tasks."""

RESIZES = ("stretch", "crop")
"""What becomes of a picture of another shape: it is stretched, or its middle is cut out."""

_OF_MASKS = ("mask_blur", "mask_padding", "keep_outside")
_OF_PICTURES = ("mask", "strength", "resize", *_OF_MASKS)
_PAINTED = 128  # of 255: as diffusers, which takes half or more for white


@dataclass(frozen=True)
class Pictures:
    """What a caller gives, as it was read."""

    image: ReadPicture
    mask: ReadPicture | None = None


@dataclass(frozen=True)
class Paste:
    """Where and how what was drawn goes into the picture that was given.

    Attributes:
        original: uint8 ``[h, w, 3]``.
        mask: uint8 ``[h, w]``: where it is 0, the original stays bit for bit.
        region: What was drawn of it; ``None`` is all.
    """

    original: NDArray[np.uint8] = field(repr=False)
    mask: NDArray[np.uint8] = field(repr=False)
    region: Region | None = None

    def onto(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Pictures ``[k, height, width, 3]``, each put into the original: ``[k, h, w, 3]``."""
        original, mask = Image.fromarray(self.original), Image.fromarray(self.mask)
        pasted = []
        for drawn in map(Image.fromarray, images):
            if self.region is not None:
                left, top, right, bottom = self.region
                whole = original.copy()
                whole.paste(drawn.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
                drawn = whole
            pasted.append(np.asarray(Image.composite(drawn, original, mask)))
        return np.stack(pasted) if pasted else images


@dataclass(frozen=True)
class Given:
    """The pictures of a request at the size that is drawn.

    Attributes:
        image: uint8 ``[height, width, 3]``.
        mask: bool ``[height, width]``, where it is painted; ``None`` is everywhere.
        paste: What happens to pictures in the end.
    """

    image: NDArray[np.uint8] = field(repr=False)
    mask: NDArray[np.bool_] | None = field(default=None, repr=False)
    paste: Paste | None = None


@dataclass(frozen=True)
class Kept:
    """What a run leaves as it was.

    Attributes:
        sample: Latents of the picture, float32 ``[1, channels, h, w]``.
        noise: Unit noise of the run, float32 ``[images, channels, h, w]``.
        mask: float32 ``[1, 1, h, w]``: 1 where the picture is painted, 0 where it is kept.
    """

    sample: Floats = field(repr=False)
    noise: Floats = field(repr=False)
    mask: Floats = field(repr=False)

    def restore(self, run: Run) -> None:
        """Bring what is kept back into a run's latents, with the noise of its next row; they come to the host."""
        registers = np.array(to_numpy(run.registers), np.float32)
        outside = run.plan.noised(run.index, self.sample, self.noise)
        registers[:, 0] = (1 - self.mask) * outside + self.mask * registers[:, 0]
        run.registers = registers


@dataclass(frozen=True)
class Begun:
    """What a run begins with.

    Attributes:
        latents: Its first register, float32 ``[images, channels, h, w]``.
        kept: What it brings back after every step.
        paste: What happens to its pictures in the end.
        conditioning: Inputs of a denoiser that was made for inpainting, one row each.
    """

    latents: Floats = field(repr=False)
    kept: Kept | None = None
    paste: Paste | None = None
    conditioning: Mapping[str, Floats] = field(default_factory=dict, repr=False)


def tasks_of(family: Family) -> list[str]:
    """What a bundle's models can be asked to do."""
    encoder = VAE_ENCODER in family.manifest.components
    if family.inpaints:
        return [INPAINTING] if encoder else []
    return [*family.tasks, *((IMAGE_TO_IMAGE, INPAINTING) if encoder else ())]


def take_pictures(options: Mapping[str, Any], manifest: Manifest) -> tuple[dict[str, Any], Pictures | None]:
    """Read the pictures among a request's options; the size of what is drawn follows that of the picture.

    Args:
        options: With or without ``image`` and ``mask``, see :func:`~latentrt.runtime.pictures.read_picture`.
        manifest: The bundle's.

    Returns:
        The other options, with a record of each picture, ``width`` and ``height``, and the pictures.

    Raises:
        InvalidRequestError: if one cannot be read, they differ in size, or the bundle cannot encode them.
    """
    rest, family = dict(options), family_of(manifest)
    if family.inpaints and any(options.get(name) is None for name in ("image", "mask")):
        raise InvalidRequestError("this model was made for inpainting: give image and mask")
    if options.get("image") is None:
        if options.get("mask") is not None:
            raise InvalidRequestError("mask is given without image, the picture that it belongs to")
        return rest, None
    for name in ("latents", "denoising_start", "denoising_end"):
        if options.get(name) is not None:
            raise InvalidRequestError(f"{name} is given together with image; give one of the two")
    if VAE_ENCODER not in manifest.components:
        raise InvalidRequestError(
            f"image is given, but the bundle has no {VAE_ENCODER}; build it again from a source with a whole VAE"
        )
    image = read_picture(options["image"], "image")
    mask = None if options.get("mask") is None else read_picture(options["mask"], "mask", "L")
    if mask is not None and (mask.width, mask.height) != (image.width, image.height):
        raise InvalidRequestError(
            f"mask is {mask.width}x{mask.height}, and image {image.width}x{image.height}; give a mask of that size"
        )
    rest |= {"image": image.record, "mask": None if mask is None else mask.record}
    if options.get("mask_padding") is None:  # with it, a part of the picture is drawn at the model's own size
        rest |= _size(image, options.get("width"), options.get("height"), family.unit)
    return rest, Pictures(image, mask)


def _size(image: ReadPicture, width: Any, height: Any, unit: int) -> dict[str, Any]:
    """Width and height: the picture's own; or, where one is given, so that it keeps its shape."""
    if type(width) is int and height is None:
        height = _nearest(image.height * width, image.width * unit) * unit
    elif type(height) is int and width is None:
        width = _nearest(image.width * height, image.height * unit) * unit
    return {
        "width": max(image.width // unit, 1) * unit if width is None else width,
        "height": max(image.height // unit, 1) * unit if height is None else height,
    }


def _nearest(dividend: int, divisor: int) -> int:
    """A quotient rounded, and 1 at least."""
    return max((2 * dividend + divisor) // (2 * divisor), 1)


def task_values(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """A request's values for these tasks, with defaults filled in.

    Args:
        values: By option, each checked on its own; ``None`` where it is not given.
        family: The bundle's.

    Raises:
        InvalidRequestError: naming the first that does not go with the others.
    """
    found = dict(values)
    if found["image"] is None:
        if given := [name for name in _OF_PICTURES if found[name] is not None]:
            raise InvalidRequestError(f"{given[0]} is given without image, the picture to begin with")
    else:
        if found["mask"] is None and (given := [name for name in _OF_MASKS if found[name] is not None]):
            raise InvalidRequestError(f"{given[0]} is given without mask, which says what is painted")
        found["resize"] = found["resize"] or RESIZES[0]
        if found["strength"] is None:
            found["strength"] = family.strength if found["mask"] is None else 1.0
        if found["mask"] is not None:
            found["mask_blur"] = found["mask_blur"] or 0.0
            found["keep_outside"] = bool(found["keep_outside"]) or found["mask_padding"] is not None
    if found["variation_strength"] is None and found["variation_seed"] is not None:
        raise InvalidRequestError("variation_seed is given without variation_strength, 0 to 1")
    if found["variation_strength"] and found["variation_seed"] is None:
        found["variation_seed"] = secrets.randbits(32)
    return found


def prepare(request: Request, pictures: Pictures) -> Given:
    """Pictures at the size of a request: blurred, cut out and resized as it says.

    Raises:
        InvalidRequestError: if a mask has nothing to paint.
    """
    image = Image.fromarray(pictures.image.pixels)
    if pictures.mask is None:
        return Given(_resized(image, request))
    mask = Image.fromarray(pictures.mask.pixels)
    if request.mask_blur:
        mask = mask.filter(ImageFilter.GaussianBlur(request.mask_blur))
    region, whole = None, (image, mask)
    if request.mask_padding is not None:
        region = region_of(np.asarray(mask), request.width, request.height, request.mask_padding)
        image, mask = image.crop(region), mask.crop(region)
    small, painted = _resized(image, request), _resized(mask, request)
    if not (painted >= _PAINTED).any():
        raise InvalidRequestError("mask has no white in it, and white is what is painted; give another mask")
    paste = None
    if region is not None:
        paste = Paste(np.asarray(whole[0]), np.asarray(whole[1]), region)
    elif request.keep_outside:
        paste = Paste(small, painted)
    return Given(small, painted >= _PAINTED, paste)


def _resized(image: Image.Image, request: Request) -> NDArray[np.uint8]:
    size = request.width, request.height
    if image.size != size:
        # What was cut out around a mask has the right shape already, as far as whole pixels allow.
        if request.resize == "crop" and request.mask_padding is None:
            image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        else:
            image = image.resize(size, Image.Resampling.LANCZOS)
    return np.array(image)


def region_of(mask: NDArray[np.uint8], width: int, height: int, padding: int) -> Region:
    """The part of a picture to draw where only what is around the mask is wanted.

    Args:
        mask: uint8 ``[h, w]``.
        width: Of what is drawn, whose shape the region gets, as far as the picture reaches.
        height: Likewise.
        padding: Pixels around what is painted, at least.

    Returns:
        What the mask covers with the padding, made wider or higher on both sides alike, and moved inwards at an edge.

    Raises:
        InvalidRequestError: if the mask is black.
    """
    if not mask.any():
        raise InvalidRequestError("mask has no white in it, and white is what is painted; give another mask")
    spans = []
    for axis, length in ((0, mask.shape[1]), (1, mask.shape[0])):
        covered = np.flatnonzero(mask.any(axis=axis))
        spans.append([max(int(covered[0]) - padding, 0), min(int(covered[-1]) + 1 + padding, length)])
    (left, right), (top, bottom) = spans
    wide = (right - left) * height > (bottom - top) * width
    if wide:
        top, bottom = _widened(top, bottom, int((right - left) * height / width), mask.shape[0])
    else:
        left, right = _widened(left, right, int((bottom - top) * width / height), mask.shape[1])
    return left, top, right, bottom


def _widened(first: int, last: int, length: int, most: int) -> tuple[int, int]:
    """A span made as long as asked for, or as ``most`` allows."""
    if length >= most:
        return 0, most
    first -= max(length - (last - first), 0) // 2
    first = min(max(first, 0), most - length)
    return first, first + length


def begin_from(
    request: Request,
    plan: Plan,
    given: Given,
    latent: Latent,
    stream: Noise,
    encode: Callable[[Floats], Floats],
    *,
    inpaints: bool = False,
) -> Begun:
    """The latents that a run begins with, with noise drawn in the order of diffusers' pipelines.

    Args:
        request: The request.
        plan: Its sampler's plan, without the steps that the strength leaves out.
        given: Its pictures.
        latent: The model's latent space.
        stream: Source of all the run's noise.
        encode: The VAE's encoder: pixels ``[1, 3, height, width]`` from -1 to 1 to mean and log variance.
        inpaints: Whether the denoiser takes the mask and what is outside of it as inputs.
    """
    pixels = given.image.astype(np.float32).transpose(2, 0, 1)[None] / np.float32(255) * 2 - 1
    pure = given.mask is not None and request.strength == 1
    sample = None if pure and inpaints else _encoded(encode(pixels), latent, stream)
    shape = (request.images, latent.channels, request.height // latent.factor, request.width // latent.factor)
    noise = varied_noise(stream, shape, request.variation_seed, request.variation_strength)
    latents = noise * np.float32(plan.init_scale) if pure or sample is None else plan.noised(0, sample, noise)
    if given.mask is None:
        return Begun(latents, paste=given.paste)
    mask = given.mask[:: latent.factor, :: latent.factor].astype(np.float32)[None, None]
    if not inpaints:
        # diffusers encodes what is outside of the mask for these models too, and has no use for it.
        stream.randn((1, *shape[1:]))
        assert sample is not None
        return Begun(latents, Kept(sample, noise, mask), given.paste)
    outside = _encoded(encode(pixels * ~given.mask), latent, stream)
    return Begun(latents, paste=given.paste, conditioning={"inpaint": np.concatenate([mask, outside], axis=1)})


def _encoded(parameters: Floats, latent: Latent, stream: Noise) -> Floats:
    """A sample of the encoder's Gaussian, scaled as the denoiser knows it."""
    mean, log_variance = np.split(parameters, 2, axis=1)
    deviation = np.exp(np.float32(0.5) * np.clip(log_variance, -30, 20))
    sample: Floats = mean + deviation * stream.randn(mean.shape)
    return (sample - np.float32(latent.shift)) * np.float32(latent.scaling)
