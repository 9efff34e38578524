"""``sd3`` and ``flux``: requests, shifts by size, text lengths. Whole images are in test_parity_families.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from latentrt.engines import Array
from latentrt.engines.errors import BundleError, InvalidRequestError
from latentrt.runtime import Bundle, Pipeline
from latentrt.runtime.cli import main
from latentrt.runtime.denoising.batching import split_into_calls
from latentrt.runtime.families import family_of
from latentrt.runtime.images.png import read_parameters
from latentrt.runtime.inputs.create import create_request

pytestmark = pytest.mark.heavy
KINDS = ("sd3", "sd35", "flux-dev", "flux-schnell")
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def manifests(tiny: Any) -> dict[str, Any]:
    """Manifests of the tiny bundles."""
    return {kind: Bundle.open(tiny.bundle(kind)).manifest for kind in KINDS}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("sd35", {"width": 34}, "width is 34, expected a multiple of 4; the nearest are 32 and 36"),
        ("flux-dev", {"height": 30}, "height is 30, expected a multiple of 4; the nearest are 28 and 32"),
        ("sd3", {"height": 132}, "height is 132, expected at most 128, as far as the positions of this model reach"),
        ("sd3", {"prompt_3": "a"}, "prompt_3 is for T5, which this bundle was built without"),
        ("sd3", {"negative_prompt_3": "a"}, "negative_prompt_3 is for T5, which this bundle was built without"),
        ("sd35", {"max_sequence_length": 513}, "max_sequence_length is 513, expected 1 to 512"),
        ("flux-dev", {"max_sequence_length": 0}, "max_sequence_length is 0, expected 1 to 512"),
        ("flux-dev", {"negative_prompt": "a"}, "the family flux have no negative_prompt, only stable-diffusion and"),
        ("flux-schnell", {"negative_prompt": "a"}, "models of the family flux have no negative_prompt"),
        ("flux-dev", {"clip_skip": 1}, "models of the family flux have no clip_skip"),
        ("flux-dev", {"prompt_3": "a"}, "have no prompt_3, only stable-diffusion-3; leave it out"),
        ("flux-schnell", {"guidance": 3.5}, "guidance is 3.5, but this model was made to run without"),
        ("flux-dev", {"guidance_rescale": 0.5}, "guidance_rescale is for guidance from two predictions"),
        (
            "sd35",
            {"original_size": (8, 8)},
            "have no original_size, only stable-diffusion-xl and",
        ),
    ],
)
def test_what_a_bundle_cannot_do(manifests: dict[str, Any], kind: str, options: Any, message: str) -> None:
    """Sizes, texts and guidance that a model does not know are refused in one sentence."""
    with pytest.raises(InvalidRequestError, match=message):
        create_request(manifests[kind], "a red apple", **options)


def test_defaults(manifests: dict[str, Any]) -> None:
    """Steps, guidance, sampler and size are the families', as diffusers has them."""
    defaults = {kind: manifest.defaults for kind, manifest in manifests.items()}
    assert [(d.steps, d.guidance, d.sampler) for d in defaults.values()] == [
        (28, 7.0, "flow-euler"),
        (28, 7.0, "flow-euler"),
        (28, 3.5, "flow-euler"),
        (4, 1.0, "flow-euler"),
    ]
    assert [(d.width, d.height) for d in defaults.values()] == [(32, 32), (32, 32), (256, 256), (256, 256)]
    assert {manifest.prediction_type for manifest in manifests.values()} == {"flow_prediction"}
    assert [manifest.settings["guidance"] for manifest in manifests.values()] == [
        *["classifier-free"] * 2,
        "embedded",
        "none",
    ]


