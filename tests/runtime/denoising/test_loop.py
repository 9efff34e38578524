"""The loop fused and plain: the same pictures, mixed batches, stages of plain functions, cancelling without a trace."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines import Array, FakeEngine, TensorSpec
from latentrt.engines.errors import BundleError, EngineError, InvalidRequestError
from latentrt.runtime import Pipeline
from latentrt.runtime.denoising.fused import FusedLoop
from latentrt.runtime.denoising.latent_preparation import start_run
from latentrt.runtime.denoising.run import Run
from latentrt.runtime.denoising.schedule_stage import TIMESTEPS_AT_ONCE
from latentrt.runtime.request.request import Request
from latentrt.runtime.samplers import SAMPLERS, compile_plan

MIX: list[dict[str, Any]] = [
    {"prompt": "a red apple", "sampler": "unipc", "steps": 6, "guidance": 4.0, "seed": 1, "images": 2},
    {"prompt": "a rocket", "sampler": "euler-a", "steps": 3, "guidance": 1.0, "seed": 2},
    {"prompt": "a green leaf", "sampler": "ddim", "steps": 4, "guidance": 7.5, "guidance_end": 0.5, "seed": 3},
    {"prompt": "a cat", "sampler": "pndm", "steps": 3, "guidance": 3.0, "guidance_rescale": 0.7, "seed": 4},
]
"""Requests with 5, 1, 1 and 4 registers; guided throughout, never, for a while, and rescaled."""


@pytest.fixture(scope="module", params=["fused", "plain"])
def pipe(request: pytest.FixtureRequest, tiny_bundles: dict[str, Path]) -> Iterator[Pipeline]:
    """The tiny SD 1.x model with either loop."""
    with Pipeline.load(tiny_bundles["sd1"], "onnxruntime", threads=1, loop=request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def both(tiny_bundles: dict[str, Path]) -> Iterator[tuple[Pipeline, Pipeline]]:
    """The tiny SD 1.x model with both loops, fused first."""
    bundle = tiny_bundles["sd1"]
    with Pipeline.load(bundle, threads=1) as fused, Pipeline.load(bundle, threads=1, loop="plain") as plain:
        yield fused, plain


def relative(received: Array, expected: Array) -> float:
    return float(np.linalg.norm(received - expected) / np.linalg.norm(expected))


# --- fused and plain


@pytest.mark.parametrize("kind", ["emoji", "sd1", "sd2"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("width", [None, 48])
def test_fused_and_plain_take_the_same_step(
    kind: str, images: int, width: int | None, emoji_bundle: Path, tiny_bundles: dict[str, Path]
) -> None:
    """One guided step, and one without guidance, agree to 1e-5."""
    bundle = {"emoji": emoji_bundle, **tiny_bundles}[kind]
    with Pipeline.load(bundle) as fused, Pipeline.load(bundle, loop="plain") as plain:
        assert (fused.loop.name, plain.loop.name) == ("fused", "plain")
        for guidance in (1.0, 5.0):
            options: dict[str, Any] = {"seed": 1, "steps": 4, "images": images, "width": width, "guidance": guidance}
            one, other = (next(pipe.stream("a red apple", **options)).latents for pipe in (fused, plain))
            assert relative(one, other) <= 1e-5


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if "flow" not in name and "edm" not in name])
def test_every_sampler_runs_fused(both: tuple[Pipeline, Pipeline], sampler: str) -> None:
    """A whole run of any sampler gives the plain loop's latents."""
    fused, plain = (
        pipe("a red apple", sampler=sampler, steps=5, guidance=4, seed=3, guidance_rescale=0.5).latents for pipe in both
    )
    assert relative(fused, plain) <= 1e-4


# --- batches of several requests


def test_a_mixed_batch_gives_each_request_its_own_picture(pipe: Pipeline) -> None:
    """Requests of different samplers, steps, guidance and pictures share calls, join late and leave early."""
    alone = [pipe(**options) for options in MIX]
    runs = [pipe.start(**options) for options in MIX[:2]]
    pipe.advance(runs)
    runs += [pipe.start(**options) for options in MIX[2:]]
    while running := [run for run in runs if not run.done]:
        pipe.advance(running)
    for run, expected in zip(runs, alone, strict=True):
        np.testing.assert_allclose(run.latents, expected.latents, atol=1e-4)
        assert int(np.abs(pipe.finish(run).astype(int) - expected.images).max()) <= 1


