"""Image to image, inpainting and variations as a caller meets them. Oracles: Pillow, diffusers' regions, scipy.

Their pictures are compared with diffusers' in ``test_parity_tasks.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from scipy.spatial import geometric_slerp

from latentrt.engines.errors import BundleError, EngineClosedError, InvalidRequestError
from latentrt.runtime import Bundle, Pipeline
from latentrt.runtime.abilities import abilities
from latentrt.runtime.inputs.create import create_request
from latentrt.runtime.inputs.starting_image import prepare, take_pictures
from latentrt.runtime.samplers.noise import TorchGenerator, torch_randn, varied_noise

SIZE = (40, 24)
QUICK: dict[str, Any] = {"steps": 3, "seed": 7, "guidance": 3.0, "sampler": "euler"}


def picture(width: int = SIZE[0], height: int = SIZE[1]) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns * 6 % 256, rows * 9 % 256, (rows + columns) * 3 % 256], axis=2).astype(np.uint8)


def drawn_mask(width: int = SIZE[0], height: int = SIZE[1]) -> NDArray[np.uint8]:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 3 : height * 2 // 3, width // 4 : width * 3 // 4] = 255
    return mask


@pytest.fixture(scope="module")
def pipe(tiny_bundles: dict[str, Path]) -> Iterator[Pipeline]:
    """A random SD 1.x model, whose latents are two pixels wide."""
    with Pipeline.load(tiny_bundles["sd1"], "onnxruntime") as opened:
        yield opened


def draw(pipe: Pipeline, **options: Any) -> NDArray[np.uint8]:
    return pipe("a red apple", **{**QUICK, **options}).images


@pytest.mark.parametrize(
    ("size", "asked", "expected"),
    [
        ((40, 24), {}, (40, 24)),
        ((41, 25), {}, (40, 24)),
        ((1, 30), {}, (2, 30)),
        ((40, 24), {"width": 20}, (20, 12)),
        ((40, 24), {"height": 36}, (60, 36)),
        ((40, 1), {"width": 20}, (20, 2)),
        ((40, 24), {"width": 32, "height": 32}, (32, 32)),
    ],
)
def test_the_picture_decides_the_size(pipe: Pipeline, size: Any, asked: Any, expected: Any) -> None:
    """What is drawn has the picture's size, or its shape where one side is given, in whole latents."""
    result = pipe("", image=picture(*size), strength=0.4, **{**QUICK, **asked})
    assert (result.request.width, result.request.height) == expected
    assert result.images.shape == (1, expected[1], expected[0], 3)
    assert len(result.timings.step) == 1
    assert result.timings.vae_encoder > 0


def test_a_request_says_what_it_was_made_with(pipe: Pipeline, tmp_path: Path) -> None:
    """Of pictures their hashes and names are kept, of all else its value, defaults among them."""
    path = tmp_path / "picture.png"
    Image.fromarray(picture()).save(path)
    request = pipe("", image=path, mask=drawn_mask(), mask_blur=1, **QUICK).request
    assert request.image is not None
    assert (request.image.path, request.image.sha256) == (str(path), hashlib.sha256(path.read_bytes()).hexdigest())
    assert request.mask is not None
    assert request.mask.path is None
    assert (request.strength, request.resize, request.mask_blur) == (1.0, "stretch", 1.0)
    assert (request.mask_padding, request.keep_outside) == (None, False)
    assert pipe("", image=path, **QUICK).request.strength == 0.8
    assert pipe("", **QUICK).request.strength is None


