"""Steps in which ControlNets steer: shared calls, other engines, a state on a device, and sums that begin at zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from latentrt.engines import FakeEngine, TensorSpec
from latentrt.engines.errors import BundleError
from latentrt.runtime import Bundle, Pipeline
from latentrt.runtime.denoising.controlnets import ControlledStepper
from latentrt.runtime.denoising.fused import FusedLoop

PICTURE = np.random.default_rng(3).integers(0, 256, (24, 48, 3), dtype=np.uint8)


OPTIONS: dict[str, Any] = {"width": 48, "height": 24, "steps": 3, "seed": 7, "sampler": "euler", "guidance": 4.0}


EDGES = {"name": "edges", "image": PICTURE}


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
