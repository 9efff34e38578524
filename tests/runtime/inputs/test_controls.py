"""Options of ControlNets, runs that share calls, and what stays on a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from latentrt.engines import FakeEngine, TensorSpec
from latentrt.engines.errors import BundleError, InvalidRequestError
from latentrt.runtime import Bundle, Control, Pipeline
from latentrt.runtime.abilities import abilities
from latentrt.runtime.bundle.manifest import Component
from latentrt.runtime.cli import main
from latentrt.runtime.denoising.controlnets import ControlledStepper
from latentrt.runtime.denoising.fused import FusedLoop
from latentrt.runtime.images.clip_vision import clip_pixels
from latentrt.runtime.inputs.controls import take_controls
from latentrt.runtime.inputs.create import create_request
from latentrt.runtime.inputs.image_prompt import take_image_prompt
from latentrt.runtime.request.control import control_image

PICTURE = np.random.default_rng(3).integers(0, 256, (24, 48, 3), dtype=np.uint8)
OPTIONS: dict[str, Any] = {"width": 48, "height": 24, "steps": 3, "seed": 7, "sampler": "euler", "guidance": 4.0}
EDGES = {"name": "edges", "image": PICTURE}


class Manifest:
    """Of a manifest what options of ControlNets need."""

    def __init__(self, *names: str) -> None:
        parts = [part for name in names for part in (f"controlnet_{name}", f"controlnet_{name}_image")]
        self.components = {part: Component(part, {}) for part in ("unet", "unet_control", *parts)}


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ("edges", "control is a str"),
        ([3], r"control\[0\] is a int"),
        ({"name": "edges"}, "has no image"),
        ({**EDGES, "weight": 1}, "unknown entry 'weight'"),
        ({**EDGES, "name": "pose"}, "names 'pose', but the bundle's ControlNets are edges, depth"),
        ({"image": PICTURE}, "names no ControlNet"),
        ({**EDGES, "scale": float("nan")}, "scale is nan"),
        ({**EDGES, "scale": -1}, "scale is -1"),
        ({**EDGES, "scale": "1"}, "scale is '1', expected a number"),
        ({**EDGES, "start": 0.5, "end": 0.5}, "start is 0.5"),
        ([EDGES, EDGES], "names 'edges' twice"),
        ([EDGES] * 9, "has 9 entries"),
        ({**EDGES, "image": b"no picture"}, r"cannot read control\[0\].image"),
        ({**EDGES, "image": "nowhere.png"}, "nowhere.png"),
        ({**EDGES, "image": np.full((4, 4, 3), np.nan)}, r"control\[0\].image"),
    ],
)
def test_wrong_controls_are_refused(control: Any, message: str) -> None:
    """What cannot be done is refused in one sentence that names the entry."""
    with pytest.raises(InvalidRequestError, match=message):
        take_controls({"control": control}, Manifest("edges", "depth"))  # type: ignore[arg-type]


def test_a_bundle_without_controlnets_says_how_to_get_one(tiny_bundles: dict[str, Path]) -> None:
    """The message names the option of build-engine; guess mode alone is refused too."""
    manifest = Bundle.open(tiny_bundles["sd1"]).manifest
    with pytest.raises(InvalidRequestError, match="--controlnet NAME=DIR"):
        take_controls({"control": EDGES}, manifest)
    assert take_controls({"control": None, "steps": 3}, manifest) == ({"steps": 3}, ())
    assert take_controls({"control": []}, manifest) == ({}, ())


def test_the_only_controlnet_needs_no_name() -> None:
    """Names, defaults and a picture's hash are filled in."""
    rest, pictures = take_controls({"control": Control(PICTURE)}, Manifest("edges"))  # type: ignore[arg-type]
    (control,) = rest["control"]
    assert (control.name, control.scale, control.start, control.end) == ("edges", 1.0, 0.0, 1.0)
    assert len(control.image.sha256) == 64
    np.testing.assert_array_equal(pictures[0], PICTURE)


