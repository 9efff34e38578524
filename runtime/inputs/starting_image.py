"""Image to image and inpainting: the image that a request begins with, and the part of it that stays.

The image is encoded, and gets as much noise as the sampler's plan has at the row where the strength lets the run begin.
Models that were made for text to image inpaint as in RePaint (Lugmayr et al. 2022, arXiv 2201.09865, equation 8): after
every step the part outside of the mask is put back. diffusers' pipelines of both tasks do the same.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from latentrt.engines.checks import is_integer
from latentrt.engines.errors import InvalidRequestError

from ..bundle.manifest import VAE_ENCODER, Manifest
from ..families import Family, family_of
from ..images.masks import InputImages, Paste, Pictures, region_of
from ..images.reading import ReadPicture, read_picture
from ..request.options import RESIZES, require_needed
from ..request.request import Request

IMAGE_TO_IMAGE, INPAINTING = "image-to-image", "inpainting"
"""Tasks of a bundle with a VAE's encoder, besides those of its family."""


_PAINTED = 128  # of 255: diffusers takes half or more for white


def tasks_of(family: Family) -> list[str]:
    """Tasks that a bundle's models can do."""
    encoder = VAE_ENCODER in family.manifest.components
    if family.inpaints:
        return [INPAINTING] if encoder else []
    return [*family.tasks, *((IMAGE_TO_IMAGE, INPAINTING) if encoder else ())]


def take_pictures(options: Mapping[str, Any], manifest: Manifest) -> tuple[dict[str, Any], Pictures | None]:
    """Read the starting image and the mask among a request's options; the image decides the size that is drawn.

    Args:
        options: With or without ``image`` and ``mask``, see :func:`~latentrt.runtime.images.reading.read_picture`.
        manifest: The bundle's.

    Returns:
        The options with records in the place of both, ``width`` and ``height``, and the images; ``None`` without any.

    Raises:
        InvalidRequestError: if an image cannot be read, the two differ in size, or the bundle cannot encode them.
    """
    rest, family = dict(options), family_of(manifest)
    if family.inpaints and any(options.get(name) is None for name in ("image", "mask")):
        raise InvalidRequestError("this model was made for inpainting: give image and mask")
    if options.get("image") is None:
        require_needed({"mask": options.get("mask") is not None or None})
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
    if options.get("mask_padding") is None:  # with it, a part of the image is drawn at the model's own size
        rest |= _size(image, options.get("width"), options.get("height"), family.size_multiple)
    return rest, Pictures(image, mask)


def _size(image: ReadPicture, width: Any, height: Any, unit: int) -> dict[str, Any]:
    """Width and height: the image's own; where one is given, the other follows, so that the shape stays."""
    if is_integer(width) and height is None:
        height = _nearest(image.height * int(width), image.width * unit) * unit
    elif is_integer(height) and width is None:
        width = _nearest(image.width * int(height), image.height * unit) * unit
    return {
        "width": max(image.width // unit, 1) * unit if width is None else width,
        "height": max(image.height // unit, 1) * unit if height is None else height,
    }


def _nearest(dividend: int, divisor: int) -> int:
    """A quotient rounded, and 1 at least."""
    return max((2 * dividend + divisor) // (2 * divisor), 1)


def fill_in_image_options(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Checked values of a request's options, with the defaults of those that concern its starting image and its noise.

    Args:
        values: By option; ``None`` where it is not given.
        family: The bundle's.
    """
    found = dict(values)
    if found["image"] is not None:
        found["resize"] = found["resize"] or RESIZES[0]
        if found["strength"] is None:
            found["strength"] = family.strength if found["mask"] is None else 1.0
        if found["mask"] is not None:
            found["mask_blur"] = found["mask_blur"] or 0.0
            found["keep_outside"] = bool(found["keep_outside"]) or found["mask_padding"] is not None
    if found["variation_strength"] and found["variation_seed"] is None:
        found["variation_seed"] = secrets.randbits(32)
    return found


def prepare(request: Request, pictures: Pictures) -> InputImages:
    """Bring the starting image and the mask to the size of a request: blurred, cut out and resized as it says.

    Args:
        request: The request.
        pictures: The image and the mask at their own size.

    Raises:
        InvalidRequestError: if the mask has nothing to paint.
    """
    image = Image.fromarray(pictures.image.pixels)
    if pictures.mask is None:
        return InputImages(_resized(image, request))
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
    return InputImages(small, painted >= _PAINTED, paste)


def _resized(image: Image.Image, request: Request) -> NDArray[np.uint8]:
    size = request.width, request.height
    if image.size != size:
        # A region around a mask has the right shape already, as far as whole pixels allow.
        if request.resize == "crop" and request.mask_padding is None:
            image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        else:
            image = image.resize(size, Image.Resampling.LANCZOS)
    return np.array(image)