PICTURE, MASK = picture(), drawn_mask()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": MASK}, "mask is given without image, the image to begin with"),
        ({"strength": 0.5}, "strength is given without image, the image to begin with"),
        ({"mask_blur": 2}, "mask_blur is given without image"),
        ({"image": PICTURE, "mask_blur": 2}, "mask_blur is given without mask"),
        ({"image": PICTURE, "keep_outside": True}, "keep_outside is given without mask"),
        ({"image": PICTURE, "mask": MASK[:-1]}, "mask is 40x23, and image 40x24; give a mask of that size"),
        ({"image": PICTURE, "mask": np.zeros_like(MASK)}, "mask has no white in it"),
        ({"image": PICTURE, "mask": np.zeros_like(MASK), "mask_padding": 2}, "mask has no white in it"),
        ({"image": PICTURE, "strength": 0}, "strength is 0, expected more than 0"),
        ({"image": PICTURE, "strength": float("nan")}, "strength is nan, expected 0 to 1"),
        ({"image": PICTURE, "strength": 1.01}, "strength is 1.01, expected 0 to 1"),
        ({"image": PICTURE, "strength": "a lot"}, "strength is 'a lot', expected a number"),
        ({"image": PICTURE, "strength": 0.3}, "none of the 3 steps of euler would be taken"),
        ({"image": PICTURE, "resize": "squeeze"}, "resize is 'squeeze', expected stretch or crop"),
        ({"image": PICTURE, "mask": MASK, "mask_padding": -1}, "mask_padding is -1"),
        ({"image": PICTURE, "mask": MASK, "mask_blur": 1e9}, "mask_blur is 1000000000.0, expected 0 to 1024"),
        ({"image": PICTURE, "mask": MASK, "keep_outside": 1}, "keep_outside is 1, expected true or false"),
        ({"image": PICTURE, "latents": np.zeros((1, 4, 12, 20))}, "latents is given together with image"),
        ({"image": PICTURE, "denoising_end": 0.5}, "denoising_end is given together with image"),
        ({"image": PICTURE, "width": 33}, "width is 33, expected a multiple of 2"),
        ({"image": PICTURE, "width": "40"}, "width is '40', expected a whole number"),
        ({"image": PICTURE, "width": 10**400}, "width is an integer of"),
        ({"image": PICTURE, "width": -4}, "width is -4"),
        ({"image": np.full((8, 8, 3), np.nan)}, "image has floats from nan"),
        ({"image": b"GIF89a"}, "cannot read image"),
        ({"image": "missing.png"}, "cannot read image from 'missing.png': No such file"),
        ({"variation_seed": 3}, "variation_seed is given without variation_strength"),
        ({"variation_strength": 2}, "variation_strength is 2, expected 0 to 1"),
        ({"variation_strength": 0.5, "latents": np.zeros((1, 4, 12, 20))}, "latents are given, and variation_strength"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_computed(
    pipe: Pipeline, options: dict[str, Any], message: str
) -> None:
    """The sentence names the option and the way out."""
    with pytest.raises(InvalidRequestError, match=message):
        pipe.stream("", **{**QUICK, **options})


def test_several_prompts_have_no_picture(pipe: Pipeline) -> None:
    """A batch with a picture is refused by name."""
    with pytest.raises(InvalidRequestError, match="image is for one prompt at a time; leave it out"):
        pipe.batch(["a", "b"], image=picture(), **QUICK)


def test_what_is_outside_of_the_mask_stays(pipe: Pipeline) -> None:
    """With keep_outside it is the picture's bit for bit, in every picture; without it nearly so; inside it is new."""
    image, mask = picture(), drawn_mask()
    kept = draw(pipe, image=image, mask=mask, keep_outside=True, images=2)
    for each in kept:
        np.testing.assert_array_equal(each[mask == 0], image[mask == 0])
        assert np.abs(each[mask > 0].astype(int) - image[mask > 0]).mean() > 5
    loose = draw(pipe, image=image, mask=mask, images=2)
    np.testing.assert_array_equal(loose[:, mask > 0], kept[:, mask > 0])
    assert (loose[:, mask == 0] != kept[:, mask == 0]).any()


def test_a_blurred_mask_fades(pipe: Pipeline) -> None:
    """Pixels that the blurred mask does not reach are the picture's, those between lie between both."""
    image, mask = picture(), drawn_mask()
    blurred = np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(2)))
    result = draw(pipe, image=image, mask=mask, mask_blur=2, keep_outside=True)[0]
    np.testing.assert_array_equal(result[blurred == 0], image[blurred == 0])
    between = (blurred > 0) & (blurred < 255)
    assert between.any()
    bare = draw(pipe, image=image, mask=blurred)[0]
    low, high = np.minimum(image, bare)[between], np.maximum(image, bare)[between]
    assert ((result[between] >= low - 1.0) & (result[between] <= high + 1.0)).all()


def test_the_region_around_a_mask_goes_back_into_its_place(pipe: Pipeline) -> None:
    """The result has the size of the picture, and everything outside of the mask is as it was."""
    image, mask = picture(100, 70), np.zeros((70, 100), np.uint8)
    mask[20:30, 60:90] = 255
    result = pipe("", image=image, mask=mask, mask_padding=4, **QUICK)
    default = pipe.manifest.defaults
    assert (result.request.width, result.request.height) == (default.width, default.height)
    assert result.images.shape == (1, 70, 100, 3)
    np.testing.assert_array_equal(result.images[0][mask == 0], image[mask == 0])
    assert (result.images[0][mask > 0] != image[mask > 0]).any()


@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_pictures_of_another_shape_are_resized_as_asked(pipe: Pipeline, resize: str) -> None:
    """They are stretched, or their middle is cut out, as Pillow does both."""
    options = {"image": picture(80, 30), "width": 32, "height": 32, "resize": resize, "steps": 2, "sampler": "euler"}
    rest, pictures = take_pictures(options, pipe.manifest)
    assert pictures is not None
    given = prepare(create_request(pipe.manifest, "", **rest), pictures)
    whole, way = Image.fromarray(picture(80, 30)), Image.Resampling.LANCZOS
    expected = whole.resize((32, 32), way) if resize == "stretch" else ImageOps.fit(whole, (32, 32), way)
    np.testing.assert_array_equal(given.image, np.asarray(expected))