def test_a_sampler_that_cannot_shift(manifests: dict[str, Any]) -> None:
    """Heun's method has no shift by size in diffusers, so it is refused where a model needs one."""
    family = family_of(manifests["flux-dev"])
    heun = {"sampler": "flow-heun", "steps": 3, "seed": 0}
    with pytest.raises(InvalidRequestError, match=r"cannot shift its schedule by the size of the image.*flow-euler"):
        family.plan(create_request(manifests["flux-dev"], "a", **heun))
    with pytest.raises(InvalidRequestError, match="sampler 'euler' cannot shift"):
        family.plan(create_request(manifests["flux-dev"], "a", sampler="euler", seed=0))
    for kind in ("sd3", "flux-schnell"):
        assert len(family_of(manifests[kind]).plan(create_request(manifests[kind], "a", **heun))) == 5


@pytest.mark.parametrize("size", [(32, 48), (256, 256)])
def test_the_shift_follows_the_size(manifests: dict[str, Any], tiny: Any, size: tuple[int, int]) -> None:
    """FLUX's timesteps are those that diffusers' scheduler has for a picture's number of tokens."""
    pipe = diffusers.pipelines.flux.pipeline_flux
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
        tiny.source("flux-dev"), subfolder="scheduler"
    )
    mu = pipe.calculate_shift(size[0] * size[1] // 16, 256, 4096, 0.5, 1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 5, 5), mu=mu)
    request = create_request(manifests["flux-dev"], "a", width=size[0], height=size[1], steps=5, seed=0)
    plan = family_of(manifests["flux-dev"]).plan(request)
    np.testing.assert_allclose(plan.timesteps, scheduler.timesteps.numpy(), rtol=1e-6)
    own = create_request(manifests["flux-dev"], "a", sigmas=[1.0, 0.5], seed=0)
    assert len(family_of(manifests["flux-dev"]).plan(own)) == 2


@pytest.mark.parametrize("settings", [{"patch": 0}, {"patch": 17}, {"t5": 1}])
def test_settings_that_are_none(manifests: dict[str, Any], settings: dict[str, Any]) -> None:
    """A manifest with a patch that none is, or with another type, is refused."""
    manifest = manifests["sd35"]
    wrong = type(manifest)(**{**vars(manifest), "settings": {**manifest.settings, **settings}})
    with pytest.raises(BundleError, match=f"settings.{next(iter(settings))} is"):
        family_of(wrong)


@pytest.mark.parametrize("kind", ["sd35", "flux-dev"])
@pytest.mark.parametrize("loop", ["fused", "plain"])
def test_openvino_draws_the_same(tiny: Any, kind: str, loop: str) -> None:
    """Both loops give the same picture with OpenVINO as with ONNX Runtime, at another size than the default too."""
    pytest.importorskip("openvino", reason="OpenVINO is an optional extra")
    options: dict[str, Any] = {"steps": 2, "seed": 3, "width": 48, "height": 24, "max_sequence_length": 50}
    with Pipeline.load(tiny.bundle(kind), "onnxruntime", loop=loop) as pipe:
        expected = pipe("a red apple", **options)
    with Pipeline.load(tiny.bundle(kind), "openvino", precision="fp32", loop=loop, engine_cache="off") as pipe:
        received = pipe("a red apple", **options)
    error = np.linalg.norm(received.latents - expected.latents)
    assert error <= 1e-4 * np.linalg.norm(expected.latents)
    assert np.abs(received.images.astype(int) - expected.images).max() <= 1


def test_a_prompt_keeps_its_length(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without T5 the length of its zeros is a part of what is kept of a text; a new length is not taken for the old."""
    with Pipeline.load(tiny.bundle("sd3"), "onnxruntime") as pipe:
        run, calls = pipe.engines["text_encoder"].run, []

        def counted(feeds: dict[str, Array]) -> dict[str, Array]:
            calls.append(feeds)
            return run(feeds)

        monkeypatch.setattr(pipe.engines["text_encoder"], "run", counted)
        options: dict[str, Any] = {"steps": 1, "seed": 0, "guidance": 1.0}
        short, long = (pipe("apple", max_sequence_length=n, **options).latents for n in (5, 300))
        again = pipe("apple", max_sequence_length=5, **options).latents
        assert len(calls) == 2
        np.testing.assert_array_equal(again, short)
        assert np.abs(long - short).max() > 1e-4


def test_texts_of_different_lengths_do_not_share_a_call(tiny: Any) -> None:
    """They take one each, and texts of one length share one, all with pictures as they are alone."""
    with Pipeline.load(tiny.bundle("flux-dev"), "onnxruntime") as pipe:
        options: dict[str, Any] = {"steps": 2, "width": 32, "height": 32, "seed": 5}
        first = pipe.start("a red apple", max_sequence_length=16, guidance=2.0, **options)
        other = pipe.start("a rocket", max_sequence_length=17, **options)
        second = pipe.start("a rocket", max_sequence_length=16, guidance=5.0, **options)
        assert [len(call) for call in split_into_calls([first, second, other], None)] == [2, 1]
        while not first.done:
            pipe.advance([first, second, other])
        for run, length, guidance in ((first, 16, 2.0), (second, 16, 5.0), (other, 17, None)):
            alone = pipe(run.request.prompt, max_sequence_length=length, guidance=guidance, **options).latents
            np.testing.assert_allclose(run.latents, alone, atol=1e-5)


def test_the_stages_leave_nothing_of_texts_and_time_to_the_step(tiny: Any) -> None:
    """What depends on texts or time alone is computed ahead; of them the step takes in nothing as it was given."""
    for kind in KINDS:
        bundle = Bundle.open(tiny.bundle(kind))
        graphs = {stage: bundle.graph(stage, "opset20-fp32") for stage in family_of(bundle.manifest).stages()}
        raw = {"timestep", "encoder_hidden_states", "pooled_projections", "guidance_scale", "sample"}
        inputs = {spec.name for spec in graphs["transformer_step"].inputs}
        assert not inputs & raw, kind
        scale = {"guidance_scale"} if kind == "flux-dev" else set()
        schedule = {spec.name for spec in graphs["transformer_schedule"].inputs}
        assert schedule == {"timestep", "pooled_projections"} | scale


def test_the_command_line(tiny: Any, tmp_path: Path, capsys: Captured) -> None:
    """Third prompts and lengths reach the request, the PNG says them, and inspect names family and abilities."""
    output, bundle = tmp_path / "o.png", str(tiny.bundle("sd35"))
    options = ["--prompt-3", "a rocket", "--negative-prompt-3", "a leaf", "--max-sequence-length", "20"]
    assert main(["generate", bundle, "a red apple", "--output", str(output), "--json", "--steps", "1", *options]) == 0
    request = json.loads(capsys.readouterr().out)["request"]
    assert (request["prompt_3"], request["negative_prompt_3"], request["max_sequence_length"]) == (
        "a rocket",
        "a leaf",
        20,
    )
    assert "Prompt 3: a rocket, Negative prompt 3: a leaf, Max sequence length: 20" in (read_parameters(output) or "")
    assert main(["inspect", str(tiny.bundle("flux-dev"))]) == 0
    text = capsys.readouterr().out
    assert "flux-dev: flux, flow_prediction, licence unknown" in text
    assert "abilities: guidance embedded, options max_sequence_length prompt_2, patch: 2" in text


def test_one_token_of_a_picture(tiny: Any) -> None:
    """The smallest picture that there can be is drawn like any other."""
    for kind in ("sd3", "flux-schnell"):
        with Pipeline.load(tiny.bundle(kind), "onnxruntime") as fused:
            one = fused("apple", steps=1, seed=0, width=4, height=4, max_sequence_length=4)
        with Pipeline.load(tiny.bundle(kind), "onnxruntime", loop="plain") as plain:
            other = plain("apple", steps=1, seed=0, width=4, height=4, max_sequence_length=4)
        np.testing.assert_allclose(one.latents, other.latents, atol=1e-5)
        assert torch.isfinite(torch.from_numpy(one.latents)).all()
