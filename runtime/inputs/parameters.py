"""A request as the ``parameters`` text of a PNG has it."""

from __future__ import annotations

from pathlib import Path

from ..images.png import GenerationParameters
from ..request.options import OPTIONS
from ..request.request import Request


def generation_parameters(request: Request, model: str) -> GenerationParameters:
    """Make the ``parameters`` text of a PNG from a request.

    Args:
        request: The request.
        model: The model's name.
    """
    return GenerationParameters(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        steps=request.steps,
        sampler=request.sampler,
        guidance=request.guidance,
        seed=request.seed,
        width=request.width,
        height=request.height,
        model=model,
        clip_skip=request.clip_skip,
        extra=extra_parameters(request),
    )


def extra_parameters(request: Request) -> dict[str, object]:
    """Entries of that text that not every image has: options that ask for something, by their labels."""
    found: dict[str, object] = {}
    for name, option in OPTIONS.items():
        if option.title and option.used(value := getattr(request, name)):
            found[option.title] = option.kind.written(value)
    if request.ip_adapter_image is not None:
        image, scale = request.ip_adapter_image, request.ip_adapter_scale
        found["IP-Adapter"] = f"Weight: {scale:g}, Image: {image.path or image.sha256}"
    found |= {f"ControlNet {number}": each.described() for number, each in enumerate(request.control)}
    if request.loras:
        found["LoRA"] = "; ".join(f"{Path(lora.path).name} {lora.scale:g} {lora.sha256[:12]}" for lora in request.loras)
    return found
