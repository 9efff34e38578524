"""Families (``base``, ``stable_diffusion``, ``sdxl_refiner``): what manifests must say, and what requests may ask."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from latentrt.engines import TensorSpec
from latentrt.engines.errors import BundleError, InvalidRequestError
from latentrt.runtime.bundle.manifest import Component, Defaults, Graph, Latent, Manifest
from latentrt.runtime.families import FAMILIES, family_of
from latentrt.runtime.inputs.create import create_request
from latentrt.runtime.request.options import FAMILY_OPTIONS
from latentrt.runtime.request.request import Request

SETTINGS: dict[str, dict[str, Any]] = {
    "stable-diffusion": {"guidance": "classifier-free"},
    "stable-diffusion-xl": {"guidance": "classifier-free", "force_zeros_for_empty_prompt": True},
    "stable-diffusion-xl-refiner": {"guidance": "classifier-free", "force_zeros_for_empty_prompt": False},
    "stable-diffusion-3": {"guidance": "classifier-free", "t5": True, "patch": 2, "largest_side": 1536},
    "flux": {"guidance": "embedded", "patch": 2},
}
INPUTS = (
    TensorSpec("encoder_hidden_states", "float16", ("batch", 77, 80)),
    TensorSpec("text_embeds", "float16", ("batch", 24)),
)


def manifest(family: str, **settings: Any) -> Manifest:
    """The parts of a manifest that families and requests look at."""
    graph = Graph("unet/model.onnx", "fp16", 20, INPUTS, ())
    return cast(
        Manifest,
        SimpleNamespace(
            family=family,
            settings={**SETTINGS.get(family, {}), **settings},
            latent=Latent(4, 8, 0.18215, 0.0),
            defaults=Defaults("euler", steps=20, guidance=5.0, width=512, height=768, clip_skip=0),
            components={"unet": Component("unet", {"opset20-fp16": graph})},
        ),
    )


class Letters:
    """A tokenizer: a number for each letter."""

    max_length = 6

    def encode(self, text: str, max_length: int | None = None) -> Any:
        return np.array([ord(letter) for letter in text.ljust(6)[:6]], np.int64)

    def count(self, text: str) -> int:
        return len(text)


TOKENIZERS = {"tokenizer": Letters(), "tokenizer_2": Letters()}


def request(family: str = "stable-diffusion-xl", **options: Any) -> Request:
    return create_request(manifest(family), "apple", **{"seed": 0, **options})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_told_by_its_manifest(name: str) -> None:
    """The name leads to the family, whose abilities are its settings and its options, all of which requests know."""
    family = family_of(manifest(name))
    assert family.name == name
    assert family.abilities() == {**SETTINGS[name], "options": sorted(family.options)}
    assert family.options <= set(FAMILY_OPTIONS)
    assert family.stages() == (f"{family.denoiser}_prompt", f"{family.denoiser}_schedule", f"{family.denoiser}_step")


def test_an_unknown_family() -> None:
    """A family of a later version is named, with the way out."""
    with pytest.raises(BundleError, match=r"of the family 'sd9', and this version of latentrt runs stable-.*upgrade"):
        family_of(manifest("sd9"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"surprise": 1}, "settings are force_zeros_for_empty_prompt, guidance, surprise, expected"),
        ({"force_zeros_for_empty_prompt": 1}, "settings.force_zeros_for_empty_prompt is 1, expected true or false"),
        ({"guidance": True}, "settings.guidance is True, expected a text"),
        ({"guidance": "strong"}, "settings.guidance is 'strong', expected one of classifier-free, embedded, none"),
    ],
)
def test_settings_of_another_family(settings: dict[str, Any], message: str) -> None:
    """What a family does not know, or has another type, is refused."""
    with pytest.raises(BundleError, match=message):
        family_of(manifest("stable-diffusion-xl", **settings))


@pytest.mark.parametrize(
    ("option", "value", "owners"),
    [
        ("prompt_2", "a", "stable-diffusion-xl and stable-diffusion-3 and flux"),
        ("negative_prompt_2", "a", "stable-diffusion-xl and stable-diffusion-3"),
        *(
            (name, (8, 8), "stable-diffusion-xl and stable-diffusion-xl-refiner")
            for name in ("original_size", "crop", "negative_original_size", "negative_crop")
        ),
        *((name, (8, 8), "stable-diffusion-xl") for name in ("target_size", "negative_target_size")),
        *((name, 0, "stable-diffusion-xl-refiner") for name in FAMILY_OPTIONS if name.endswith("score")),
        ("prompt_3", "a", "stable-diffusion-3"),
        ("negative_prompt_3", "a", "stable-diffusion-3"),
        ("max_sequence_length", 8, "stable-diffusion-3 and flux"),
    ],
)
def test_an_option_of_another_family(option: str, value: Any, owners: str) -> None:
    """The sentence names the option and who has it."""
    with pytest.raises(InvalidRequestError) as caught:
        request("stable-diffusion", **{option: value})
    assert str(caught.value) == f"models of the family stable-diffusion have no {option}, only {owners}; leave it out"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_2": 5}, "prompt_2 is a int, expected a string"),
        ({"original_size": 512}, "original_size is 512, expected two whole numbers, across and down"),
        ({"target_size": (1, 2, 3)}, r"target_size is \(1, 2, 3\), expected two whole numbers, across and down"),
        ({"target_size": (0, 8)}, "target_size is 0, expected 1 to 65536"),
        ({"crop": (-1, 0)}, "crop is -1, expected 0 to 65536"),
        ({"crop": (0.5, 0)}, "crop is 0.5, expected a whole number"),
        ({"aesthetic_score": -1}, "aesthetic_score is -1, expected 0 to 10"),
        ({"negative_original_size": (8, 8)}, "negative_original_size is given without negative_target_size"),
        ({"negative_crop": (0, 0)}, "negative_crop is given without negative_original_size"),
        ({"prompt_4": "a"}, "unknown option 'prompt_4'; known options: .*negative_prompt"),
    ],
)
def test_a_wrong_value(options: dict[str, Any], message: str) -> None:
    """Each sentence says what was received and what is expected."""
    with pytest.raises(InvalidRequestError, match=message):
        request(**options)


def test_guidance_that_is_embedded_or_missing() -> None:
    """Without classifier-free guidance there is one half, and a model that knows none refuses a scale."""
    embedded = create_request(manifest("stable-diffusion", guidance="embedded"), "apple", guidance=4.0)
    assert (embedded.guidance, embedded.guided) == (4.0, False)
    options: dict[str, Any]
    for options in ({"negative_prompt": "leaf"}, {"guidance_start": 0.5}, {"guidance_rescale": 0.5}):
        with pytest.raises(InvalidRequestError, match=f"{next(iter(options))} is for guidance from two predictions"):
            create_request(manifest("stable-diffusion", guidance="embedded"), "apple", **options)
    none = manifest("stable-diffusion", guidance="none")
    assert not create_request(none, "apple", guidance=1.0).guided
    with pytest.raises(InvalidRequestError, match="guidance is 4, but this model was made to run without"):
        create_request(none, "apple", guidance=4.0)


def test_each_encoder_has_a_prompt_of_its_own() -> None:
    """The second encoder gets the second prompt, or the first where there is none; clip skip is the prompt's."""
    family = family_of(manifest("stable-diffusion-xl", force_zeros_for_empty_prompt=False))
    negative, prompt = family.texts(request(prompt_2="pear", negative_prompt="leaf", clip_skip=1), TOKENIZERS)

    def letters(text: Any) -> list[str]:
        return ["".join(map(chr, ids[0])).strip() for ids in text.tokens.values()]

    assert (letters(negative), letters(prompt)) == (["leaf", "leaf"], ["apple", "pear"])
    assert prompt.outputs["text_encoder_2"] == ("antepenultimate_hidden_state", "text_embeds")
    assert negative.outputs["text_encoder"] == ("penultimate_hidden_state",)
    assert prompt.key != family.texts(request(prompt_2="pear"), TOKENIZERS)[-1].key
    (alone,) = family.texts(request(guidance=1, negative_prompt_2="leaf", prompt_2="a long text"), TOKENIZERS)
    assert (letters(alone), alone.truncated) == (["apple", "a long"], 5)


