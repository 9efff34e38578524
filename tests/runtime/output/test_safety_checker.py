"""The safety checker: verdicts and pictures of diffusers, on request alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from latentrt.engines import FakeEngine, TensorSpec
from latentrt.engines.errors import BundleError, InvalidRequestError
from latentrt.runtime import Bundle, Pipeline
from latentrt.runtime.abilities import abilities
from latentrt.runtime.cli import main
from latentrt.runtime.images.clip_vision import clip_pixels
from latentrt.runtime.output.previews import Preview
from latentrt.runtime.output.safety_checker import CONCEPT_SCORES, SPECIAL_SCORES, flag_images, verdicts

Pictures = NDArray[np.uint8]
OPTIONS: dict[str, Any] = {"steps": 2, "seed": 7, "width": 32, "height": 32, "images": 6}


class Theirs:
    """diffusers' checker, as its pipelines use it."""

    def __init__(self, directory: Path) -> None:
        self.checker = StableDiffusionSafetyChecker.from_pretrained(directory)
        self.processor = CLIPImageProcessor.from_pretrained(directory)

    def prepared(self, picture: Pictures) -> torch.Tensor:
        found: torch.Tensor = self.processor(Image.fromarray(picture), return_tensors="pt").pixel_values
        return found

    def __call__(self, images: Pictures) -> tuple[Pictures, tuple[bool, ...]]:
        """Pictures as diffusers hands them out, and its verdicts."""
        seen = torch.cat([self.prepared(each) for each in images])
        pictures, flagged = self.checker(clip_input=seen, images=images.copy())
        return pictures, tuple(flagged)

    def scores(self, picture: Pictures) -> tuple[NDArray[Any], ...]:
        """By how much cosines exceed their thresholds: of concepts, and of special care."""
        model = self.checker
        with torch.no_grad():
            embedded = model.visual_projection(model.vision_model(self.prepared(picture))[1])
            return (
                (cosine_distance(embedded, model.concept_embeds) - model.concept_embeds_weights).numpy(),
                (cosine_distance(embedded, model.special_care_embeds) - model.special_care_embeds_weights).numpy(),
            )


@pytest.fixture(scope="module")
def theirs(tiny: Any) -> Theirs:
    return Theirs(tiny.safety_checker())


@pytest.fixture(scope="module")
def pipe(tiny: Any) -> Iterator[Pipeline]:
    with Pipeline.load(tiny.bundle("lcm"), "onnxruntime", threads=1) as pipe:
        yield pipe


