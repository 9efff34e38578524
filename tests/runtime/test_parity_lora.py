"""Pictures with LoRAs that are put on at run time against diffusers, and the table of them in the manual.

With LATENTRT_WRITE_DOCS=1 the rows of the table are written anew from what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from latentrt.exporter.source.opening import open_source
from latentrt.runtime import Pipeline

STYLE = Path(__file__).resolve().parents[2] / "examples" / "emoji" / "lora" / "blue-ink.safetensors"
PROMPT, NEGATIVE, STEPS, GUIDANCE, SEED = "a red apple", "a green leaf", 4, 4.0, 7


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        models: First column.
        pipeline: diffusers' class.
        layouts: Functions of ``tests/lora_files.py``, each for a file; nothing is the file of the emoji model.
        scales: One for each file.
        sampler: Ours; diffusers' is the pipeline's own where it is a flow model's.
        negative: What to steer away from; None for a family that cannot.
    """

    models: str
    pipeline: str
    layouts: Sequence[str]
    scales: Sequence[float]
    sampler: str = "euler"
    negative: str | None = NEGATIVE


CASES: Mapping[str, Case] = {
    "sd1": Case("Stable Diffusion 1.x", "StableDiffusionPipeline", ("peft", "kohya"), (0.7, -0.4)),
    "sd2": Case("Stable Diffusion 2.x", "StableDiffusionPipeline", ("peft", "kohya"), (0.7, -0.4)),
    "sdxl": Case("Stable Diffusion XL", "StableDiffusionXLPipeline", ("kohya_original", "peft"), (0.6, 0.5)),
    "sd35": Case("Stable Diffusion 3.5", "StableDiffusion3Pipeline", ("peft",), (0.5,), "flow-euler"),
    "flux-dev": Case("FLUX.1 dev", "FluxPipeline", ("kohya_original", "peft"), (0.6, 0.5), "flow-euler", None),
    "emoji": Case("the emoji model", "StableDiffusionPipeline", (), (0.9,)),
}


def table_of(doc_table: Any) -> Any:
    """The table in the manual."""
    return doc_table.DocTable("parity-loras", [(case.models,) for case in CASES.values()])


@pytest.mark.heavy
@pytest.mark.parametrize("kind", CASES)
def test_the_pictures_are_diffusers(
    kind: str,
    request: pytest.FixtureRequest,
    tiny: Any,
    lora_files: Any,
    emoji_source: Path,
    tmp_path: Path,
    doc_table: Any,
) -> None:
    """One LoRA, and several with scales of their own, draw what ``load_lora_weights`` and ``set_adapters`` draw."""
    case = CASES[kind]
    path = emoji_source if kind == "emoji" else tiny.source(kind)
    bundle = request.getfixturevalue("emoji_bundle") if kind == "emoji" else tiny.bundle(kind)
    source, files = open_source(path), [STYLE]
    if case.layouts:
        files = [
            lora_files.write(getattr(lora_files, layout)(source, seed=seed), tmp_path / f"{layout}.safetensors")
            for seed, layout in enumerate(case.layouts)
        ]
    theirs = getattr(diffusers, case.pipeline).from_pretrained(path, dtype=torch.float32, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    if case.sampler == "euler":
        theirs.scheduler = diffusers.EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    for number, file in enumerate(files):
        theirs.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"lora{number}")
    side = 64 if kind == "emoji" else 32
    size = {"width": side, "height": side, **({"negative_prompt": case.negative} if case.negative else {})}
    figures, seen = [], []
    with Pipeline.load(bundle, "onnxruntime") as ours:
        options = {"steps": STEPS, "guidance": GUIDANCE, "sampler": case.sampler, "seed": SEED, "images": 2}
        base = ours(PROMPT, **size, **options).images
        for count in range(1, len(files) + 1):
            ours.set_loras(list(zip(files[:count], case.scales, strict=False)))
            theirs.set_adapters([f"lora{number}" for number in range(count)], list(case.scales[:count]))
            drawn = theirs(
                PROMPT,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                num_images_per_prompt=2,
                generator=torch.Generator().manual_seed(SEED),
                output_type="np",
                **size,
            ).images
            expected = np.round(drawn * 255).astype(np.uint8)
            figures.append(doc_table.psnr(ours(PROMPT, **size, **options).images, expected))
            for other in [base, *seen]:
                assert doc_table.psnr(other, expected) < doc_table.GATE, "a LoRA that makes no difference"
            seen.append(expected)
    print(case.models, [round(figure, 1) for figure in figures])
    passed = min(figures) >= doc_table.GATE
    layouts = ", ".join(layout.replace("_original", ", original blocks") for layout in case.layouts)
    together, verdict = "one, both" if len(files) > 1 else "one", f"{doc_table.GATE:.0f} dB or more"
    row = (case.models, f"`{case.pipeline}`", layouts or "PEFT (as shipped)", together, verdict if passed else "fails")
    table_of(doc_table).hold(row)
    assert passed, figures


@pytest.mark.heavy
def test_the_style_that_ships_draws_in_blue_ink(emoji_bundle: Path) -> None:
    """What is red becomes blue the more the higher the scale, at nearly the same brightness."""
    options: dict[str, Any] = {"steps": 8, "guidance": GUIDANCE, "seed": SEED, "images": 2}
    redness, brightness = [], []
    with Pipeline.load(emoji_bundle, "onnxruntime") as pipe:
        for scale in (0.0, 0.5, 1.0):
            pipe.set_loras([(STYLE, scale)])
            pixels = pipe(PROMPT, **options).images.astype(float)
            redness.append((pixels[..., 0] - pixels[..., 2]).mean())
            brightness.append((pixels @ [0.299, 0.587, 0.114]).mean())
    assert redness[0] > 100 > redness[1] > 0 > redness[2]
    assert np.ptp(brightness) < 25
    assert STYLE.stat().st_size < 300_000
