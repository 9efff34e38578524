"""The loop fused and plain: the same images of every sampler, steps taken again, and bundles without stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines import Array
from latentrt.engines.errors import BundleError, EngineError, InvalidRequestError
from latentrt.runtime import Pipeline
from latentrt.runtime.samplers import SAMPLERS


@pytest.fixture(scope="module")
def both(tiny_bundles: dict[str, Path]) -> Iterator[tuple[Pipeline, Pipeline]]:
    """The tiny SD 1.x model with both loops, fused first."""
    bundle = tiny_bundles["sd1"]
    with Pipeline.load(bundle, threads=1) as fused, Pipeline.load(bundle, threads=1, loop="plain") as plain:
        yield fused, plain


def relative(received: Array, expected: Array) -> float:
    return float(np.linalg.norm(received - expected) / np.linalg.norm(expected))


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


def test_runs_that_cannot_share_a_call(looped: Pipeline) -> None:
    """None at all, one that is done or there twice, and other sizes are refused; nobody has moved then."""
    run, wide = looped.start("a", steps=1, sampler="euler"), looped.start("a", steps=2, width=48, sampler="euler")
    for runs, message in (
        ([], "no run was given"),
        ([run, run], "given twice"),
        ([run, wide], "runs of 32x32 and of 48x32 pixels cannot share a batch"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            looped.advance(runs)
    with pytest.raises(InvalidRequestError, match="the run has taken 0 of 1 steps"):
        looped.finish(run)
    looped.advance([run])
    with pytest.raises(InvalidRequestError, match="is done"):
        looped.advance([run])
    assert (run.index, wide.index) == (1, 0)


@pytest.mark.parametrize("sampler", ["euler-a", "dpmpp-2m"])
def test_a_step_that_failed_may_be_taken_again(looped: Pipeline, monkeypatch: pytest.MonkeyPatch, sampler: str) -> None:
    """After an engine's failure the run is where it was, its noise included."""
    options: dict[str, Any] = {"sampler": sampler, "steps": 4, "seed": 1}
    expected = looped("a red apple", **options).images
    run = looped.start("a red apple", **options)
    looped.advance([run])
    engine = looped.engines["unet_step" if looped.loop.name == "fused" else "unet"]

    def fail(feeds: Mapping[str, Array]) -> dict[str, Array]:
        raise EngineError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "run", fail)
        with pytest.raises(EngineError):
            looped.advance([run])
    while not run.done:
        looped.advance([run])
    np.testing.assert_array_equal(looped.finish(run), expected)


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
