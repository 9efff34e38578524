"""The pipeline: the loop around engines that are plain functions, and threads on real ones.

Pictures against diffusers are in test_parity_diffusers.py.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import latentrt.runtime
from latentrt.engines import Array, FakeEngine, TensorSpec
from latentrt.engines.errors import (
    BundleError,
    EngineClosedError,
    EngineError,
    EngineUnavailableError,
    InvalidRequestError,
    LatentRTError,
)
from latentrt.engines.trt.cuda import CudaDevice
from latentrt.runtime import Bundle, Pipeline, Result, StepInfo
from latentrt.runtime.components import engine_choice
from latentrt.runtime.components import opening as module
from latentrt.runtime.components.engine_choice import EngineSettings, FixedSize
from latentrt.runtime.samplers import compile_plan, run_plan

Function = Callable[[Mapping[str, Array]], Mapping[str, Array]]


# --- a model of plain functions: every output row depends on that row's inputs alone


def encode(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """A state for each token that tells the prompts apart."""
    ids = feeds["input_ids"]
    states = np.sin(ids[..., None] * np.arange(1, 33, dtype=np.float32) / 10).astype(np.float32)
    return {"last_hidden_state": states, "penultimate_hidden_state": states / 2}


def denoise(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """A prediction that depends on sample, timestep and prompt."""
    prompt = feeds["encoder_hidden_states"].mean(axis=(1, 2), dtype=np.float32)
    time_part = feeds["timestep"] / np.float32(1000)
    return {"out_sample": np.tanh(feeds["sample"] * np.float32(0.3) + (prompt + time_part)[:, None, None, None])}


def decode(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Three of the channels, each element as 2x2 pixels."""
    return {"sample": feeds["latent_sample"][:, :3].repeat(2, axis=2).repeat(2, axis=3)}


def fakes(text: Function = encode, unet: Function = denoise, vae: Function = decode) -> dict[str, FakeEngine]:
    states, latents = ("batch", "sequence", 32), ("batch", 4, "height", "width")
    return {
        "text_encoder": FakeEngine(
            [TensorSpec("input_ids", "int64", ("batch", "sequence"))],
            [TensorSpec(name, "float32", states) for name in ("last_hidden_state", "penultimate_hidden_state")],
            text,
        ).open(),
        "unet": FakeEngine(
            [
                TensorSpec("sample", "float32", latents),
                TensorSpec("timestep", "float32", ("batch",)),
                TensorSpec("encoder_hidden_states", "float32", states),
            ],
            [TensorSpec("out_sample", "float32", latents)],
            unet,
        ).open(),
        "vae_decoder": FakeEngine(
            [TensorSpec("latent_sample", "float32", latents)],
            [TensorSpec("sample", "float32", ("batch", 3, "h", "w"))],
            vae,
        ).open(),
    }


@pytest.fixture(scope="module")
def bundle(tiny_bundles: dict[str, Path]) -> Bundle:
    """The tiny SD 1.x bundle: latents of 4 channels at half the picture's size."""
    return Bundle.open(tiny_bundles["sd1"])


@pytest.fixture
def engines() -> dict[str, FakeEngine]:
    return fakes()


@pytest.fixture
def pipe(bundle: Bundle, engines: dict[str, FakeEngine]) -> Pipeline:
    return Pipeline(bundle, engines)


@pytest.fixture(scope="module")
def real(tiny_bundles: dict[str, Path]) -> Iterator[Pipeline]:
    """A pipeline on ONNX Runtime."""
    with Pipeline.load(tiny_bundles["sd1"], "onnxruntime", threads=1) as opened:
        yield opened


def finish(stream: Any) -> tuple[list[StepInfo], Result]:
    """All steps of a stream, and its result."""
    steps = []
    while True:
        try:
            steps.append(next(stream))
        except StopIteration as stop:
            return steps, stop.value


# --- the stream


