"""Steered pictures against diffusers' pipelines, and the table of ControlNets in the manual.

With LATENTRT_WRITE_DOCS=1 the rows of the table are written anew from what was measured.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from latentrt.runtime import Pipeline

GATE = 45.0
"""Least PSNR in dB, on uint8 pictures."""
PAGE = Path(__file__).resolve().parents[2] / "docs" / "control.md"
BEGIN, END = "<!-- control: written by tests/runtime/test_parity_control.py -->\n", "<!-- end of control -->\n"
EDGES, DEPTH = (
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)) for seed in (1, 2)
)

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """Options of our request, and arguments of diffusers' pipeline beyond one picture for each ControlNet."""

    control: Options | list[Options]
    ours: Options = field(default_factory=dict)
    theirs: Options = field(default_factory=dict)


ONE, BOTH = {"name": "edges", "image": EDGES}, [{"name": "edges", "image": EDGES}, {"name": "depth", "image": DEPTH}]
VARIANTS = {
    "one": Variant(ONE),
    "colours reversed": Variant({"name": "depth", "image": DEPTH}),
    "scale": Variant({**ONE, "scale": 0.5}, {}, {"controlnet_conditioning_scale": 0.5}),
    "two, with start and end": Variant(
        [{**BOTH[0], "end": 0.5, "scale": 0.7}, {**BOTH[1], "start": 0.25}],
        {},
        {
            "control_guidance_start": [0.0, 0.25],
            "control_guidance_end": [0.5, 1.0],
            "controlnet_conditioning_scale": [0.7, 1.0],
        },
    ),
    "guess mode": Variant(BOTH, {"guess_mode": True}, {"guess_mode": True}),
    "no guidance": Variant(BOTH, {"guidance": 1.0}, {"guidance_scale": 1.0}),
    "three pictures": Variant(BOTH, {"images": 3}, {"num_images_per_prompt": 3}),
}
CASES = {
    "sd1": ("Stable Diffusion 1.x", "StableDiffusionControlNetPipeline", {"requires_safety_checker": False}),
    "sdxl": ("Stable Diffusion XL", "StableDiffusionXLControlNetPipeline", {"add_watermarker": False}),
}


def psnr(pictures: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """PSNR in dB of the worst picture."""
    errors = np.square(pictures.astype(np.float64) - expected).mean(axis=(1, 2, 3))
    return float(10 * np.log10(255**2 / max(errors.max(), 1e-9)))


def expect(parts: Options, kind: str, variant: Variant) -> NDArray[np.uint8]:
    """diffusers' pictures."""
    _, name, settings = CASES[kind]
    controls = variant.control if isinstance(variant.control, list) else [variant.control]
    nets, images = [parts["nets"][each["name"]] for each in controls], [each["image"] for each in controls]
    single = len(nets) == 1
    pipe = getattr(diffusers, name)(**parts["base"].components, controlnet=nets[0] if single else nets, **settings)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(parts["base"].scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "negative_prompt": "a green leaf",
        "output_type": "np",
        "width": 48,
        "height": 24,
        "generator": torch.Generator().manual_seed(7),
    }
    pictures = pipe("a red apple", image=images[0] if single else images, **{**arguments, **variant.theirs}).images
    return np.round(pictures * 255).astype(np.uint8)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", CASES)
def test_steered_pictures_are_diffusers(kind: str, tiny: Any) -> None:
    """One and two ControlNets, with all their options, in both loops, give diffusers' pictures, as the manual says."""
    models, name, _ = CASES[kind]
    orders = {"edges": "rgb", "depth": "bgr"}
    load = diffusers.ControlNetModel.from_pretrained
    nets = {each: load(tiny.controlnet(kind, order), local_files_only=True) for each, order in orders.items()}
    base = diffusers.DiffusionPipeline.from_pretrained(tiny.source(kind), local_files_only=True)
    options = {
        "steps": 4,
        "guidance": 4.0,
        "negative_prompt": "a green leaf",
        "sampler": "euler",
        "width": 48,
        "height": 24,
        "seed": 7,
    }
    path, figures = tiny.controlled(kind), {}
    with Pipeline.load(path, "onnxruntime") as fused, Pipeline.load(path, "onnxruntime", loop="plain") as plain:
        assert (fused.loop.name, plain.loop.name) == ("fused", "plain")
        unsteered = fused("a red apple", **options).images
        assert not any("control" in component for component in fused.engines), "opened before it is needed"
        for label, variant in VARIANTS.items():
            expected = expect({"nets": nets, "base": base}, kind, variant)
            assert psnr(expected[:1], unsteered) < GATE, f"{label} makes no difference"
            asked = {**options, **variant.ours, "control": variant.control}
            drawn = [pipe("a red apple", **asked).images for pipe in (fused, plain)]
            figures[label] = min(psnr(each, expected) for each in drawn)
    print(models, {label: round(figure, 1) for label, figure in figures.items()})
    passed = f"{GATE:.0f} dB or more" if min(figures.values()) >= GATE else "fails"
    measured = f"| {models} | `{name}` | {', '.join(VARIANTS)} | {passed} |"
    write_row(measured)
    assert min(figures.values()) >= GATE, figures


def write_row(measured: str) -> None:
    """Hold a row against the manual's, or write it there."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    rows, _, after = rest.partition(END)
    head, rule, *lines = rows.splitlines()
    if os.environ.get("LATENTRT_WRITE_DOCS"):
        kept = [line for line in lines if line.split(" | ")[0] != measured.split(" | ")[0]]
        table = "\n".join([head, rule, *sorted([*kept, measured])])
        PAGE.write_text(f"{before}{BEGIN}{table}\n{END}{after}", encoding="utf-8")
    else:
        assert measured in lines, f"{PAGE.name} has another row; write it with LATENTRT_WRITE_DOCS=1"
