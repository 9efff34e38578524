"""Kinds of output: images in all that a request may ask of them, and a kind that has nothing but its payload."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime import Bundle
from latentrt.runtime.bundle.manifest import TINY_DECODER, Manifest
from latentrt.runtime.engine_calls import Floats
from latentrt.runtime.families import Family
from latentrt.runtime.output.kinds import OUTPUT_KINDS, Decoding, OutputKind, output_kind
from latentrt.runtime.request.request import Request

ANY_FAMILY = cast(Family, None)


class Sound(OutputKind):
    """Samples of sound, which have no previews."""

    name, dtype = "sound", "float32"

    def shape(self, family: Family, request: Request) -> tuple[int, ...]:
        """Sounds and samples."""
        return request.images, 100

    def decode(self, decoding: Decoding, latents: Floats) -> NDArray[Any]:
        """The latents themselves."""
        return latents

    def write(
        self, path: str | os.PathLike[str], payload: NDArray[Any], parameters: str, texts: Mapping[str, str]
    ) -> None:
        """The bytes alone."""
        Path(path).write_bytes(payload.tobytes())


def request(**options: Any) -> Request:
    return Request("p", "", 4, 1.0, 7, "euler", 48, 32, 2, 0, **options)


def test_kinds_are_found_by_name() -> None:
    """An unknown name is answered with the known ones."""
    assert output_kind("image") is OUTPUT_KINDS["image"]
    with pytest.raises(InvalidRequestError, match="unknown output kind 'sound'; known kinds: image"):
        output_kind("sound")


def test_a_kind_that_is_no_image_refuses_what_only_images_have() -> None:
    """Safety checkers, pasting and previews are for images; an image takes all of them."""
    sound = Sound()
    sound.check(request())
    for options, message in (
        ({"safety": "mark"}, "safety is 'mark', but the output is sound"),
        ({"keep_outside": True}, "keep_outside is asked for, but the output is sound"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            sound.check(request(**options))
        OUTPUT_KINDS["image"].check(request(**options))
    with pytest.raises(InvalidRequestError, match="there are no previews of sound"):
        sound.preview(cast(Decoding, None), np.zeros(1, np.float32))
    assert (sound.previews, OUTPUT_KINDS["image"].previews) == (False, True)


@pytest.mark.parametrize(
    ("kind", "shape", "dtype"), [(OUTPUT_KINDS["image"], (0, 32, 48, 3), "uint8"), (Sound(), (0, 100), "float32")]
)
def test_a_request_that_ends_in_latents_has_no_entry(kind: OutputKind, shape: tuple[int, ...], dtype: str) -> None:
    """The payload's shape is known all the same."""
    found = kind.empty(ANY_FAMILY, request())
    assert (found.shape, str(found.dtype)) == (shape, dtype)


@pytest.mark.parametrize(("count", "size"), [(1, (24, 16)), (3, None)])
def test_images_are_written_as_a_png_or_a_sheet(tmp_path: Path, count: int, size: tuple[int, int] | None) -> None:
    """One image has its own size, several stand side by side; the text goes with them."""
    payload = np.random.default_rng(0).integers(0, 256, (count, 16, 24, 3), dtype=np.uint8)
    OUTPUT_KINDS["image"].write(tmp_path / "o.png", payload, "Steps: 3", {"other": "text"})
    with Image.open(tmp_path / "o.png") as image:
        assert image.info["parameters"] == "Steps: 3"
        assert image.info["other"] == "text"
        pixels = np.asarray(image)
    if size:
        np.testing.assert_array_equal(pixels, payload[0])
    else:
        assert pixels.shape[0] >= 16
        assert pixels.shape[1] >= 3 * 24


def test_previews_take_the_tiny_decoder_where_there_is_one(plain_model: Any, bundle: Bundle) -> None:
    """A preview shows what that decoder makes of the latents; without it the full one serves."""
    latents = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
    engines = {**plain_model.fakes(), TINY_DECODER: plain_model.fakes()["vae_decoder"]}
    components = {**bundle.manifest.components, TINY_DECODER: bundle.manifest.components["vae_decoder"]}
    tiny = cast(Manifest, SimpleNamespace(latent=bundle.manifest.latent, components=components))
    image = OUTPUT_KINDS["image"]
    for manifest, used in ((bundle.manifest, "vae_decoder"), (tiny, TINY_DECODER)):
        found = image.preview(Decoding(engines.__getitem__, manifest), latents)
        assert (found.shape, str(found.dtype)) == ((1, 8, 8, 3), "uint8")
        assert len(engines[used].calls) == 1