def test_no_negative_prompt_is_zeros_where_the_model_was_made_for_it() -> None:
    """Zeros have the denoiser's shapes; where half a negative prompt is given, or a model wants none, it is encoded."""
    family = family_of(manifest("stable-diffusion-xl"))
    negative, _ = family.texts(request(), TOKENIZERS)
    conditioning = family.condition(negative, {})
    assert {name: values.shape for name, values in conditioning.items()} == {
        "encoder_hidden_states": (1, 77, 80),
        "text_embeds": (1, 24),
    }
    assert not any(values.any() for values in conditioning.values())
    assert family.texts(request(negative_prompt_2="leaf"), TOKENIZERS)[0].tokens
    encoding = family_of(manifest("stable-diffusion-xl", force_zeros_for_empty_prompt=False))
    assert encoding.texts(request(), TOKENIZERS)[0].tokens


def test_sizes_are_told_down_before_across() -> None:
    """Original, crop and target as the U-Net takes them; the negative half has its own only where they are given."""
    family = family_of(manifest("stable-diffusion-xl"))

    def ids(negative: bool, **options: Any) -> list[float]:
        (row,) = family.vectors(request(**options), negative=negative)["time_ids"]
        return list(row)

    assert ids(False) == ids(True) == [768, 512, 0, 0, 768, 512]
    told = {"original_size": (1, 2), "crop": (3, 4), "target_size": (5, 6)}
    assert ids(False, **told) == ids(True, **told) == [2, 1, 4, 3, 6, 5]
    away = {"negative_original_size": (7, 8), "negative_target_size": (9, 10)}
    assert ids(True, **told, **away) == [8, 7, 0, 0, 10, 9]
    assert ids(False, **told, **away) == [2, 1, 4, 3, 6, 5]


