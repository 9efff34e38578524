"""Image to image and inpainting of every family against diffusers' pipelines, and their table in the manual.

With LATENTRT_WRITE_DOCS=1 the rows of the table are written anew from what was measured.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from latentrt.runtime import Pipeline

PROMPT, NEGATIVE, STEPS, GUIDANCE, SEED = "a red apple", "a green leaf", 5, 4.0, 7
IMAGE_TO_IMAGE, INPAINTING = "image to image", "inpainting"


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        task: First column.
        models: Second column.
        kind: ``emoji``, or a tiny source, a key of ``WRITERS`` in ``tests/tiny_models.py``.
        pipeline: diffusers' class.
        samplers: Our names, and diffusers' scheduler classes.
        sized: Whether diffusers' pipeline is told the size, rather than to take it from the picture.
        guided: Whether there is a negative prompt.
        guidance: Scale of guidance.
        channels: What diffusers' denoiser is to be taken for: its pipelines of inpainting tell by the number of
            channels of the released models whether they must keep what is outside of the mask.
        unshifted: Whether diffusers' pipeline leaves the latents' shift out when it decodes, so that its autoencoder is
            given what the pipeline drew.
    """

    task: str
    models: str
    kind: str
    pipeline: str
    samplers: Mapping[str, str]
    sized: bool = False
    guided: bool = True
    guidance: float = GUIDANCE
    channels: int | None = None
    unshifted: bool = False

    @property
    def key(self) -> str:
        """What tells it from the others."""
        return f"{self.task}, {self.kind}"


STEADY = {"dpmpp-2m": "DPMSolverMultistepScheduler", "euler": "EulerDiscreteScheduler"}
FRESH = {**STEADY, "euler-a": "EulerAncestralDiscreteScheduler", "heun": "HeunDiscreteScheduler"}
EMOJI = {**FRESH, "ddim": "DDIMScheduler", "unipc": "UniPCMultistepScheduler", "lcm": "LCMScheduler"}
FLOW = {"flow-euler": "FlowMatchEulerDiscreteScheduler"}
LCM = {"lcm": "LCMScheduler"}
CHANGE, CHANGE_XL = "StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"
CHANGE_LCM = "LatentConsistencyModelImg2ImgPipeline"
PAINT, PAINT_3 = "StableDiffusionInpaintPipeline", "StableDiffusion3InpaintPipeline"
PAINT_XL = "StableDiffusionXLInpaintPipeline"
CASES = {
    case.key: case
    for case in (
        Case(IMAGE_TO_IMAGE, "Emoji example", "emoji", CHANGE, EMOJI),
        Case(IMAGE_TO_IMAGE, "Stable Diffusion 1.x", "sd1", CHANGE, FRESH),
        Case(IMAGE_TO_IMAGE, "Stable Diffusion 2.x", "sd2", CHANGE, STEADY),
        Case(IMAGE_TO_IMAGE, "Stable Diffusion XL base", "sdxl", CHANGE_XL, FRESH),
        Case(IMAGE_TO_IMAGE, "Stable Diffusion XL refiner", "sdxl-refiner", CHANGE_XL, STEADY),
        Case(IMAGE_TO_IMAGE, "Latent consistency, SD 1.x", "lcm", CHANGE_LCM, LCM, guided=False),
        Case(IMAGE_TO_IMAGE, "Stable Diffusion 3.5", "sd35", "StableDiffusion3Img2ImgPipeline", FLOW, sized=True),
        Case(IMAGE_TO_IMAGE, "FLUX.1 dev", "flux-dev", "FluxImg2ImgPipeline", FLOW, sized=True, guided=False),
        Case(INPAINTING, "Emoji example", "emoji", PAINT, EMOJI, sized=True, channels=4),
        Case(INPAINTING, "Stable Diffusion 1.x", "sd1", PAINT, FRESH, sized=True),
        Case(INPAINTING, "Stable Diffusion 1.x, made for it", "sd1-inpaint", PAINT, FRESH, sized=True),
        Case(INPAINTING, "Stable Diffusion XL base", "sdxl", PAINT_XL, FRESH, sized=True),
        Case(INPAINTING, "Stable Diffusion XL, made for it", "sdxl-inpaint", PAINT_XL, STEADY, sized=True),
        Case(INPAINTING, "Stable Diffusion 3.5", "sd35", PAINT_3, FLOW, sized=True, channels=16, unshifted=True),
        Case(INPAINTING, "FLUX.1 dev", "flux-dev", "FluxInpaintPipeline", FLOW, sized=True, guided=False),
    )
}  # fmt: skip