def test_runs_that_are_advanced_get_the_same_pictures(pipe: Pipeline) -> None:
    """Beside a run from text alone, a run with a mask gets the picture that it gets alone, pasted likewise."""
    options: dict[str, Any] = {"image": picture(), "mask": drawn_mask(), "keep_outside": True, **QUICK}
    runs = [
        pipe.start("a red apple", **options),
        pipe.start("a rocket", width=SIZE[0], height=SIZE[1], sampler="dpmpp-2m", steps=4),
    ]
    while running := [run for run in runs if not run.done]:
        pipe.advance(running)
    difference = np.abs(pipe.finish(runs[0]).astype(int) - draw(pipe, **options))
    assert difference.max() <= 1
    assert not difference[0][drawn_mask() == 0].any()


def test_the_encoder_is_opened_when_it_is_needed(tiny_bundles: dict[str, Path]) -> None:
    """A request from text alone opens no encoder; the first with a picture does, and it is closed with the rest."""
    with Pipeline.load(tiny_bundles["sd1"], "onnxruntime") as pipe:
        draw(pipe)
        assert "vae_encoder" not in pipe.engines
        draw(pipe, image=picture())
        encoder = pipe.opened("vae_encoder")
        with pytest.raises(BundleError, match="nonsense is needed, and the pipeline has no engine"):
            pipe.opened("nonsense")
    with pytest.raises(EngineClosedError):
        encoder.run({"sample": np.zeros((1, 3, 8, 8), np.float32)})


def test_components_in_turns_and_tiles_draw_the_same(pipe: Pipeline, tiny_bundles: dict[str, Path]) -> None:
    """With little memory the pictures are the same bit for bit; in tiles they are nearly the same."""
    options: dict[str, Any] = {"image": picture(), "mask": drawn_mask(), "strength": 0.7}
    expected = draw(pipe, **options)
    with Pipeline.load(tiny_bundles["sd1"], "onnxruntime", low_memory=True) as frugal:
        np.testing.assert_array_equal(draw(frugal, **options), expected)
    tiled = draw(pipe, vae_tiling=24, **options)
    assert np.abs(tiled.astype(int) - expected).mean() < 20


def test_a_model_made_for_inpainting_needs_a_mask(tiny: Any) -> None:
    """It says so where there is none, and inspect lists nothing else that it can do."""
    path = tiny.bundle("sd1-inpaint")
    assert abilities(Bundle.open(path))["tasks"] == ["inpainting"]
    with Pipeline.load(path, "onnxruntime") as pipe:
        for options in ({}, {"image": picture()}):
            with pytest.raises(InvalidRequestError, match="made for inpainting: give image and mask"):
                draw(pipe, **options)
        with pytest.raises(InvalidRequestError, match="made for inpainting: give image and mask"):
            pipe.batch(["a"], **QUICK)
        masked = {"image": picture(), "mask": drawn_mask()}
        first, second = draw(pipe, **masked), draw(pipe, **masked, guidance=1.0)
        assert (first != second).any()
        other = {"image": 255 - picture(), "mask": drawn_mask()}
        assert (draw(pipe, **other) != first).any()
        np.testing.assert_array_equal(draw(pipe, **masked), first)


def test_noise_turns_on_a_great_circle() -> None:
    """Every picture's noise lies between both seeds' as scipy's spherical interpolation has it."""
    shape = (2, 4, 6, 6)
    first, second = (torch_randn(seed, shape).reshape(2, -1).astype(np.float64) for seed in (7, 8))
    for strength in (0.25, 0.6):
        found = varied_noise(TorchGenerator(7), shape, 8, strength).reshape(2, -1)
        for each, a, b in zip(found, first, second, strict=True):
            # scipy's are unit vectors; the lengths of both draws take part with the same weights.
            axes = [vector / np.linalg.norm(vector) for vector in (a, b)]
            angle = np.arccos(axes[0] @ axes[1])
            weights = np.sin((1 - strength) * angle) / np.sin(angle), np.sin(strength * angle) / np.sin(angle)
            np.testing.assert_allclose(geometric_slerp(*axes, strength), weights[0] * axes[0] + weights[1] * axes[1])
            np.testing.assert_allclose(each, weights[0] * a + weights[1] * b, atol=1e-6)


def test_the_ends_of_a_variation_are_both_seeds(pipe: Pipeline) -> None:
    """At 0 it is the seed's picture, at 1 the other seed's, between the two another one; a seed is drawn if need be."""
    base, other = draw(pipe), draw(pipe, seed=8)
    np.testing.assert_array_equal(draw(pipe, variation_seed=8, variation_strength=0.0), base)
    np.testing.assert_array_equal(draw(pipe, variation_seed=8, variation_strength=1.0), other)
    between = draw(pipe, variation_seed=8, variation_strength=0.4)
    assert (between != base).any()
    assert (between != other).any()
    np.testing.assert_array_equal(draw(pipe, variation_seed=7, variation_strength=0.4), base)
    result = pipe("", **QUICK, variation_strength=0.4)
    assert result.request.variation_seed is not None


def test_pictures_vary_too(pipe: Pipeline) -> None:
    """The noise that a picture is given turns as any other does."""
    given = {"image": picture(), "strength": 0.7}
    base = draw(pipe, **given)
    assert (draw(pipe, **given, variation_seed=8, variation_strength=0.3) != base).any()
    np.testing.assert_array_equal(draw(pipe, **given, variation_seed=8, variation_strength=0), base)