@pytest.mark.parametrize("sampler", ["euler", "dpmpp-2m", "heun"])
def test_a_stream_yields_after_every_model_call(
    pipe: Pipeline, engines: dict[str, FakeEngine], sampler: str, bundle: Bundle
) -> None:
    """Index, total and timestep are the plan's; the last latents are the result's."""
    steps, result = finish(pipe.stream("a red apple", steps=4, seed=1, sampler=sampler))
    plan = compile_plan(sampler, bundle.manifest.scheduler, 4)
    assert [step.index for step in steps] == list(range(len(plan)))
    assert {step.total for step in steps} == {len(plan)} == {len(engines["unet"].calls)}
    assert [step.timestep for step in steps] == plan.timesteps.tolist()
    assert [call["timestep"][0] for call in engines["unet"].calls] == plan.timesteps.astype(np.float32).tolist()
    assert all(step.latents.dtype == np.float32 and step.latents.shape == (1, 4, 16, 16) for step in steps)
    np.testing.assert_array_equal(steps[-1].latents, result.latents)
    assert [step.elapsed for step in steps] == result.timings.step


def test_a_steps_latents_are_the_callers(pipe: Pipeline) -> None:
    """Whatever a caller does to the latents of a step, the picture stays the same."""
    expected = pipe("a red apple", steps=3, seed=1).images
    stream = pipe.stream("a red apple", steps=3, seed=1)
    try:
        while True:
            next(stream).latents[:] = np.nan
    except StopIteration as stop:
        np.testing.assert_array_equal(stop.value.images, expected)


def test_a_preview_is_a_decoded_step(pipe: Pipeline) -> None:
    """decode takes what a step yields; the last preview is the picture."""
    steps, result = finish(pipe.stream("a red apple", steps=3, seed=1))
    assert pipe.decode(steps[0].latents).shape == (1, 32, 32, 3)
    np.testing.assert_array_equal(pipe.decode(steps[-1].latents), result.images)


def test_nothing_runs_before_the_first_next(pipe: Pipeline, engines: dict[str, FakeEngine]) -> None:
    """Making a stream checks the request and calls no engine."""
    pipe.stream("a red apple")
    assert all(engine.calls == [] for engine in engines.values())


def test_closing_a_stream_cancels_the_request(pipe: Pipeline, engines: dict[str, FakeEngine]) -> None:
    """After close no engine is called again, and the pipeline goes on serving."""
    stream = pipe.stream("a red apple", steps=10)
    next(stream)
    next(stream)
    stream.close()
    assert len(engines["unet"].calls) == 2
    assert engines["vae_decoder"].calls == []
    with pytest.raises(StopIteration):
        next(stream)
    assert pipe("a red apple", steps=2).images.shape == (1, 32, 32, 3)


def test_two_streams_interleave(pipe: Pipeline) -> None:
    """Streams that take turns give what each gives alone."""
    options: list[dict[str, Any]] = [
        {"prompt": "a red apple", "seed": 1, "sampler": "euler-a", "steps": 4},
        {"prompt": "a rocket", "seed": 2, "sampler": "dpmpp-2m", "steps": 4, "images": 2, "width": 48},
    ]
    alone = [pipe(**each) for each in options]
    streams = [pipe.stream(**each) for each in options]
    for _ in range(4):
        for stream in streams:
            next(stream)
    for stream, expected in zip(streams, alone, strict=True):
        _, result = finish(stream)
        np.testing.assert_array_equal(result.images, expected.images)


# --- guidance, noise, results


@pytest.mark.parametrize("guidance", [0, 0.5, 1, 1.0])
def test_without_guidance_the_unconditional_half_is_not_run(
    pipe: Pipeline, engines: dict[str, FakeEngine], guidance: float
) -> None:
    """Text encoder and denoiser see the prompt's rows alone."""
    pipe("a red apple", negative_prompt="blurry", guidance=guidance, steps=2, images=3, sampler="euler")
    assert [len(call["input_ids"]) for call in engines["text_encoder"].calls] == [1]
    assert [len(call["sample"]) for call in engines["unet"].calls] == [3, 3]