def picture(width: int, height: int) -> NDArray[np.uint8]:
    """Something to begin with: shades, waves and some noise."""
    rows, columns = np.mgrid[:height, :width]
    waves = 128 + 60 * np.sin(columns / 5) * np.cos(rows / 4)
    shades = np.stack([columns * 255 / width, rows * 255 / height, waves], axis=2)
    return np.clip(shades + np.random.default_rng(3).normal(0, 8, shades.shape), 0, 255).astype(np.uint8)


def drawn_mask(width: int, height: int) -> NDArray[np.uint8]:
    """A white rectangle, a grey one that counts as white, and one that does not."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 3 : width * 3 // 4] = 255
    mask[height // 2 : height * 3 // 4, width // 4 : width // 2] = 128
    mask[: height // 8] = 127
    return mask


@functools.cache
def open_theirs(path: Path, pipeline: str) -> Any:
    """diffusers' pipeline in fp32."""
    index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
    absent = {name: None for name, entry in index.items() if entry == [None, None]}  # which it wants to be told
    pipe = getattr(diffusers, pipeline).from_pretrained(
        path, torch_dtype=torch.float32, local_files_only=True, **absent
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True)
class Pair:
    """One checkpoint, opened here, with both loops, and in diffusers."""

    case: Case
    ours: tuple[Pipeline, Pipeline]
    theirs: Any
    scheduler: Mapping[str, Any]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the pictures."""
        return (96, 64) if self.case.kind == "emoji" else (48, 24)

    def figures(self, table: Any) -> dict[str, float]:
        """PSNR in dB of the worst picture, by sampler, strength and number of pictures."""
        runs = [(sampler, 0.62, 1) for sampler in self.case.samplers]
        runs += [(next(iter(self.case.samplers)), 1.0, 2)]
        found = {}
        for sampler, strength, images in runs:
            expected = self.expected(sampler, strength, images)
            assert len(np.unique(expected)) > 16, "a flat picture would make the comparison easy"
            pictures = [self.drawn(pipe, sampler, strength, images) for pipe in self.ours]
            found[f"{sampler} {strength} {images}"] = min(table.psnr(each, expected) for each in pictures)
        return found

    def drawn(self, pipe: Pipeline, sampler: str, strength: float, images: int) -> NDArray[np.uint8]:
        """Our pictures."""
        options: dict[str, Any] = {"image": picture(*self.size), "strength": strength, "sampler": sampler}
        if self.case.task == INPAINTING:
            options["mask"] = drawn_mask(*self.size)
        if self.case.guided:
            options["negative_prompt"] = NEGATIVE
        options |= {"steps": STEPS, "images": images, "seed": SEED, "guidance": self.case.guidance}
        return pipe(PROMPT, **options).images

    def expected(self, sampler: str, strength: float, images: int) -> NDArray[np.uint8]:
        """diffusers' pictures."""
        settings = {**self.scheduler, **({"clip_sample": False} if sampler == "ddim" else {})}
        self.theirs.scheduler = getattr(diffusers, self.case.samplers[sampler]).from_config(settings)
        options: dict[str, Any] = {"image": Image.fromarray(picture(*self.size)), "strength": strength}
        if self.case.task == INPAINTING:
            options["mask_image"] = Image.fromarray(drawn_mask(*self.size))
        if self.case.sized:
            options["width"], options["height"] = self.size
        if self.case.guided:
            options["negative_prompt"] = NEGATIVE
        options |= {"num_inference_steps": STEPS, "num_images_per_prompt": images, "output_type": "np"}
        options |= {"generator": torch.Generator().manual_seed(SEED), "guidance_scale": self.case.guidance}
        if self.case.unshifted:
            vae: Any = self.theirs.vae
            latents = self.theirs(PROMPT, **{**options, "output_type": "latent"}).images
            with torch.no_grad():
                decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
            images = self.theirs.image_processor.postprocess(decoded, output_type="np")
        else:
            images = self.theirs(PROMPT, **options).images
        return np.round(images * 255).astype(np.uint8)


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tiny: Any, emoji_source: Path, emoji_bundle: Path) -> Iterator[Pair]:
    """One for each row."""
    case = CASES[request.param]
    emoji = case.kind == "emoji"
    path, source = (emoji_bundle, emoji_source) if emoji else (tiny.bundle(case.kind), tiny.source(case.kind))
    with Pipeline.load(path, "onnxruntime") as fused, Pipeline.load(path, "onnxruntime", loop="plain") as plain:
        theirs = open_theirs(source, case.pipeline)
        if case.channels is not None:
            getattr(theirs, fused.family.denoiser).register_to_config(in_channels=case.channels)
        yield Pair(case, (fused, plain), theirs, dict(theirs.scheduler.config))