def test_a_batch_is_one_call(tiny_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the denoiser are those that guidance asks for: two a picture with it, one without."""
    with Pipeline.load(tiny_bundles["sd1"], threads=1) as pipe:
        step = pipe.engines["unet_step"]
        rows: list[int] = []
        run = step.run

        def count(feeds: Mapping[str, Array]) -> dict[str, Array]:
            rows.append(len(feeds["rows"]))
            return run(feeds)

        monkeypatch.setattr(step, "run", count)
        pipe.advance([pipe.start(**options) for options in MIX])
    assert rows == [2 * 2 + 1 + 2 + 2]


def test_runs_that_cannot_share_a_call(pipe: Pipeline) -> None:
    """None at all, one that is done or there twice, and other sizes are refused; nobody has moved then."""
    run, wide = pipe.start("a", steps=1, sampler="euler"), pipe.start("a", steps=2, width=48, sampler="euler")
    for runs, message in (
        ([], "no run was given"),
        ([run, run], "given twice"),
        ([run, wide], "runs of 32x32 and of 48x32 pixels cannot share a batch"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            pipe.advance(runs)
    with pytest.raises(InvalidRequestError, match="the run has taken 0 of 1 steps"):
        pipe.finish(run)
    pipe.advance([run])
    with pytest.raises(InvalidRequestError, match="is done"):
        pipe.advance([run])
    assert (run.index, wide.index) == (1, 0)


@pytest.mark.parametrize("sampler", ["euler-a", "dpmpp-2m"])
def test_a_step_that_failed_may_be_taken_again(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, sampler: str) -> None:
    """After an engine's failure the run is where it was, its noise included."""
    options: dict[str, Any] = {"sampler": sampler, "steps": 4, "seed": 1}
    expected = pipe("a red apple", **options).images
    run = pipe.start("a red apple", **options)
    pipe.advance([run])
    engine = pipe.engines["unet_step" if pipe.loop.name == "fused" else "unet"]

    def fail(feeds: Mapping[str, Array]) -> dict[str, Array]:
        raise EngineError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "run", fail)
        with pytest.raises(EngineError):
            pipe.advance([run])
    while not run.done:
        pipe.advance([run])
    np.testing.assert_array_equal(pipe.finish(run), expected)


# --- the cache of texts


