"""A request in the text of a PNG: its own values, the options that it uses, and what steered it."""

from __future__ import annotations

from latentrt.runtime.images.reading import PictureRecord
from latentrt.runtime.inputs.parameters import extra_parameters, generation_parameters
from latentrt.runtime.lora.reading import AppliedLora
from latentrt.runtime.request.control import Control
from latentrt.runtime.request.request import Request

BASE = ("a red apple", "blurry", 20, 7.5, 7, "euler", 64, 48, 1, 0)


def test_a_plain_request_has_nothing_more() -> None:
    """Its values stand in the text, and no option that it does not use."""
    found = generation_parameters(Request(*BASE), "emoji")
    assert (found.prompt, found.negative_prompt, found.steps, found.sampler) == ("a red apple", "blurry", 20, "euler")
    assert (found.guidance, found.seed, found.width, found.height, found.model) == (7.5, 7, 64, 48, "emoji")
    assert found.extra == {}


def test_used_options_have_their_labels() -> None:
    """Options stand under their titles, as their kinds write them."""
    found = extra_parameters(Request(*BASE, guidance_rescale=0.7, guess_mode=True, prompt_2="a leaf"))
    assert {name: str(value) for name, value in found.items()} == {
        "Guidance rescale": "0.7",
        "Guess mode": "True",
        "Prompt 2": "a leaf",
    }


def test_what_steers_is_named_with_its_weight() -> None:
    """An image goes by its path, or by its hash where it has none; a LoRA by its file, its scale and its hash."""
    request = Request(
        *BASE,
        control=(Control(PictureRecord("c" * 64), "edges", 0.5), Control(PictureRecord("d" * 64, "d.png"), "depth")),
        ip_adapter_image=PictureRecord("e" * 64, "e.png"),
        ip_adapter_scale=0.25,
        loras=(AppliedLora("/somewhere/style.safetensors", "f" * 64, 0.8),),
    )
    found = extra_parameters(request)
    assert found["IP-Adapter"] == "Weight: 0.25, Image: e.png"
    assert found["ControlNet 0"] == (
        f"Model: edges, Weight: 0.5, Guidance Start: 0.0, Guidance End: 1.0, Image: {'c' * 64}"
    )
    assert str(found["ControlNet 1"]).endswith("Image: d.png")
    assert found["LoRA"] == f"style.safetensors 0.8 {'f' * 12}"