def table_of(doc_table: Any) -> Any:
    """The table in the manual."""
    return doc_table.DocTable("parity-tasks", [(case.task, case.models) for case in CASES.values()])


@pytest.mark.heavy
def test_the_pictures_are_diffusers(pair: Pair, doc_table: Any) -> None:
    """Samplers, strengths, one and two pictures and both loops agree, as the manual says."""
    figures = pair.figures(doc_table)
    print(pair.case.key, {name: round(figure, 1) for name, figure in figures.items()})
    passed = min(figures.values()) >= doc_table.GATE
    samplers = ", ".join(f"`{sampler}`" for sampler in pair.case.samplers)
    family, verdict = f"`{pair.ours[0].manifest.family}`", f"{doc_table.GATE:.0f} dB or more" if passed else "fails"
    table_of(doc_table).hold((pair.case.task, pair.case.models, family, f"`{pair.case.pipeline}`", samplers, verdict))
    assert passed, figures


def test_the_manual_has_every_row(doc_table: Any) -> None:
    """The table has a row for each case and no other."""
    assert [tuple(row[:2]) for row in table_of(doc_table).rows()] == [(c.task, c.models) for c in CASES.values()]


@pytest.mark.heavy
def test_a_region_around_the_mask_is_drawn_as_in_diffusers(
    emoji_source: Path, emoji_bundle: Path, doc_table: Any
) -> None:
    """With padding around the mask that part alone is drawn, at the model's size, and put back in its place."""
    size = (100, 90)
    mask = np.zeros(size[::-1], np.uint8)
    mask[40:60, 30:50] = 255
    theirs = open_theirs(emoji_source, "StableDiffusionInpaintPipeline")
    theirs.unet.register_to_config(in_channels=4)
    theirs.scheduler = diffusers.EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    given = {"image": Image.fromarray(picture(*size)), "mask_image": Image.fromarray(mask), "padding_mask_crop": 6}
    options: dict[str, Any] = {"strength": 0.8, "guidance_scale": GUIDANCE, "num_inference_steps": STEPS}
    options |= {"generator": torch.Generator().manual_seed(SEED), "width": 64, "height": 64}
    expected = np.asarray(theirs(PROMPT, **given, **options).images[0])[None]
    with Pipeline.load(emoji_bundle, "onnxruntime") as pipe:
        asked = {"strength": 0.8, "guidance": GUIDANCE, "steps": STEPS, "seed": SEED, "sampler": "euler"}
        result = pipe(PROMPT, image=picture(*size), mask=mask, mask_padding=6, **asked)
    assert (result.request.width, result.request.height) == (64, 64)
    np.testing.assert_array_equal(result.images[0][mask == 0], picture(*size)[mask == 0])
    assert doc_table.psnr(result.images, expected) >= doc_table.GATE