def test_a_text_is_encoded_once(tiny_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that come again, in whatever role, do not run the text encoder; clip_skip makes another state of them."""
    with (
        Pipeline.load(tiny_bundles["sd1"], threads=1) as pipe,
        Pipeline.load(tiny_bundles["sd1"], threads=1, prompt_cache=0) as forgetful,
    ):
        calls: dict[str, list[int]] = {}
        for name in ("text_encoder", "unet_prompt"):
            engine = pipe.engines[name]
            calls[name] = []

            def count(feeds: Mapping[str, Array], run: Any = engine.run, seen: list[int] = calls[name]) -> Any:
                seen.append(len(next(iter(feeds.values()))))
                return run(feeds)

            monkeypatch.setattr(engine, "run", count)
        options: dict[str, Any] = {"steps": 2, "seed": 1, "guidance": 4, "sampler": "euler"}
        for prompt, negative, skip in (
            ("a red apple", "", 0),
            ("a rocket", "", 0),
            ("a red apple", "a rocket", 0),
            ("a red apple", "a red apple", 0),
            ("a red apple", "", 1),
        ):
            received = pipe(prompt, negative_prompt=negative, clip_skip=skip, **options).latents
            expected = forgetful(prompt, negative_prompt=negative, clip_skip=skip, **options).latents
            np.testing.assert_array_equal(received, expected, err_msg="the cache shows")
        assert calls == {"text_encoder": [1] * 4, "unet_prompt": [1] * 4}


@pytest.mark.parametrize("size", [-1, 1.5, True, "1 GB"])
def test_a_wrong_size_of_the_cache_is_refused(tiny_bundles: dict[str, Path], size: Any) -> None:
    """The cache takes a whole number of bytes, 0 or more."""
    with pytest.raises(InvalidRequestError, match=r"prompt_cache is .*, expected (a whole number|0 or more bytes)"):
        Pipeline.load(tiny_bundles["sd1"], prompt_cache=size)


# --- stages of plain functions: a schedule that takes a vector of the prompt in, as SDXL's does

LATENTS = (4, 4, 6)


def fake_stages() -> dict[str, FakeEngine]:
    """``latents + text + time * vector`` as the prediction, in stages."""
    latent = ("batch", *LATENTS)
    vector, row = TensorSpec("vector", "float32", ("batch",)), TensorSpec("text_key", "float32", ("rows",))

    def schedule(feeds: Mapping[str, Array]) -> dict[str, Array]:
        return {"clock": feeds["timestep"] * feeds["vector"]}

    def step(feeds: Mapping[str, Array]) -> dict[str, Array]:
        model = (feeds["registers"][:, 0] * feeds["input_scale"][:, None, None, None])[feeds["rows"]]
        model = model + (feeds["text_key"] + feeds["clock"])[:, None, None, None]
        low, high = model[feeds["unconditional"]], model[feeds["conditional"]]
        guided = low + feeds["guidance"][:, None, None, None] * (high - low)
        terms = np.concatenate([feeds["registers"], guided[:, None], feeds["noise"][:, None]], axis=1)
        return {"updated_registers": np.einsum("brt,btchw->brchw", feeds["update"], terms).astype(np.float32)}

    return {
        "prompt": FakeEngine(
            [TensorSpec("text", "float32", ("batch",))],
            [TensorSpec("text_key", "float32", ("batch",))],
            lambda feeds: {"text_key": feeds["text"] * 2},
        ).open(),
        "schedule": FakeEngine(
            [TensorSpec("timestep", "float32", ("batch",)), vector],
            [TensorSpec("clock", "float32", ("batch",))],
            schedule,
        ).open(),
        "step": FakeEngine(
            [
                TensorSpec("registers", "float32", ("batch", "registers", *LATENTS)),
                TensorSpec("noise", "float32", latent),
                TensorSpec("update", "float32", ("batch", "registers", "terms")),
                *(TensorSpec(n, "float32", ("batch",)) for n in ("input_scale", "guidance", "guidance_rescale")),
                *(TensorSpec(n, "int64", ("batch",)) for n in ("unconditional", "conditional")),
                TensorSpec("rows", "int64", ("rows",)),
                row,
                TensorSpec("clock", "float32", ("rows",)),
            ],
            [TensorSpec("updated_registers", "float32", ("batch", "registers", *LATENTS))],
            step,
        ).open(),
    }


def request(steps: int, guidance: float, images: int = 2, **options: float) -> Request:
    return Request("p", "n", steps, guidance, 7, "euler", 48, 32, images, 0, **options)


def expected_latents(asked: Request, vectors: tuple[float, float]) -> Array:
    """The same loop written out in numpy."""
    plan = compile_plan("euler", {"_class_name": "EulerDiscreteScheduler"}, asked.steps)
    run = start_run(asked, plan, [{}], (asked.images, *LATENTS))
    registers = run.registers[:, 0].astype(np.float64)
    for index in range(len(plan)):
        scaled = registers * plan.input_scale[index]
        low, high = (
            scaled + 2 * text + plan.timesteps[index] * vector for text, vector in zip((0.1, 0.2), vectors, strict=True)
        )
        guided = low + asked.guidance * (high - low) if asked.guided_at(index, len(plan)) else high
        ((keep, change, _),) = plan.update[index]
        registers = keep * registers + change * guided
    return registers


@pytest.mark.parametrize("steps", [3, TIMESTEPS_AT_ONCE + 7])
@pytest.mark.parametrize("options", [{"guidance": 1.0}, {"guidance": 3.0}, {"guidance": 3.0, "guidance_end": 0.5}])
def test_a_schedule_that_takes_vectors_in(steps: int, options: dict[str, float]) -> None:
    """Each half gets the schedule of its own vector, however many calls the timesteps need."""
    stages = fake_stages()
    loop = FusedLoop(stages["step"], stages["prompt"], stages["schedule"])
    vectors = (0.001, 0.002)
    texts = [
        loop.condition({"text": np.array([text], np.float32), "vector": np.array([vector], np.float32)})
        for text, vector in zip((0.1, 0.2), vectors, strict=True)
    ]
    asked = request(steps, **options)
    plan = compile_plan("euler", {"_class_name": "EulerDiscreteScheduler"}, steps)
    run = start_run(asked, plan, texts if asked.guided else texts[1:], (asked.images, *LATENTS))
    loop.begin(run)
    while not run.done:
        loop.advance([run])
    assert relative(run.latents, expected_latents(asked, vectors)) <= 1e-5
    calls = [len(call["timestep"]) for call in stages["schedule"].calls]
    assert max(calls) <= TIMESTEPS_AT_ONCE
    assert sum(calls) == steps * (2 if asked.guided else 1)


def test_a_step_that_is_not_fused_is_refused() -> None:
    """A graph that lacks an input of a fused step is named before anything runs."""
    stages = fake_stages()
    step = stages["step"]
    bare = FakeEngine([s for s in step.inputs.values() if s.name != "rows"], step.outputs.values(), dict).open()
    with pytest.raises(BundleError, match="unet_step has no input 'rows'"):
        FusedLoop(bare)


def test_a_step_that_needs_more_than_there_is_is_refused() -> None:
    """What no stage computes is named when the first text comes."""
    loop = FusedLoop(fake_stages()["step"], schedule=fake_stages()["schedule"])
    with pytest.raises(BundleError, match="unet_step needs 'text_key', which no stage of the bundle computes"):
        loop.condition({"vector": np.zeros(1, np.float32)})


def test_a_bundle_without_stages(tiny_bundle: Path) -> None:
    """It runs the plain loop by itself, and says what to do where the fused one is asked for."""
    import json

    manifest = json.loads((tiny_bundle / "bundle.json").read_text())
    for stage in ("unet_prompt", "unet_schedule", "unet_step"):
        del manifest["components"][stage]
    (tiny_bundle / "bundle.json").write_text(json.dumps(manifest))
    with Pipeline.load(tiny_bundle) as pipe:
        assert pipe.loop.name == "plain"
    with pytest.raises(BundleError, match="holds no stages of its denoiser; build it again"):
        Pipeline.load(tiny_bundle, loop="fused")
    with pytest.raises(InvalidRequestError, match="loop is 'quick', expected one of auto, fused, plain"):
        Pipeline.load(tiny_bundle, loop="quick")


# --- cancelling


def test_a_dropped_run_is_gone_at_once(pipe: Pipeline) -> None:
    """Nothing holds a run that was dropped after any step, nor a stream that nobody reads any more."""
    for steps in range(3):
        run: Run = pipe.start("a red apple", steps=4, sampler="euler-a")
        for _ in range(steps):
            pipe.advance([run])
        watched = [weakref.ref(run), weakref.ref(run.generator)]
        del run
        assert [each() for each in watched] == [None, None]
    stream = pipe.stream("a red apple", steps=4, sampler="euler-a")
    next(stream)
    run = stream.gi_yieldfrom.gi_frame.f_locals["runs"][0]
    watched = [weakref.ref(run)]
    del run
    stream.close()
    assert watched[0]() is None


@pytest.mark.heavy
def test_a_thousand_runs_leave_nothing(pipe: Pipeline) -> None:
    """Runs that end, that are cancelled and that are left half read take no memory with them."""

    def some(count: int) -> None:
        for number in range(count):
            stream = pipe.stream(f"apple {number % 7}", steps=2, sampler="euler-a", seed=number)
            for _ in range(number % 4):  # up to one more than there are steps
                next(stream, None)
            if number % 2:
                stream.close()
            del stream

    some(30)  # what is imported, cached or allocated at first
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.take_snapshot()
        some(1000)
        gc.collect()
        after = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    grown = sum(entry.size_diff for entry in after.compare_to(before, "filename"))
    assert grown < 200_000, "less than 200 bytes a run; one tensor of latents has 4 kB"
