"""Pictures of every family against its pipeline in diffusers, and the table of families in the manual.

With LATENTRT_WRITE_DOCS=1 the rows of the table are written anew from what was measured.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from latentrt.runtime import Bundle, Pipeline
from latentrt.runtime.families import FAMILIES

PROMPT, NEGATIVE, STEPS, GUIDANCE, SEED = "a red apple", "a green leaf", 4, 4.0, 7

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """Something beyond prompt, size and number of pictures.

    Attributes:
        ours: Options of our request.
        theirs: Arguments of diffusers' pipeline; one that is None is not the usual one.
        scheduler: Changes to the scheduler's configuration, on both sides.
    """

    ours: Options
    theirs: Options
    scheduler: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        models: First column.
        kind: The tiny source, a key of ``WRITERS`` in ``tests/tiny_models.py``.
        pipeline: diffusers' class.
        samplers: Our names, and diffusers' scheduler classes.
        variants: By what the table calls them.
        sizes: Widths and heights.
        guidance: Scale of guidance.
        negative: What to steer away from; None for a family that cannot.
        adapt: Makes the arguments of diffusers' pipeline of the usual ones, where it takes others.
        solver: What diffusers' solvers of other models must be told to run this one.
    """

    models: str
    kind: str
    pipeline: str
    samplers: Mapping[str, str]
    variants: Mapping[str, Variant] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ((32, 32), (48, 24))
    guidance: float = GUIDANCE
    negative: str | None = NEGATIVE
    adapt: Callable[[Any, dict[str, Any]], dict[str, Any]] = lambda pipe, arguments: arguments
    solver: Options = field(default_factory=dict)


PLAIN = Variant({}, {})
TURBO = Variant(
    {"guidance": 1.0, "steps": 1, "sampler": "euler"},
    {"guidance_scale": 0.0, "num_inference_steps": 1},
    {"timestep_spacing": "trailing"},
)
LCM_AND_EULER = {"lcm": "LCMScheduler", "euler": "EulerDiscreteScheduler"}
OTHER_SCALE = Variant({"guidance": 1.5}, {"guidance_scale": 1.5})
LATENTS = np.random.default_rng(5).normal(size=(1, 4, 12, 24)).astype(np.float32) * 2  # of 48x24 pixels