def test_a_control_image_is_resized_as_pillow_does() -> None:
    """Values go from 0 to 1; a picture of the right size is not touched."""
    image = control_image(PICTURE, 48, 24)
    assert (image.dtype, image.shape) == (np.float32, (1, 3, 24, 48))
    np.testing.assert_array_equal(np.rint(image[0] * 255), PICTURE.transpose(2, 0, 1))
    small = np.asarray(Image.fromarray(PICTURE).resize((16, 8), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(np.rint(control_image(PICTURE, 16, 8)[0] * 255), small.transpose(2, 0, 1))


@pytest.mark.heavy
def test_requests_of_all_kinds_share_a_batch(tiny: Any) -> None:
    """Runs with one, two and no ControlNets, of a server's batch, get the pictures that they get alone."""
    asked: list[dict[str, Any]] = [
        {"control": EDGES},
        {},
        {"control": [{**EDGES, "end": 0.5}, {"name": "depth", "image": PICTURE[::-1]}], "guess_mode": True},
        {"control": {**EDGES, "scale": 0.3}, "guidance": 1.0, "images": 2},
    ]
    with Pipeline.load(tiny.controlled("sd1"), "onnxruntime", max_batch=2) as pipe:
        alone = [pipe("a red apple", **OPTIONS | each).images for each in asked]
        runs = [pipe.start("a red apple", **OPTIONS | each) for each in asked]
        while not runs[0].done:
            pipe.advance(runs)
        for run, expected in zip(runs, alone, strict=True):
            assert abs(pipe.finish(run).astype(int) - expected).max() <= 1
        several = pipe.batch(["a red apple", "a rocket"], **{**OPTIONS, "seed": [7, 8], "control": EDGES})
        assert abs(several[0].images.astype(int) - alone[0]).max() <= 1
        steered, plain = alone[0], alone[1]
        again = pipe("a red apple", **OPTIONS).images
        assert (again == plain).all(), "texts in the cache are not mixed up"
        assert (steered != plain).any()
    with Pipeline.load(tiny.controlled("sd1"), "onnxruntime", low_memory=True) as pipe:
        np.testing.assert_array_equal(pipe("a red apple", **OPTIONS | asked[2]).images, alone[2])


@pytest.mark.heavy
def test_openvino_steers_as_onnx_runtime_does(tiny: Any) -> None:
    """Two ControlNets, one of them for a part of the run, and a picture in the prompt, with engines for one size."""
    both = [{**EDGES, "end": 0.7}, {"name": "depth", "image": PICTURE[::-1], "scale": 0.5}]
    options = {**OPTIONS, "control": both, "ip_adapter_image": PICTURE, "guidance_end": 0.7}
    with Pipeline.load(tiny.controlled("sd1"), "onnxruntime") as pipe:
        expected, plain = pipe("a red apple", **options).images, pipe("a red apple", **OPTIONS).images
    with Pipeline.load(tiny.controlled("sd1"), "openvino", engine_cache="off", fixed_size=(48, 24, 1)) as pipe:
        pictures = pipe("a red apple", **options).images
    assert abs(pictures.astype(int) - expected).max() <= 2
    assert abs(plain.astype(int) - expected).max() > 20


@pytest.mark.heavy
def test_steps_on_a_device_are_those_on_the_host(tiny: Any) -> None:
    """Binding what stays the same, with ControlNets that come and go, changes nothing."""
    both = [{**EDGES, "end": 0.7}, {"name": "depth", "image": PICTURE[::-1], "start": 0.3}]
    options = {**OPTIONS, "steps": 4, "control": both, "guidance_end": 0.6}
    with Pipeline.load(tiny.controlled("sd1"), "onnxruntime") as pipe:
        expected = pipe("a red apple", **options).latents
        assert isinstance(pipe.loop, FusedLoop)
        pipe.loop.on_device = True
        np.testing.assert_allclose(pipe("a red apple", **options).latents, expected, atol=1e-4)


@pytest.mark.heavy
def test_the_command_line_steers(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture with numbers behind it is taken, and told in the result and in the PNG's text."""
    Image.fromarray(PICTURE).save(tmp_path / "edges.png")
    out = tmp_path / "out.png"
    size = ["--width", "48", "--height", "24", "--steps", "2", "--seed", "7", "--engine", "onnxruntime"]
    steer = ["--control", f"edges={tmp_path / 'edges.png'}:0.8:0.1:0.9", "--guess-mode", "--json"]
    steer += ["--ip-adapter-image", str(tmp_path / "edges.png"), "--ip-adapter-scale", "0.5"]
    assert main(["generate", str(tiny.controlled("sd1")), "a red apple", "--output", str(out), *size, *steer]) == 0
    request = json.loads(capsys.readouterr().out)["request"]
    (control,) = request["control"]
    assert (control["name"], control["scale"], control["start"], control["end"]) == ("edges", 0.8, 0.1, 0.9)
    assert control["image"]["path"] == str(tmp_path / "edges.png")
    assert (request["ip_adapter_scale"], request["ip_adapter_image"]["path"]) == (0.5, str(tmp_path / "edges.png"))
    text = Image.open(out).info["parameters"]
    assert "ControlNet 0" in text
    assert "Guess mode: True" in text
    assert "IP-Adapter" in text
    assert main(["generate", str(tiny.controlled("sd1")), "a", "--output", str(out), "--control", "edges"]) == 2


def test_a_bundle_tells_what_steers(tiny: Any, tiny_bundles: dict[str, Path]) -> None:
    """ControlNets and an IP-Adapter are among its abilities."""
    told = abilities(Bundle.open(tiny.controlled("sd1")))
    assert (told["controlnets"], told["ip_adapter"]) == (["depth", "edges"], True)
    told = abilities(Bundle.open(tiny_bundles["sd1"]))
    assert (told["controlnets"], told["ip_adapter"]) == ([], False)


@pytest.mark.parametrize("size", [(71, 50), (31, 60), (33, 33), (32, 200), (5, 4)])
def test_clip_sees_what_transformers_prepares(size: tuple[int, int]) -> None:
    """Wide, high, small and square pictures agree to rounding."""
    picture = np.random.default_rng(5).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    expected = CLIPImageProcessor(size=32, crop_size=32)(Image.fromarray(picture), return_tensors="np").pixel_values
    np.testing.assert_allclose(clip_pixels(picture, 32), expected, atol=1e-5)


def test_a_picture_in_the_prompt_needs_an_adapter(tiny_bundles: dict[str, Path]) -> None:
    """A bundle without one says how to get it; a scale alone means nothing."""
    manifest = Bundle.open(tiny_bundles["sd1"]).manifest
    with pytest.raises(InvalidRequestError, match="--ip-adapter FILE --image-encoder DIR"):
        take_image_prompt({"ip_adapter_image": PICTURE}, manifest)
    with pytest.raises(InvalidRequestError, match="without ip_adapter_image"):
        create_request(manifest, "a", ip_adapter_scale=1.0)


@pytest.mark.heavy
def test_without_a_picture_an_adapter_changes_nothing(tiny: Any) -> None:
    """Pictures are bit for bit those of a scale of 0, and near those of a bundle without; scales are checked."""
    with Pipeline.load(tiny.controlled("sd1"), "onnxruntime") as pipe:
        plain = pipe("a red apple", **OPTIONS).latents
        none = pipe("a red apple", **OPTIONS, ip_adapter_image=PICTURE, ip_adapter_scale=0)
        np.testing.assert_array_equal(none.latents, plain)
        assert none.request.ip_adapter_image is not None
        assert none.request.ip_adapter_scale == 0
        with pytest.raises(InvalidRequestError, match="ip_adapter_scale is -1"):
            pipe("a red apple", **OPTIONS, ip_adapter_image=PICTURE, ip_adapter_scale=-1)
    with Pipeline.load(tiny.bundle("sd1"), "onnxruntime") as pipe:
        np.testing.assert_allclose(pipe("a red apple", **OPTIONS).latents, plain, atol=1e-4)


def test_a_pipeline_of_own_engines_names_what_is_missing(tiny: Any) -> None:
    """Engines that a caller opened are all there are."""
    bundle = Bundle.open(tiny.controlled("sd1"))
    with Pipeline.load(bundle.path, "onnxruntime") as loaded:
        pipe = Pipeline(bundle, loaded.engines)
        with pytest.raises(BundleError, match=r"controlnet_edges_\w+ is needed, and the pipeline has no engine"):
            pipe("a red apple", **OPTIONS, control=EDGES)


def test_the_first_adds_to_zeros_that_are_made_once() -> None:
    """Each level is half as high as the one before, rounded up."""
    shape = ("rows", 8, "latent_height_2", "latent_width_2")
    engine = FakeEngine([TensorSpec("sum_0", "float32", shape)], [], lambda feeds: {}).open()
    nets = ControlledStepper(lambda name: engine, (), "unet", fused=True)
    zeros = nets._made_zeros(engine, 2, (9, 16))
    assert zeros["sum_0"].shape == (2, 8, 3, 4)
    assert nets._made_zeros(engine, 2, (9, 16)) is zeros
