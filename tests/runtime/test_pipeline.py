"""The pipeline: loading, prompts of every kind, and real engines under threads, batches and one fixed size.

Pictures against diffusers are in test_parity_diffusers.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import latentrt.runtime
from latentrt.engines.errors import (
    BundleError,
    EngineClosedError,
    EngineUnavailableError,
    InvalidRequestError,
    LatentRTError,
)
from latentrt.engines.trt.cuda import CudaDevice
from latentrt.runtime import Bundle, Pipeline
from latentrt.runtime.components import engine_choice
from latentrt.runtime.components import opening as module
from latentrt.runtime.components.engine_choice import EngineSettings, FixedSize


def test_the_same_seed_gives_the_same_picture(pipe: Pipeline) -> None:
    """A request repeated from its result is the same bit for bit, another seed's is another."""
    first = pipe("a red apple", steps=2)
    assert first.request.seed != 1
    again = pipe("a red apple", steps=2, seed=first.request.seed)
    np.testing.assert_array_equal(first.images, again.images)
    assert not np.array_equal(pipe("a red apple", steps=2, seed=1).images, first.images)


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


# --- loading


def test_a_load_that_fails_closes_what_was_opened(
    plain_model: Any, tiny_bundles: dict[str, Path], monkeypatch: Any
) -> None:
    """If the last engine does not open, the others do not stay open."""
    made = plain_model.fakes()
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