def test_with_guidance_the_unconditional_rows_come_first(pipe: Pipeline, engines: dict[str, FakeEngine]) -> None:
    """Both halves run in one call, on the same latents, each picture with its own prompt rows."""
    pipe("a red apple", negative_prompt="blurry", guidance=4, steps=2, images=3)
    ids = np.concatenate([call["input_ids"] for call in engines["text_encoder"].calls])
    np.testing.assert_array_equal(
        ids, [pipe.tokenizers["tokenizer"].encode(text) for text in ("blurry", "a red apple")]
    )
    states = encode({"input_ids": ids})["last_hidden_state"]
    for call in engines["unet"].calls:
        np.testing.assert_array_equal(call["sample"][:3], call["sample"][3:])
        np.testing.assert_array_equal(call["encoder_hidden_states"], states[[0, 0, 0, 1, 1, 1]])


def test_outside_its_part_of_the_run_guidance_is_not_run(pipe: Pipeline, engines: dict[str, FakeEngine]) -> None:
    """Before guidance_start and from guidance_end on, the denoiser sees the conditional rows alone."""
    options = {"guidance_start": 0.25, "guidance_end": 0.75, "guidance": 4}
    pipe("a red apple", negative_prompt="blurry", steps=4, images=2, sampler="euler", **options)
    calls = engines["unet"].calls
    assert [len(call["sample"]) for call in calls] == [2, 4, 4, 2]
    np.testing.assert_array_equal(calls[0]["encoder_hidden_states"], calls[1]["encoder_hidden_states"][2:])


