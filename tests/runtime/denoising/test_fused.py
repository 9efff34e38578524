"""The ``fused`` loop on stages of plain functions, its ``schedule_stage`` among them, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from latentrt.engines import Array, FakeEngine, TensorSpec
from latentrt.engines.errors import BundleError
from latentrt.runtime.denoising.fused import FusedLoop
from latentrt.runtime.denoising.latent_preparation import start_run
from latentrt.runtime.denoising.schedule_stage import TIMESTEPS_AT_ONCE
from latentrt.runtime.request.request import Request
from latentrt.runtime.samplers import compile_plan


def relative(received: Array, expected: Array) -> float:
    return float(np.linalg.norm(received - expected) / np.linalg.norm(expected))


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