def test_a_refiner_is_told_a_score() -> None:
    """Original size and crop down before across, then the score; the negative half has its own, and no crop."""
    family = family_of(manifest("stable-diffusion-xl-refiner"))

    def ids(negative: bool, **options: Any) -> list[float]:
        asked = request("stable-diffusion-xl-refiner", **options)
        (row,) = family.vectors(asked, negative=negative)["time_ids"]
        return list(row)

    assert (ids(False), ids(True)) == ([768, 512, 0, 0, 6], [768, 512, 0, 0, 2.5])
    told = {"original_size": (1, 2), "crop": (3, 4), "aesthetic_score": 9.5, "negative_aesthetic_score": 0}
    assert (ids(False, **told), ids(True, **told)) == ([2, 1, 4, 3, 9.5], [2, 1, 0, 0, 0])
    away = {"negative_original_size": (7, 8), "negative_crop": (5, 6)}
    assert (ids(False, **away), ids(True, **away)) == ([768, 512, 0, 0, 6], [8, 7, 6, 5, 2.5])
    (prompt,) = family.texts(request("stable-diffusion-xl-refiner", guidance=1), TOKENIZERS)
    assert list(prompt.tokens) == ["text_encoder_2"]


@pytest.mark.parametrize("width", [4, 17, 256])
def test_guidance_is_embedded_as_in_diffusers(width: int) -> None:
    """A U-Net with that input gets sines and cosines of the scale above 1; no other gets anything."""
    plain = manifest("stable-diffusion", guidance="embedded")
    spec = TensorSpec("timestep_cond", "float32", ("batch", width))
    graph = Graph("unet/model.onnx", "fp32", 20, (spec,), ())
    changed = SimpleNamespace(**{**vars(plain), "components": {"unet": Component("unet", {"opset20-fp32": graph})}})
    asked = create_request(cast(Manifest, changed), "apple", guidance=8.5, seed=0)
    found = family_of(cast(Manifest, changed)).vectors(asked, negative=False)["timestep_cond"]
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    expected = embed(cast(LatentConsistencyModelPipeline, None), torch.tensor([7.5]), width)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-3)  # sines of thousands, in float32
    assert family_of(manifest("stable-diffusion")).vectors(request("stable-diffusion"), negative=False) == {}
