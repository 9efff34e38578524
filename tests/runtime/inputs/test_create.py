"""Requests: defaults filled in, every wrong value refused in one sentence before anything is computed."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime.bundle.manifest import Defaults, Latent, Manifest
from latentrt.runtime.images.reading import PictureRecord
from latentrt.runtime.inputs.create import create_request
from latentrt.runtime.request.control import Control
from latentrt.runtime.request.options import MAX_PIXELS, MAX_SIDE
from latentrt.runtime.request.request import Request
from latentrt.runtime.samplers import SAMPLERS
from latentrt.runtime.vae.tiling import Tiling

# Only the parts that a request looks at; test_pipeline.py goes through whole manifests.
MANIFEST = cast(
    Manifest,
    SimpleNamespace(
        latent=Latent(4, 8, 0.18215, 0.0),
        defaults=Defaults("dpmpp-2m", steps=20, guidance=7.5, width=512, height=768, clip_skip=0),
        family="stable-diffusion",
        components={"safety_checker": None},
        settings={"guidance": "classifier-free"},
    ),
)


def create(prompt: Any = "a red apple", **options: Any) -> Request:
    return create_request(MANIFEST, prompt, **options)


def test_what_is_left_out_is_the_bundles_default() -> None:
    """Sampler, steps, guidance, size and clip skip come from the manifest; one picture, no negative prompt."""
    request = create(seed=7)
    assert request == Request("a red apple", "", 20, 7.5, 7, "dpmpp-2m", 512, 768, 1, 0)
    nothing = dict.fromkeys(("steps", "guidance", "sampler", "width", "height", "clip_skip"))
    assert create(seed=7, **nothing) == request


def test_what_is_given_is_kept() -> None:
    """No default replaces a value, zero included."""
    options = {
        "negative_prompt": "blurry",
        "steps": 1,
        "guidance": 0.0,
        "seed": 0,
        "sampler": "euler",
        "width": 8,
        "height": 16,
        "images": 3,
        "clip_skip": 1,
        "guidance_start": 0.25,
        "guidance_end": 0.5,
        "guidance_rescale": 0.0,
        "eta": 0.0,
        "timesteps": (500.0,),
        "sigmas": None,
        "vae_tiling": Tiling(64, 16),
        "denoising_start": 0.25,
        "denoising_end": 0.75,
        "output": "image",
        "decoder": "full",
        "control": (Control(PictureRecord("0" * 64), "edges", 0.5),),
        "guess_mode": True,
        "ip_adapter_image": PictureRecord("1" * 64, "portrait.png"),
        "ip_adapter_scale": 0.6,
        "safety": "mark",
    }
    request = create(**options)
    assert {name: getattr(request, name) for name in options} == options


def test_without_a_seed_each_request_draws_one() -> None:
    """The seed is carried, in range, and another one each time."""
    seeds = {create().seed for _ in range(20)}
    assert len(seeds) > 15
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(("guidance", "guided"), [(0, False), (1, False), (1.0, False), (1.0001, True), (7.5, True)])
def test_guidance_at_one_or_below_is_none(guidance: float, guided: bool) -> None:
    """As in diffusers, the unconditional half is computed above 1 only."""
    assert create(guidance=guidance).guided is guided


@pytest.mark.parametrize("number", [np.int64(16), np.uint8(16), np.int32(16)])
def test_numpy_integers_are_integers(number: Any) -> None:
    """What comes out of numpy is taken, and kept as a plain int."""
    request = create(steps=number, seed=number, width=number, images=number)
    assert all(type(getattr(request, name)) is int for name in ("steps", "seed", "width", "images"))


@pytest.mark.parametrize("number", [np.float32(7.5), np.float64(7.5), Fraction(15, 2)])
def test_any_real_guidance_is_a_float(number: Any) -> None:
    """What comes out of numpy is taken, and kept as a plain float."""
    assert type(create(guidance=number).guidance) is float
    assert create(guidance=number).guidance == 7.5


@pytest.mark.parametrize("prompt", ["", " ", "a" * 100_000, "a\0b", "\N{RED APPLE}", "\n"])
def test_any_text_is_a_prompt(prompt: str) -> None:
    """Empty, long and odd prompts are kept as they are."""
    assert create(prompt).prompt == prompt
    assert create(negative_prompt=prompt).negative_prompt == prompt


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt is a NoneType, expected a string"),
    ({"prompt": b"a"}, "prompt is a bytes, expected a string"),
    ({"prompt": ["a"]}, "prompt is a list, expected a string"),
    ({"negative_prompt": 3}, "negative_prompt is a int, expected a string"),
    ({"negative_prompt": None}, "negative_prompt is a NoneType, expected a string"),
    ({"steps": 0}, "steps is 0, expected 1 to 10000"),
    ({"steps": -1}, "steps is -1, expected 1 to 10000"),
    ({"steps": 10**9}, "steps is 1000000000, expected 1 to 10000"),
    ({"steps": 1.5}, "steps is 1.5, expected a whole number"),
    ({"steps": 20.0}, "steps is 20.0, expected a whole number"),
    ({"steps": True}, "steps is True, expected a whole number"),
    ({"steps": "20"}, "steps is '20', expected a whole number"),
    ({"guidance": float("nan")}, "guidance is nan, expected 0 to 1000 (7.5 is usual, 1 is none)"),
    ({"guidance": float("inf")}, "guidance is inf, expected 0 to 1000 (7.5 is usual, 1 is none)"),
    ({"guidance": -1}, "guidance is -1, expected 0 to 1000 (7.5 is usual, 1 is none)"),
    ({"guidance": 10**400}, "guidance is an integer of 1329 bits, expected 0 to 1000 (7.5 is usual, 1 is none)"),
    ({"guidance": 1001}, "guidance is 1001, expected 0 to 1000 (7.5 is usual, 1 is none)"),
    ({"guidance_start": -0.1}, "guidance_start is -0.1, expected 0 to 1"),
    ({"guidance_end": float("nan")}, "guidance_end is nan, expected 0 to 1"),
    ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5, expected 0 to 1"),
    ({"eta": -1}, "eta is -1, expected 0 to 1"),
    ({"timesteps": []}, "timesteps has 0 entries, expected 1 to 10000"),
    ({"sigmas": range(10_001)}, "sigmas has 10001 entries, expected 1 to 10000"),
    ({"timesteps": "999"}, "timesteps is '999', expected a sequence of numbers"),
    ({"timesteps": 999}, "timesteps is 999, expected a sequence of numbers"),
    ({"sigmas": [3, "two"]}, "sigmas is [3, 'two'], expected a sequence of numbers"),
    ({"sigmas": [3, float("nan")]}, "sigmas is [3, nan], expected finite numbers"),
    ({"timesteps": [999, 1], "steps": 3}, "steps is 3, but 2 of one's own are given; leave steps out"),
    (
        {"guidance_start": 0.5, "guidance_end": 0.5},
        "guidance_start is 0.5, expected less than guidance_end, which is 0.5; "
        "for no guidance at all, set guidance to 1",
    ),
    ({"guidance": "7.5"}, "guidance is '7.5', expected a number"),
    ({"guidance": True}, "guidance is True, expected a number"),
    ({"guidance": 1j}, "guidance is 1j, expected a number"),
    ({"seed": -1}, "seed is -1, expected 0 to 18446744073709551615"),
    ({"seed": 2**64}, "seed is 18446744073709551616, expected 0 to 18446744073709551615"),
    ({"seed": 1.0}, "seed is 1.0, expected a whole number"),
    ({"images": 0}, "images is 0, expected 1 to 4096"),
    ({"images": 5000}, "images is 5000, expected 1 to 4096"),
    ({"images": None}, "images is None, expected a whole number"),
    ({"clip_skip": 2}, "clip_skip is 2, expected 0 to 1"),
    ({"clip_skip": -1}, "clip_skip is -1, expected 0 to 1"),
    ({"sampler": 3}, f"unknown sampler 3; known samplers: {', '.join(SAMPLERS)}"),
    ({"sampler": "DPM++ 2M"}, f"unknown sampler 'DPM++ 2M'; known samplers: {', '.join(SAMPLERS)}"),
    ({"sampler": []}, f"unknown sampler []; known samplers: {', '.join(SAMPLERS)}"),
    ({"width": 100}, "width is 100, expected a multiple of 8; the nearest are 96 and 104"),
    ({"height": 513}, "height is 513, expected a multiple of 8; the nearest are 512 and 520"),
    ({"width": 0}, f"width is 0, expected 8 to {MAX_SIDE}"),
    ({"width": 4}, f"width is 4, expected 8 to {MAX_SIDE}"),
    ({"height": -64}, f"height is -64, expected 8 to {MAX_SIDE}"),
    ({"height": 10**12}, f"height is 1000000000000, expected 8 to {MAX_SIDE}"),
    ({"width": 64.0}, "width is 64.0, expected a whole number"),
    ({"width": "64"}, "width is '64', expected a whole number"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options)[:40] for options, _ in BAD])
def test_a_wrong_value_is_named_with_its_range(options: dict[str, Any], message: str) -> None:
    """The sentence says what was received and what is expected."""
    with pytest.raises(InvalidRequestError) as caught:
        create(**options)
    assert str(caught.value) == message


def test_a_value_that_is_huge_is_shown_in_short() -> None:
    """A message stays one readable sentence whatever was received."""
    for options in ({"steps": 10**5000}, {"sampler": "x" * 10**6}, {"steps": "x" * 10**6}, {"guidance": "x" * 10**6}):
        with pytest.raises(InvalidRequestError) as caught:
            create(**cast(Any, options))
        assert len(str(caught.value)) < 500


def test_too_many_pixels_together() -> None:
    """Sides and number may each be in range and still be too much for one request."""
    most = create(width=MAX_SIDE, height=MAX_PIXELS // MAX_SIDE)
    assert most.width * most.height == MAX_PIXELS
    with pytest.raises(InvalidRequestError, match=r"2 images of 16384x16384 have 536,870,912 pixels, at most "):
        create(width=MAX_SIDE, height=MAX_SIDE, images=2)


def test_the_largest_seed() -> None:
    """All 64 bits are taken."""
    assert create(seed=2**64 - 1).seed == 2**64 - 1