class Embedding(torch.nn.Module):
    """Stands for the vision tower: takes embeddings for pictures."""

    def forward(self, clip_input: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, clip_input


def test_verdicts_are_those_of_diffusers() -> None:
    """Rounding, thresholds and special care give the same verdict on thousands of embeddings, many at a threshold."""
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    model.vision_model, model.visual_projection = Embedding(), torch.nn.Identity()
    embedded = torch.randn(2000, 16)
    for name, least in (("concept_embeds", 0.4), ("special_care_embeds", 0.1)):
        torch.nn.init.normal_(getattr(model, name))
        torch.nn.init.uniform_(getattr(model, f"{name}_weights"), least, least + 0.1)
    _, expected = model(embedded, [np.ones(1)] * len(embedded))
    concepts = cosine_distance(embedded, model.concept_embeds) - model.concept_embeds_weights
    special = cosine_distance(embedded, model.special_care_embeds) - model.special_care_embeds_weights
    found = verdicts(concepts.numpy(), special.numpy())
    assert found.tolist() == expected
    careless = verdicts(concepts.numpy(), special.numpy() - 2)
    unrounded = (concepts.numpy() + 0.01 * (special.numpy() > 0).any(1, keepdims=True) > 0).any(1)
    assert 0.2 < found.mean() < 0.8
    assert (found > careless).sum() > 10, "special care alone flags none of these"
    assert (found != unrounded).any(), "rounding decides none of these"


@pytest.mark.heavy
def test_pictures_of_any_size_are_judged_as_by_diffusers(pipe: Pipeline, theirs: Theirs) -> None:
    """Scores agree to rounding, and verdicts are equal, over square, wide, high, large and tiny pictures."""
    drawn = np.random.default_rng(0)
    engine, flagged = pipe.opened("safety_checker"), []
    for size in ((32, 32), (71, 50), (31, 60), (33, 33), (32, 200), (5, 4), (300, 256)) * 15:
        picture = drawn.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        found = engine.run({"pixel_values": clip_pixels(picture, 32)})
        for ours, expected in zip((CONCEPT_SCORES, SPECIAL_SCORES), theirs.scores(picture), strict=True):
            np.testing.assert_allclose(found[ours], expected, atol=1e-4)
        (verdict,) = flag_images(engine, picture[None])
        assert (verdict,) == theirs(picture[None])[1]
        flagged.append(verdict)
    assert 10 < sum(flagged) < 95


@pytest.mark.heavy
def test_flagged_pictures_are_marked_or_black(pipe: Pipeline, theirs: Theirs) -> None:
    """Black ones are diffusers' pictures, marked ones are as they were drawn, and unasked nobody looks."""
    seen: set[bool] = set()
    for width, height in ((32, 32), (48, 24)):
        options = {**OPTIONS, "width": width, "height": height}
        plain, marked, black = (pipe("a red apple", **options, safety=each) for each in (None, "mark", "black"))
        expected, flagged = theirs(plain.images)
        assert (plain.flagged, marked.flagged, black.flagged) == (None, flagged, flagged)
        np.testing.assert_array_equal(black.images, expected)
        assert black.images.dtype == np.uint8
        np.testing.assert_array_equal(marked.images, plain.images)
        np.testing.assert_array_equal(black.latents, plain.latents)
        assert plain.request.safety == "off"
        assert plain.timings.safety_checker == 0 < marked.timings.safety_checker < marked.timings.total
        seen |= set(flagged)
    assert seen == {True, False}


@pytest.mark.heavy
def test_every_way_to_draw_is_checked(tiny: Any, theirs: Theirs) -> None:
    """Batches, runs that are finished, pasted pictures and previews; a plain request opens no safety checker."""
    options = {**OPTIONS, "images": 3}
    previews: list[Preview] = []
    with Pipeline.load(tiny.bundle("lcm"), "onnxruntime", threads=1) as pipe:
        apart = pipe.batch(["a red apple", "a rocket"], **options)
        assert "safety_checker" not in pipe.engines
        expected, flagged = theirs(np.concatenate([each.images for each in apart]))
        both = pipe.batch(["a red apple", "a rocket"], **options, safety="black")
        np.testing.assert_array_equal(np.concatenate([each.images for each in both]), expected)
        assert tuple(each.flagged for each in both) == (flagged[:3], flagged[3:])
        alone, flags = theirs(pipe("a red apple", **options).images)
        run = pipe.start("a red apple", **options, safety="black")
        while not run.done:
            pipe.advance([run])
        assert run.flagged is None
        np.testing.assert_array_equal(pipe.finish(run), alone)
        assert run.flagged == flags
        shown = dict(options, steps=4, images=6, preview_every=1, on_preview=previews.append)
        pipe("a red apple", **shown)
        pipe("a red apple", **shown, safety="mark")
        pipe("a red apple", **shown, safety="black")
        for plain, marked, black in zip(previews[:3], previews[3:6], previews[6:], strict=True):
            np.testing.assert_array_equal(marked.images, plain.images)
            np.testing.assert_array_equal(black.images, theirs(plain.images)[0])
        assert any((each.images == 0).all(axis=(1, 2, 3)).any() for each in previews[6:])
        mask = Image.new("L", (32, 32), 128)
        edit = dict(options, image=apart[0].images[0], mask=mask, keep_outside=True)
        pictures, flags = theirs(pipe("a rocket", **edit).images)
        drawn = pipe("a rocket", **edit, safety="black")
        np.testing.assert_array_equal(drawn.images, pictures)
        assert drawn.flagged == flags


@pytest.mark.heavy
def test_components_in_turns_check_the_same(tiny: Any, theirs: Theirs) -> None:
    """With little memory the safety checker has its turn, and gives it back."""
    options = {**OPTIONS, "steps": 1, "safety": "mark"}
    with Pipeline.load(tiny.bundle("lcm"), "onnxruntime", threads=1, low_memory=True) as pipe:
        drawn = pipe("a red apple", **options)
    assert drawn.flagged == theirs(drawn.images)[1]


def test_what_cannot_be_checked_is_refused(pipe: Pipeline, tiny_bundles: dict[str, Path]) -> None:
    """Unknown choices, latents, and bundles without a safety checker; inspect tells which have one."""
    for options, message in (
        ({"safety": "blur"}, "safety is 'blur', expected one of off, mark, black"),
        ({"safety": True}, "safety is True, expected one of off"),
        ({"safety": "mark", "output": "latent"}, "safety is 'mark', but the request ends in latents"),
        ({"safety": "black", "denoising_end": 0.5}, "safety is 'black', but the request ends in latents"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            pipe("a red apple", **OPTIONS, **options)
    with (
        Pipeline.load(tiny_bundles["sd1"], "onnxruntime") as other,
        pytest.raises(
            InvalidRequestError, match="the bundle has no safety checker; build it again with --safety-checker"
        ),
    ):
        other("a red apple", safety="mark")
    own = Pipeline(pipe.bundle, {name: pipe.engines[name] for name in pipe.engines if name != "safety_checker"})
    with pytest.raises(BundleError, match="safety_checker is needed, and the pipeline has no engine of that component"):
        own("a red apple", **OPTIONS, safety="mark")
    assert abilities(pipe.bundle)["safety_checker"] is True
    assert abilities(Bundle.open(tiny_bundles["sd1"]))["safety_checker"] is False


def test_a_component_that_is_no_safety_checker() -> None:
    """A graph of another kind under its name is one clear sentence, not a verdict."""
    pictures = np.zeros((1, 8, 8, 3), np.uint8)
    scores = [TensorSpec(name, "float32", ("any",)) for name in (CONCEPT_SCORES, SPECIAL_SCORES)]
    for side, message in ((8, "gives no row of scores"), ("side", "takes no images of a fixed size")):
        pixels = TensorSpec("pixel_values", "float32", ("batch", 3, side, side))
        row = np.ones(17, np.float32)
        engine = FakeEngine([pixels], scores, lambda feeds, row=row: {each.name: row for each in scores}).open()
        with pytest.raises(BundleError, match=message):
            flag_images(engine, pictures)


@pytest.mark.heavy
def test_the_command_line_tells_what_was_flagged(
    tiny: Any, theirs: Theirs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a note that counts from one, as JSON, and in the PNG, whose request is repeated with its checks."""
    bundle, out, again = str(tiny.bundle("lcm")), tmp_path / "out.png", tmp_path / "again.png"
    options = [f"--{name}={value}" for name, value in OPTIONS.items()] + ["--engine=onnxruntime", "--threads=1"]
    assert main(["generate", bundle, "a red apple", f"--output={out}", *options, "--safety=mark"]) == 0
    with Image.open(out) as sheet:
        assert "Safety: mark" in sheet.info["parameters"]
        drawn = np.asarray(sheet)
    pictures = np.stack([drawn[32 * (n // 4) :, 32 * (n % 4) :][:32, :32] for n in range(6)])
    flagged = theirs(pictures)[1]
    numbers = ", ".join(str(number) for number, each in enumerate(flagged, 1) if each)
    assert f"note: the safety checker flagged {numbers} of 6 images, left as drawn\n" in capsys.readouterr().out
    assert main(["generate", bundle, f"--from={out}", f"--output={again}", "--engine=onnxruntime", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["request"]["safety"], told["flagged"]) == ("mark", list(flagged))
    assert main(["inspect", bundle]) == 0
    assert "safety checker: unsafe images can be marked, or made black" in capsys.readouterr().out