@pytest.mark.parametrize("sampler", ["euler", "euler-a", "dpmpp-2m", "ddpm"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("images", [1, 3])
def test_the_loop_is_the_plan_on_torchs_noise(
    pipe: Pipeline, bundle: Bundle, sampler: str, guidance: float, images: int
) -> None:
    """All noise comes from one stream of PyTorch's generator; guidance extrapolates from the unconditional half."""
    result = pipe("a red apple", seed=7, sampler=sampler, guidance=guidance, steps=4, images=images, width=40)
    generator = torch.Generator("cpu").manual_seed(7)

    def noise() -> Any:
        return torch.randn((images, 4, 16, 20), generator=generator).numpy()

    def model(x: Any, t: float) -> Any:
        def half(text: str) -> Any:
            states = encode({"input_ids": pipe.tokenizers["tokenizer"].encode(text)[None]})["last_hidden_state"]
            timestep = np.full(images, t, np.float32)
            repeated = states.repeat(images, axis=0)
            return denoise({"sample": x, "timestep": timestep, "encoder_hidden_states": repeated})["out_sample"]

        return half("") + guidance * (half("a red apple") - half(""))

    plan = compile_plan(sampler, bundle.manifest.scheduler, 4)
    np.testing.assert_allclose(result.latents, run_plan(plan, noise(), model, noise), atol=1e-4)


def test_clip_skip_takes_the_layer_before(pipe: Pipeline, engines: dict[str, FakeEngine]) -> None:
    """At 1 the prompt's states are the penultimate ones; as in diffusers, the negative prompt's stay the last."""
    for clip_skip in (0, 1):
        pipe("a red apple", steps=1, clip_skip=clip_skip, sampler="euler", guidance=4)
    zero, one = (call["encoder_hidden_states"] for call in engines["unet"].calls)
    np.testing.assert_array_equal(one, zero / [[[1]], [[2]]])


def test_the_same_seed_gives_the_same_picture(pipe: Pipeline) -> None:
    """A request repeated from its result is the same bit for bit, another seed's is another."""
    first = pipe("a red apple", steps=2)
    assert first.request.seed != 1
    again = pipe("a red apple", steps=2, seed=first.request.seed)
    np.testing.assert_array_equal(first.images, again.images)
    assert not np.array_equal(pipe("a red apple", steps=2, seed=1).images, first.images)


def test_a_result_says_all(pipe: Pipeline) -> None:
    """Images, latents, request and timings have the documented shapes and types."""
    result = pipe("a red apple", steps=3, images=2, width=48, height=24, seed=5, sampler="euler", guidance=2)
    assert (result.images.dtype, result.images.shape) == (np.uint8, (2, 24, 48, 3))
    assert (result.latents.dtype, result.latents.shape) == (np.float32, (2, 4, 12, 24))
    assert result.images.flags.c_contiguous
    request = result.request
    assert (request.prompt, request.negative_prompt, request.seed, request.steps) == ("a red apple", "", 5, 3)
    assert (request.width, request.height, request.images, request.guidance) == (48, 24, 2, 2.0)
    assert result.truncated == 0
    timings = result.timings
    assert len(timings.step) == 3
    parts = [timings.text_encoder, timings.prompt, timings.schedule, *timings.step, timings.vae_decoder]
    assert min(parts) >= 0
    assert timings.total == pytest.approx(sum(parts), abs=1e-9)


def test_timings_are_of_the_work_alone(bundle: Bundle) -> None:
    """Each stage's time is spent in its engine; what the caller does between steps is not counted."""

    def slow(function: Function) -> Function:
        def wait(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
            time.sleep(0.02)
            return function(feeds)

        return wait

    stream = Pipeline(bundle, fakes(slow(encode), slow(denoise), slow(decode))).stream("a red apple", steps=2)
    for _ in range(2):
        next(stream)
        time.sleep(0.3)
    timings = finish(stream)[1].timings
    assert min(timings.text_encoder, timings.vae_decoder, *timings.step) >= 0.02
    assert 0.08 <= timings.total < 0.5


def test_pixels_are_rounded_and_clipped(bundle: Bundle) -> None:
    """-1 to 1 becomes 0 to 255, half to even as diffusers rounds, everything outside is clipped."""
    values = np.array([-7, -1, -1 + 2 / 255, 0, 0.5, 1 - 2 / 255, 1, 9], np.float32)

    def constant(feeds: Mapping[str, Array]) -> dict[str, Array]:
        return {"sample": np.broadcast_to(values, (1, 3, 1, 8))}

    pixels = Pipeline(bundle, fakes(vae=constant)).decode(np.zeros((1, 4, 1, 1), np.float32))
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 1, 128, 191, 254, 255, 255]


def test_latents_are_unscaled_before_decoding(pipe: Pipeline, engines: dict[str, FakeEngine], bundle: Bundle) -> None:
    """The decoder gets latents divided by the bundle's scaling factor."""
    pipe.decode(np.ones((1, 4, 2, 2), np.float32))
    np.testing.assert_allclose(
        engines["vae_decoder"].calls[0]["latent_sample"], 1 / bundle.manifest.latent.scaling, rtol=1e-6
    )


# --- prompts


def test_odd_prompts_draw(pipe: Pipeline) -> None:
    """Empty, blank, control and emoji prompts all give a picture, and none is cut off."""
    for prompt in ("", " ", "\n", "a\0b", "\N{RED APPLE}\N{VARIATION SELECTOR-16}", "\u202eabc"):
        result = pipe(prompt, steps=1)
        assert result.images.shape == (1, 32, 32, 3)
        assert result.truncated == 0


def test_a_long_prompt_is_cut_off_and_says_so(pipe: Pipeline) -> None:
    """100 kB draw; what did not fit is counted, for the negative prompt as well where it is used."""
    long = "a red apple, " * 8000
    result = pipe(long, steps=1, guidance=4)
    excess = pipe.tokenizers["tokenizer"].count(long) - 77
    assert excess > 30_000
    assert result.truncated == excess
    assert pipe(long, negative_prompt=long, steps=1, guidance=4).truncated == 2 * excess
    assert pipe(long, negative_prompt=long, steps=1, guidance=1).truncated == excess


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("a", {"steps": 0}, "steps is 0"),
        ("a", {"width": 33}, "width is 33, expected a multiple of 2; the nearest are 32 and 34"),
        ("a", {"sampler": "magic"}, "unknown sampler 'magic'"),
        ("a", {"sampler": "flow-euler"}, "sampler 'flow-euler' cannot run from the config of 'PNDMScheduler'"),
        ("a", {"cfg": 3, "step": 4}, "unknown option 'cfg'; known options: negative_prompt, steps, guidance"),
        ("a\ud800", {}, "prompt has a lone surrogate at position 1"),
        ("a", {"negative_prompt": "\udfff"}, "prompt has a lone surrogate at position 0"),
        ("a" * 2_000_000, {}, "expected at most 1000000; shorten it"),
        (3, {}, "prompt is a int, expected a string"),
    ],
)
def test_a_wrong_request_is_refused_at_once(
    pipe: Pipeline, engines: dict[str, FakeEngine], prompt: Any, options: dict[str, Any], message: str
) -> None:
    """stream itself raises, before its first step and before any engine is called."""
    with pytest.raises(InvalidRequestError, match=message):
        pipe.stream(prompt, **options)
    assert all(engine.calls == [] for engine in engines.values())