def refine(pipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the refiner, which takes a size from latents: those of the picture, or the seed's noise."""
    height, width = arguments.pop("height"), arguments.pop("width")
    if "image" not in arguments:
        shape = (arguments["num_images_per_prompt"], 4, height // 2, width // 2)
        noise = torch.randn(shape, generator=arguments["generator"])
        pipe.scheduler.set_timesteps(arguments["num_inference_steps"])
        arguments |= {"image": noise, "latents": noise * pipe.scheduler.init_noise_sigma, "strength": 1.0}
    return arguments


EULER_AND_2M = {"euler": "EulerDiscreteScheduler", "dpmpp-2m": "DPMSolverMultistepScheduler"}
FLOW_EULER_AND_2M = {"flow-euler": "FlowMatchEulerDiscreteScheduler", "dpmpp-2m": "DPMSolverMultistepScheduler"}
FLOW_AND_HEUN = {**FLOW_EULER_AND_2M, "flow-heun": "FlowMatchHeunDiscreteScheduler"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# The pipeline hands every scheduler a shift, which solvers refuse where they are not told to shift.
UNSHIFTED = {**FLOW, "use_dynamic_shifting": True, "base_shift": 0.0, "max_shift": 0.0}
SHORT = Variant({"max_sequence_length": 40}, {"max_sequence_length": 40})
SECOND = Variant({"prompt_2": "a rocket"}, {"prompt_2": "a rocket"})
CLIP_SKIP = Variant({"clip_skip": 1}, {"clip_skip": 1})
NO_GUIDANCE = Variant({"guidance": 1.0}, {"guidance_scale": 0.0})
CASES = {
    case.kind: case
    for case in (
        Case("Stable Diffusion 1.x", "sd1", "StableDiffusionPipeline", EULER_AND_2M, {"Turbo": TURBO}),
        Case("Stable Diffusion 2.x", "sd2", "StableDiffusionPipeline", EULER_AND_2M, {"Turbo": TURBO}),
        Case(
            "Stable Diffusion XL base",
            "sdxl",
            "StableDiffusionXLPipeline",
            EULER_AND_2M,
            {
                "Turbo": TURBO,
                "no negative prompt": Variant({"negative_prompt": ""}, {"negative_prompt": None}),
                "second prompts": Variant(
                    {"prompt_2": "a rocket", "negative_prompt_2": "a cat!"},
                    {"prompt_2": "a rocket", "negative_prompt_2": "a cat!"},
                ),
                "sizes and crop": Variant(
                    {"original_size": (96, 64), "crop": (8, 0), "target_size": (48, 40)},
                    {"original_size": (64, 96), "crops_coords_top_left": (0, 8), "target_size": (40, 48)},
                ),
                "negative sizes": Variant(
                    {"negative_original_size": (16, 8), "negative_crop": (4, 2), "negative_target_size": (24, 16)},
                    {
                        "negative_original_size": (8, 16),
                        "negative_crops_coords_top_left": (2, 4),
                        "negative_target_size": (16, 24),
                    },
                ),
                "clip skip": CLIP_SKIP,
            },
        ),
        Case(
            "Stable Diffusion XL refiner",
            "sdxl-refiner",
            "StableDiffusionXLImg2ImgPipeline",
            EULER_AND_2M,
            {
                "latents to go on from": Variant(
                    {"latents": LATENTS, "denoising_start": 0.4},
                    {"image": torch.from_numpy(LATENTS), "denoising_start": 0.4},
                ),
                "scores": Variant(
                    {"aesthetic_score": 9.5, "negative_aesthetic_score": 0},
                    {"aesthetic_score": 9.5, "negative_aesthetic_score": 0.0},
                ),
                "sizes and crop": Variant(
                    {"original_size": (96, 64), "crop": (8, 0)},
                    {"original_size": (64, 96), "crops_coords_top_left": (0, 8)},
                ),
                "negative sizes": Variant(
                    {"negative_original_size": (16, 8), "negative_crop": (4, 2)},
                    {"negative_original_size": (8, 16), "negative_crops_coords_top_left": (2, 4)},
                ),
            },
            adapt=refine,
        ),
        Case(
            "Latent consistency, SD 1.x",
            "lcm",
            "StableDiffusionPipeline",
            LCM_AND_EULER,
            {"guidance scales": OTHER_SCALE},
            negative=None,
        ),
        Case(
            "Latent consistency, SDXL",
            "sdxl-lcm",
            "StableDiffusionXLPipeline",
            LCM_AND_EULER,
            {"guidance scales": OTHER_SCALE},
            negative=None,
        ),
        Case(
            "Stable Diffusion 3, without T5",
            "sd3",
            "StableDiffusion3Pipeline",
            FLOW_AND_HEUN,
            {"clip skip": CLIP_SKIP, "text lengths": SHORT},
            solver={**FLOW, "flow_shift": 3.0},
        ),
        Case(
            "Stable Diffusion 3.5",
            "sd35",
            "StableDiffusion3Pipeline",
            FLOW_EULER_AND_2M,
            {
                "prompts for each encoder": Variant(
                    *[{"prompt_2": "a rocket", "prompt_3": "two cats", "negative_prompt_3": "a dog"}] * 2
                ),
                "text lengths": SHORT,
                "no guidance": NO_GUIDANCE,
            },
            solver={**FLOW, "flow_shift": 3.0},
        ),
        Case(
            "FLUX.1 dev",
            "flux-dev",
            "FluxPipeline",
            FLOW_EULER_AND_2M,
            {
                "guidance scales": Variant({"guidance": 1.0}, {"guidance_scale": 1.0}),
                "second prompts": SECOND,
                "text lengths": SHORT,
            },
            negative=None,
            solver=FLOW,
        ),
        Case(
            "FLUX.1 schnell",
            "flux-schnell",
            "FluxPipeline",
            FLOW_EULER_AND_2M,
            {"text lengths": SHORT, "second prompts": SECOND},
            guidance=1.0,
            negative=None,
            solver=UNSHIFTED,
        ),
    )
}


@dataclass(frozen=True)
class Pair:
    """One checkpoint, opened here, with both loops, and in diffusers."""

    case: Case
    ours: tuple[Pipeline, Pipeline]
    theirs: Any
    scheduler: Options
    table: Any
    plain: dict[tuple[str, tuple[int, int], int], NDArray[np.uint8]] = field(default_factory=dict)

    def compare(self, sampler: str, size: tuple[int, int], images: int, variant: Variant = PLAIN) -> float:
        """PSNR in dB of the worst picture of both loops."""
        options: dict[str, Any] = {"width": size[0], "height": size[1]}
        if self.case.negative:
            options["negative_prompt"] = self.case.negative
        asked = {"sampler": sampler, "steps": STEPS, "images": images, "seed": SEED, "guidance": self.case.guidance}
        drawn = [_with(pipe, variant)(PROMPT, **{**options, **asked, **variant.ours}).images for pipe in self.ours]
        expected = self.expect(sampler, options, images, variant)
        assert {pictures.shape for pictures in drawn} == {expected.shape} == {(images, *size[::-1], 3)}
        assert len(np.unique(expected)) > 16, "a flat picture would make the comparison easy"
        plain = self.plain.setdefault((sampler, size, images), expected)  # which comes first
        if variant is not PLAIN:
            assert self.table.psnr(plain, expected) < self.table.GATE, f"{variant} makes no difference"
        return min(self.table.psnr(pictures, expected) for pictures in drawn)

    def expect(self, sampler: str, options: Options, images: int, variant: Variant) -> NDArray[np.uint8]:
        """diffusers' pictures."""
        name = self.case.samplers[sampler]
        config = {**self.scheduler, **variant.scheduler, **({} if name.startswith("Flow") else self.case.solver)}
        self.theirs.scheduler = getattr(diffusers, name).from_config(config)
        asked = {"num_inference_steps": STEPS, "num_images_per_prompt": images, "guidance_scale": self.case.guidance}
        generator = torch.Generator().manual_seed(SEED)
        arguments = self.case.adapt(self.theirs, {"generator": generator, **options, **asked, **variant.theirs})
        pictures = self.theirs(PROMPT, output_type="np", **arguments).images
        return np.round(pictures * 255).astype(np.uint8)


def _with(pipe: Pipeline, variant: Variant) -> Pipeline:
    """The pipeline with another scheduler configuration; the engines are shared."""
    if not variant.scheduler:
        return pipe
    manifest = pipe.manifest
    changed = dataclasses.replace(manifest, scheduler={**manifest.scheduler, **variant.scheduler})
    return Pipeline(Bundle(pipe.bundle.path, changed), pipe.engines)


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


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tiny: Any, doc_table: Any) -> Iterator[Pair]:
    """One for each row."""
    case, path = CASES[request.param], tiny.bundle(request.param)
    with Pipeline.load(path, "onnxruntime") as fused, Pipeline.load(path, "onnxruntime", loop="plain") as plain:
        assert (fused.loop.name, plain.loop.name) == ("fused", "plain")
        theirs = open_theirs(tiny.source(case.kind), case.pipeline)
        yield Pair(case, (fused, plain), theirs, dict(theirs.scheduler.config), doc_table)


def table_of(doc_table: Any) -> Any:
    """The table in the manual."""
    return doc_table.DocTable("parity-families", [(case.models,) for case in CASES.values()])


@pytest.mark.heavy
def test_the_pictures_are_diffusers(pair: Pair, doc_table: Any) -> None:
    """Samplers, sizes, one and three pictures, both loops, and what a family has besides agree, as the manual says."""
    figures = {
        f"{sampler} {size} {images}": pair.compare(sampler, size, images)
        for sampler, size, images in itertools.product(pair.case.samplers, pair.case.sizes, (1, 3))
    }
    first, size = next(iter(pair.case.samplers)), pair.case.sizes[1]
    figures |= {name: pair.compare(first, size, 1, each) for name, each in pair.case.variants.items()}
    print(pair.case.models, {name: round(figure, 1) for name, figure in figures.items()})
    case, passed = pair.case, min(figures.values()) >= doc_table.GATE
    row = (
        case.models,
        f"`{pair.ours[0].manifest.family}`",
        f"`{case.pipeline}`",
        ", ".join(f"`{sampler}`" for sampler in case.samplers),
        ", ".join(f"{width}x{height}" for width, height in case.sizes),
        ", ".join(case.variants) or "-",
        f"{doc_table.GATE:.0f} dB or more" if passed else "fails",
    )
    table_of(doc_table).hold(row)
    assert passed, figures


def test_a_latent_consistency_model_in_a_pipeline_of_its_own(tiny: Any, doc_table: Any) -> None:
    """diffusers' other pipeline for these models draws what ours draws, too."""
    theirs = open_theirs(tiny.source("lcm"), "LatentConsistencyModelPipeline")
    asked = {"num_images_per_prompt": 2, "width": 48, "height": 24, "generator": torch.Generator().manual_seed(SEED)}
    expected = np.round(theirs(PROMPT, output_type="np", **asked).images * 255)
    with Pipeline.load(tiny.bundle("lcm"), "onnxruntime") as pipe:
        drawn = pipe(PROMPT, images=2, width=48, height=24, seed=SEED)
    assert (drawn.request.sampler, drawn.request.steps, drawn.request.guidance) == ("lcm", 4, 8.5)
    assert doc_table.psnr(drawn.images, expected.astype(np.uint8)) >= doc_table.GATE


def test_the_manual_has_every_family(doc_table: Any) -> None:
    """The table has a row for each case, and each family of the runtime has a case."""
    rows = table_of(doc_table).rows()
    assert [row[0] for row in rows] == [case.models for case in CASES.values()]
    assert {row[1].strip("`") for row in rows} == set(FAMILIES)
