"""Steered pictures against diffusers' pipelines, and their table in the manual.

With LATENTRT_WRITE_DOCS=1 the rows of the table are written anew from what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from latentrt.runtime import Pipeline

EDGES, DEPTH = (
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)) for seed in (1, 2)
)

Options = Mapping[str, Any]
OPTIONS: dict[str, Any] = {
    "steps": 4,
    "guidance": 4.0,
    "negative_prompt": "a green leaf",
    "sampler": "euler",
    "width": 48,
    "height": 24,
    "seed": 7,
}


@dataclass(frozen=True)
class Variant:
    """Options of our request, and arguments of diffusers' pipeline beyond one picture for each ControlNet.

    ``picture`` is the scale of a picture in the prompt.
    """

    control: Options | list[Options]
    ours: Options = field(default_factory=dict)
    theirs: Options = field(default_factory=dict)
    picture: float | None = None


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
    "and an IP-Adapter": Variant(BOTH, picture=0.7),
}
ADAPTED = {
    "scale 1": Variant([], picture=1.0),
    "scale 0.4": Variant([], picture=0.4),
    "no guidance": Variant([], {"guidance": 1.0}, {"guidance_scale": 1.0}, picture=1.0),
    "three pictures": Variant([], {"images": 3}, {"num_images_per_prompt": 3}, picture=0.6),
}
CASES = {
    "sd1": ("Stable Diffusion 1.x", "StableDiffusion", {"requires_safety_checker": False}),
    "sdxl": ("Stable Diffusion XL", "StableDiffusionXL", {"add_watermarker": False}),
}


@dataclass(frozen=True)
class Theirs:
    """A kind in diffusers: without an IP-Adapter, with one, and ControlNets by name."""

    kind: str
    plain: Any
    adapted: Any
    nets: Options

    @classmethod
    def open(cls, kind: str, tiny: Any) -> Theirs:
        """In fp32."""
        local: Options = {"local_files_only": True}
        load, orders = diffusers.ControlNetModel.from_pretrained, {"edges": "rgb", "depth": "bgr"}
        nets = {name: load(tiny.controlnet(kind, order), **local) for name, order in orders.items()}
        encoder = CLIPVisionModelWithProjection.from_pretrained(tiny.ip_adapter(kind) / "image_encoder", **local)
        plain = diffusers.DiffusionPipeline.from_pretrained(tiny.source(kind), **local)
        adapted = diffusers.DiffusionPipeline.from_pretrained(
            tiny.source(kind),
            image_encoder=encoder,
            feature_extractor=CLIPImageProcessor(size=32, crop_size=32),
            **local,
        )
        adapted.load_ip_adapter(str(tiny.ip_adapter(kind)), subfolder="", weight_name="ip-adapter.safetensors")
        return cls(kind, plain, adapted, nets)


def expect(theirs: Theirs, variant: Variant) -> NDArray[np.uint8]:
    """diffusers' pictures."""
    _, name, settings = CASES[theirs.kind]
    controls = variant.control if isinstance(variant.control, list) else [variant.control]
    nets, images = [theirs.nets[each["name"]] for each in controls], [each["image"] for each in controls]
    single, more = len(nets) == 1, dict[str, Any]()
    pipe = theirs.plain
    if variant.picture is not None:
        pipe, more = theirs.adapted, {"ip_adapter_image": EDGES}
        pipe.set_ip_adapter_scale(variant.picture)
    scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    if controls:
        more["image"] = images[0] if single else images
        kind = getattr(diffusers, f"{name}ControlNetPipeline")
        pipe = kind(**pipe.components, controlnet=nets[0] if single else nets, **settings)
    pipe.scheduler = scheduler
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
    pictures = pipe("a red apple", **{**arguments, **variant.theirs, **more}).images
    return np.round(pictures * 255).astype(np.uint8)


def table_of(doc_table: Any) -> Any:
    """The table in the manual."""
    order = [(f"{title}, {models}",) for title in ("ControlNet", "IP-Adapter") for models, *_ in CASES.values()]
    return doc_table.DocTable("parity-control", order)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", CASES)
def test_steered_pictures_are_diffusers(kind: str, tiny: Any, doc_table: Any) -> None:
    """ControlNets and an IP-Adapter, with all their options, in both loops, give diffusers' pictures."""
    psnr, gate = doc_table.psnr, doc_table.GATE
    models, name, _ = CASES[kind]
    theirs = Theirs.open(kind, tiny)
    path, figures = tiny.controlled(kind), dict[str, dict[str, float]]()
    with Pipeline.load(path, "onnxruntime") as fused, Pipeline.load(path, "onnxruntime", loop="plain") as plain:
        assert (fused.loop.name, plain.loop.name) == ("fused", "plain")
        usual = expect(theirs, Variant([]))
        assert min(psnr(pipe("a red apple", **OPTIONS).images, usual) for pipe in (fused, plain)) >= gate
        assert not any("control" in part or part.startswith("image") for part in fused.engines), "opened too early"
        for title, variants in (("ControlNet", VARIANTS), ("IP-Adapter", ADAPTED)):
            figures[title] = {}
            for label, variant in variants.items():
                expected = expect(theirs, variant)
                assert psnr(expected[:1], usual) < gate, f"{label} makes no difference"
                asked = {**OPTIONS, **variant.ours, "control": variant.control}
                if variant.picture is not None:
                    asked |= {"ip_adapter_image": EDGES, "ip_adapter_scale": variant.picture}
                drawn = [pipe("a red apple", **asked).images for pipe in (fused, plain)]
                figures[title][label] = min(psnr(each, expected) for each in drawn)
    for title, found in figures.items():
        print(title, models, {label: round(figure, 1) for label, figure in found.items()})
        passed = f"{gate:.0f} dB or more" if min(found.values()) >= gate else "fails"
        pipeline = f"{name}{'ControlNet' if title == 'ControlNet' else ''}Pipeline"
        table_of(doc_table).hold((f"{title}, {models}", f"`{pipeline}`", ", ".join(found), passed))
        assert min(found.values()) >= gate, found