# --- faults


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_an_engine_that_fails_leaves_the_pipeline_usable(bundle: Bundle, component: str) -> None:
    """Its error reaches the caller as it is; the next request draws what it always draws."""
    expected = Pipeline(bundle, fakes())("a red apple", steps=3, seed=1).images
    failure = EngineError(f"{component} failed: out of memory")
    fault = [failure]
    functions: dict[str, Function] = {"text_encoder": encode, "unet": denoise, "vae_decoder": decode}
    working = functions[component]

    def fail_once(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        if fault:
            raise fault.pop()
        return working(feeds)

    pipe = Pipeline(bundle, fakes(*(functions | {component: fail_once}).values()))
    with pytest.raises(EngineError) as caught:
        pipe("a red apple", steps=3, seed=1)
    assert caught.value is failure
    np.testing.assert_array_equal(pipe("a red apple", steps=3, seed=1).images, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder"])
def test_values_that_are_not_finite_are_an_error(bundle: Bundle, component: str, value: float) -> None:
    """One NaN or infinity names the engine that computed it, instead of ending in a black picture."""
    functions: dict[str, Function] = {"text_encoder": encode, "unet": denoise, "vae_decoder": decode}
    sound = functions[component]

    def poison(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = dict(sound(feeds))
        for array in outputs.values():
            array[-1, -1, -1] = value
        return outputs

    engines = fakes(*(functions | {component: poison}).values())
    with pytest.raises(EngineError, match=f"^{component} computed values that are not finite .*precision fp32"):
        Pipeline(bundle, engines)("a red apple", steps=3, sampler="euler")
    assert len(engines["unet"].calls) == {"text_encoder": 0, "unet": 1, "vae_decoder": 3}[component]


def test_a_closed_pipeline_says_so(bundle: Bundle) -> None:
    """Closing closes every engine, twice does nothing, and a request is told the way out."""
    engines = fakes()
    with Pipeline(bundle, engines) as pipe:
        stream = pipe.stream("a red apple", steps=3)
        next(stream)
    pipe.close()
    for engine in engines.values():
        with pytest.raises(EngineClosedError):
            engine.run({})
    with pytest.raises(EngineClosedError, match=r"the pipeline is closed; load the bundle again with Pipeline\.load"):
        pipe("a red apple")
    with pytest.raises(EngineClosedError):
        next(stream)


# --- loading


def test_a_load_that_fails_closes_what_was_opened(tiny_bundles: dict[str, Path], monkeypatch: Any) -> None:
    """If the last engine does not open, the others do not stay open."""
    made = fakes()
    for engine in made.values():
        engine.close()

    def refuse() -> Any:
        raise EngineUnavailableError("no device")

    monkeypatch.setattr(made["vae_decoder"], "_open", refuse)
    monkeypatch.setattr(module, "make_engine", lambda bundle, component, settings: made[component])
    with pytest.raises(EngineUnavailableError, match="no device"):
        Pipeline.load(tiny_bundles["sd1"], loop="plain")
    for engine in made.values():
        with pytest.raises(EngineClosedError):
            engine.run({})


def test_auto_goes_on_where_an_engine_does_not_start(tiny_bundles: dict[str, Path], monkeypatch: Any) -> None:
    """An engine that looked fine and does not open is passed over with its reason; a named one is an error."""
    real, asked = module.make_engine, []

    def make(bundle: Bundle, component: str, settings: EngineSettings) -> Any:
        asked.append((settings.name, component))
        engine: Any = real(bundle, component, dataclasses.replace(settings, name="onnxruntime"))
        if settings.name == "onnxruntime-cuda" and component == "vae_decoder":

            def refuse() -> Any:
                raise EngineUnavailableError("ONNX Runtime could not start CUDAExecutionProvider")

            monkeypatch.setattr(engine, "_open", refuse)
        return engine

    monkeypatch.setattr(module, "make_engine", make)
    monkeypatch.setattr(engine_choice, "cuda_devices", lambda: (CudaDevice("NVIDIA Test", "sm_90"),))
    monkeypatch.setattr(engine_choice, "check_engine", lambda name, precision: None)
    with Pipeline.load(tiny_bundles["sd1"], loop="plain") as pipe:
        choice = pipe.engine_choice
        assert choice.name == "onnxruntime"
        assert choice.passed_over["onnxruntime-cuda"] == "ONNX Runtime could not start CUDAExecutionProvider"
    assert [name for name, _ in asked] == ["onnxruntime-cuda"] * 3 + ["onnxruntime"] * 3
    with pytest.raises(EngineUnavailableError, match="could not start"):
        Pipeline.load(tiny_bundles["sd1"], "onnxruntime-cuda", loop="plain")


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a bundle's manifest."""
    manifest = json.loads((bundle / "bundle.json").read_text())
    change(manifest)
    (bundle / "bundle.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["components"].pop("vae_decoder"), "the bundle has no vae_decoder; it has "),
        (lambda m: m["tokenizers"].pop("tokenizer"), "has no tokenizer named 'tokenizer'"),
        (lambda m: m["components"]["unet_step"]["graphs"].clear(), "no graph of unet_step"),
    ],
)
def test_a_bundle_that_lacks_a_part(tiny_bundle: Path, change: Callable[[Any], None], message: str) -> None:
    """The sentence names what is missing."""
    rewrite(tiny_bundle, change)
    with pytest.raises(BundleError, match=message):
        Pipeline.load(tiny_bundle)


def test_a_graph_that_lacks_an_output(bundle: Bundle) -> None:
    """A text encoder without penultimate states is named when they are asked for, and serves otherwise."""
    whole = fakes()
    (states, _), inputs = whole["text_encoder"].outputs.values(), whole["text_encoder"].inputs.values()
    last = FakeEngine(inputs, [states], lambda feeds: {states.name: encode(feeds)[states.name]}).open()
    pipe = Pipeline(bundle, {**whole, "text_encoder": last})
    assert pipe("a red apple", steps=1).images.shape == (1, 32, 32, 3)
    with pytest.raises(BundleError, match="text_encoder has no output 'penultimate_hidden_state'; it has last_hidden"):
        pipe("a red apple", steps=1, clip_skip=1)


# --- real engines


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_picture_from_a_bundle(tiny_bundles: dict[str, Path], kind: str) -> None:
    """Epsilon and v models draw through ONNX Runtime: the same picture every time, not a flat one."""
    with Pipeline.load(tiny_bundles[kind], "onnxruntime") as pipe:
        first = pipe("a red apple", steps=3, seed=7, images=2)
        again = pipe("a red apple", steps=3, seed=7, images=2)
    assert first.images.shape == (2, 32, 32, 3)
    assert len(np.unique(first.images)) > 16
    np.testing.assert_array_equal(first.images, again.images)


@pytest.mark.parametrize("loop", ["fused", "plain"])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_openvino_draws_what_onnx_runtime_draws(tiny_bundles: dict[str, Path], kind: str, loop: str) -> None:
    """Two engines that share no code agree on a whole run, with either loop."""
    options: dict[str, Any] = {"steps": 4, "seed": 7, "images": 2, "guidance": 4, "width": 48}
    bundle = tiny_bundles[kind]
    with Pipeline.load(bundle, "openvino", loop=loop) as one, Pipeline.load(bundle, "onnxruntime", loop=loop) as other:
        received, expected = one("a red apple", **options), other("a red apple", **options)
    np.testing.assert_allclose(received.latents, expected.latents, atol=1e-3)
    assert int(np.abs(received.images.astype(int) - expected.images).max()) <= 1


def test_a_pipeline_of_one_size(tiny_bundles: dict[str, Path]) -> None:
    """It draws that size without being told, refuses others before anything runs, and takes runs one after another."""
    with Pipeline.load(tiny_bundles["sd1"], "openvino", fixed_size=(48, None, 2)) as pipe:
        assert (pipe.fixed_size, pipe.engine_choice.name) == (FixedSize(48, 32, 2), "openvino")
        drawn = pipe("a red apple", steps=2, seed=7)
        assert drawn.images.shape == (2, 32, 48, 3)
        halves = pipe("a red apple", steps=2, seed=7, guidance=4, guidance_end=0.5, images=2, width=48)
        assert halves.images.shape == (2, 32, 48, 3)
        for options, message in (
            ({"width": 32}, "width is 32, and this pipeline was loaded for 48 alone"),
            ({"images": 1}, "images is 1, and this pipeline was loaded for 2 alone"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                pipe("a red apple", **options)
        runs = [pipe.start("a red apple", steps=2), pipe.start("a leaf", steps=2)]
        pipe.advance(runs)
        assert [run.index for run in runs] == [1, 1]
        assert len(pipe.batch(["a red apple", "a leaf"], steps=1)) == 2
    with Pipeline.load(tiny_bundles["sd1"], "onnxruntime") as other:
        expected = other("a red apple", steps=2, seed=7, images=2, width=48)
    np.testing.assert_allclose(drawn.latents, expected.latents, atol=1e-3)
    with pytest.raises(InvalidRequestError, match="width is 31, expected a multiple of"):
        Pipeline.load(tiny_bundles["sd1"], fixed_size=(31, None, None))


def test_many_threads_share_one_pipeline(real: Pipeline) -> None:
    """Eight threads with requests of their own draw bit for bit what one after the other draws."""
    requests: list[dict[str, Any]] = [
        {
            "prompt": f"a red apple {i}",
            "seed": i,
            "steps": 2 + i % 3,
            "images": 1 + i % 2,
            "width": 32 + 16 * (i % 3),
            "sampler": ("euler", "euler-a", "dpmpp-2m", "ddim")[i % 4],
            "guidance": (1.0, 4.0)[i % 2],
        }
        for i in range(8)
    ]
    serial = [real(**options) for options in requests]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda options: real(**options), requests))
    for one, other in zip(serial, parallel, strict=True):
        np.testing.assert_array_equal(one.latents, other.latents)
        np.testing.assert_array_equal(one.images, other.images)


def test_a_batch_holds_what_single_pictures_hold(real: Pipeline) -> None:
    """Pictures of one request do not influence each other: the first is the single picture of that seed."""
    batch = real("a red apple", steps=3, seed=7, images=3, sampler="euler")
    single = real("a red apple", steps=3, seed=7, images=1, sampler="euler")
    np.testing.assert_allclose(batch.latents[:1], single.latents, atol=1e-4)


def test_extreme_guidance_ends_in_a_picture_or_a_sentence(real: Pipeline) -> None:
    """At the largest guidance scale nothing but our own error escapes."""
    try:
        result = real("a red apple", steps=4, guidance=1000)
    except LatentRTError as error:
        assert "not finite" in str(error)  # noqa: PT017
    else:
        assert np.isfinite(result.latents).all()


def test_public_names_resolve() -> None:
    """Every listed name is there, and another one is an AttributeError."""
    for name in latentrt.runtime.__all__:
        assert getattr(latentrt.runtime, name) is not None
    with pytest.raises(AttributeError, match=r"'latentrt\.runtime' has no attribute 'Nothing'"):
        _ = latentrt.runtime.Nothing  # type: ignore[attr-defined]
