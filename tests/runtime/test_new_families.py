"""A family with 5-D latents and one whose output is no image need no file but their own, which here is this one.

Both are drawn from prompt to result with engines that are plain functions. Expected latents are those of the sampler's
plan, run by itself on the noise that torch would draw.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.engines import Array, FakeEngine, TensorSpec
from latentrt.engines.errors import BundleError, InvalidRequestError
from latentrt.runtime import Bundle, Pipeline, Preview, Request
from latentrt.runtime.abilities import abilities
from latentrt.runtime.bundle.manifest import FORMAT_VERSION, Component, Defaults, Graph, Latent, Manifest, Source
from latentrt.runtime.bundle.manifest import Tokenizer as TokenizerEntry
from latentrt.runtime.bundle.writer import write_bundle
from latentrt.runtime.engine_calls import Conditioning, Floats, output_of
from latentrt.runtime.families import FAMILIES, Family, Text
from latentrt.runtime.noise import torch_randn
from latentrt.runtime.output.kinds import OUTPUT_KINDS, Decoding, OutputKind
from latentrt.runtime.samplers import compile_plan, run_plan
from latentrt.runtime.text.tokenizers import PromptTokenizer
from latentrt.runtime.vae.decoding import unscaled

CHANNELS, FACTOR, WIDTH = 4, 8, 6
SCHEDULER = {"_class_name": "EulerDiscreteScheduler"}
OPTIONS: dict[str, Any] = {"steps": 3, "seed": 7, "guidance": 4.0, "width": 32, "height": 16}


# --- two families, and their kinds of output


class Described(Family):
    """A family with one text encoder, whose states are all that its denoiser is conditioned on."""

    denoiser = "transformer"
    encoders: ClassVar[Mapping[str, str]] = {"text_encoder": "tokenizer"}
    options = frozenset({"negative_prompt"})

    def texts(self, request: Request, tokenizers: Mapping[str, PromptTokenizer]) -> list[Text]:
        prompts = [request.negative_prompt, request.prompt] if request.guided else [request.prompt]
        outputs = {"text_encoder": ("states",)}
        return [self.tokenize({"text_encoder": prompt}, outputs, tokenizers) for prompt in prompts]

    def condition(self, text: Text, encoded: Mapping[str, Mapping[str, Floats]]) -> Conditioning:
        return {"prompt_states": encoded["text_encoder"]["states"]}


class Clips(Described):
    """Latents ``[images, channels, frames, h, w]``."""

    name = "clips"
    tasks = ("text-to-video",)
    output_kind = "video"
    decoders = ("clip_decoder",)
    settings: ClassVar[Mapping[str, type]] = {"frames": int}

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        images, channels, height, width = super().latent_shape(request)
        return images, channels, int(self.manifest.settings["frames"]), height, width

    def options_of_latents(self, shape: Sequence[int]) -> dict[str, int]:
        if len(shape) != 5:
            raise InvalidRequestError(f"latents have the shape {list(shape)}, expected those of clips")
        return super().options_of_latents((*shape[:2], *shape[3:]))


class Sounds(Described):
    """Latents ``[images, channels, length]``."""

    name = "sounds"
    tasks = ("text-to-audio",)
    output_kind = "audio"
    decoders = ("vocoder",)

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        return request.images, self.manifest.latent.channels, request.width // self.manifest.latent.vae_scale_factor


class Video(OutputKind):
    """uint8 ``[clips, frames, height, width, 3]``; its previews are first frames."""

    name = "video"
    dtype = "uint8"
    previews = True

    def shape(self, family: Family, request: Request) -> tuple[int, ...]:
        return request.images, family.latent_shape(request)[2], request.height, request.width, 3

    def decode(self, decoding: Decoding, latents: Floats) -> NDArray[Any]:
        sample = unscaled(decoding.manifest.latent, latents)
        frames = output_of(decoding.engine("clip_decoder"), "clip_decoder", "frames", {"latents": sample})
        return np.rint(np.clip(frames, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 4, 1)

    def preview(self, decoding: Decoding, latents: Floats) -> NDArray[np.uint8]:
        frames: NDArray[np.uint8] = self.decode(decoding, latents[:, :, :1])[:, 0]
        return frames

    def write(
        self, path: str | os.PathLike[str], payload: NDArray[Any], parameters: str, texts: Mapping[str, str]
    ) -> None:
        np.save(path, payload)


class Audio(OutputKind):
    """float32 ``[sounds, samples]``, without previews."""

    name = "audio"
    dtype = "float32"

    def shape(self, family: Family, request: Request) -> tuple[int, ...]:
        return request.images, request.width

    def decode(self, decoding: Decoding, latents: Floats) -> NDArray[Any]:
        return output_of(decoding.engine("vocoder"), "vocoder", "samples", {"latents": latents})

    def write(
        self, path: str | os.PathLike[str], payload: NDArray[Any], parameters: str, texts: Mapping[str, str]
    ) -> None:
        np.save(path, payload)


# --- a model of plain functions, for latents of any shape


def encode(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """States that tell prompts apart."""
    angles = feeds["input_ids"][..., None] * np.arange(1, WIDTH + 1, dtype=np.float32) / 10
    return {"states": np.sin(angles).astype(np.float32)}


def predicted(sample: Array, states: Array) -> Array:
    """A prediction that depends on sample and prompt, row by row."""
    shift = states.mean(axis=(1, 2), dtype=np.float32).reshape(-1, *[1] * (sample.ndim - 1))
    return np.tanh(sample * np.float32(0.3) + shift)


def denoise(feeds: Mapping[str, Array]) -> dict[str, Array]:
    return {"out_sample": predicted(feeds["sample"], feeds["prompt_states"])}


def fused_step(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The same with guidance and the sampler's update, as a fused step has them."""
    registers, noise = feeds["registers"], feeds["noise"]
    ones = [1] * (noise.ndim - 1)
    sample = (registers[:, 0] * feeds["input_scale"].reshape(-1, *ones))[feeds["rows"]]
    found = predicted(sample, feeds["prompt_states"])
    without, within = found[feeds["unconditional"]], found[feeds["conditional"]]
    guided = without + feeds["guidance"].reshape(-1, *ones) * (within - without)
    columns = np.concatenate([registers, guided[:, None], noise[:, None]], axis=1)
    return {"updated_registers": np.einsum("brk,bk...->br...", feeds["update"], columns)}


def spec(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def engines_of(latent: Sequence[str], decoder: FakeEngine, name: str, *, fused: bool = False) -> dict[str, FakeEngine]:
    """Opened engines of a model whose latents have these dimensions behind the first."""
    states = spec("prompt_states", "rows", "tokens", WIDTH)
    found = {
        "text_encoder": FakeEngine(
            [spec("input_ids", "batch", "tokens", dtype="int64")], [spec("states", "batch", "tokens", WIDTH)], encode
        ),
        name: decoder,
    }
    if fused:
        state = spec("registers", "batch", "registers", *latent)
        scalars = [spec(each, "batch") for each in ("input_scale", "guidance", "guidance_rescale")]
        rows = [spec("rows", "rows", dtype="int64")]
        rows += [spec(each, "batch", dtype="int64") for each in ("unconditional", "conditional")]
        others = [spec("noise", "batch", *latent), spec("update", "batch", "registers", "terms"), states]
        result = spec("updated_registers", "batch", "registers", *latent)
        found["transformer_step"] = FakeEngine([state, *scalars, *rows, *others], [result], fused_step)
    else:
        taken = [spec("sample", "rows", *latent), spec("timestep", "rows"), states]
        found["transformer"] = FakeEngine(taken, [spec("out_sample", "rows", *latent)], denoise)
    return {component: engine.open() for component, engine in found.items()}


def clip_engines(*, fused: bool = False) -> dict[str, FakeEngine]:
    def decode(feeds: Mapping[str, Array]) -> dict[str, Array]:
        return {"frames": feeds["latents"][:, :3].repeat(FACTOR, axis=3).repeat(FACTOR, axis=4)}

    latent = (CHANNELS, "frames", "height", "width")
    decoder = FakeEngine(
        [spec("latents", "batch", *latent)], [spec("frames", "batch", 3, "frames", "high", "wide")], decode
    )
    return engines_of(("channels", *latent[1:]), decoder, "clip_decoder", fused=fused)


def sound_engines(*, fused: bool = False) -> dict[str, FakeEngine]:
    def decode(feeds: Mapping[str, Array]) -> dict[str, Array]:
        return {"samples": feeds["latents"].mean(axis=1).repeat(FACTOR, axis=1)}

    decoder = FakeEngine([spec("latents", "batch", CHANNELS, "length")], [spec("samples", "batch", "samples")], decode)
    return engines_of(("channels", "length"), decoder, "vocoder", fused=fused)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both families and both kinds, added as any other package would add its own."""
    for family in (Clips, Sounds):
        monkeypatch.setitem(FAMILIES, family.name, family)
    for kind in (Video(), Audio()):
        monkeypatch.setitem(OUTPUT_KINDS, kind.name, kind)


@pytest.fixture
def written(registered: None, tmp_path: Path, tiny_bundles: dict[str, Path]) -> Callable[..., Bundle]:
    """Writes a bundle of a family, with the graphs of its engines, and opens it."""

    def write(family: str, engines: Mapping[str, FakeEngine], settings: Mapping[str, Any]) -> Bundle:
        components = {
            name: Component(
                name,
                {
                    "opset20-fp32": Graph(
                        f"{name}/model.onnx", "fp32", 20, tuple(each.inputs.values()), tuple(each.outputs.values())
                    )
                },
            )
            for name, each in engines.items()
        }
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            family=family,
            prediction_type="epsilon",
            components=components,
            files={},
            latent=Latent(CHANNELS, FACTOR, 0.5, 0.25),
            tokenizers={"tokenizer": TokenizerEntry("tokenizer", 77, 0)},
            scheduler=SCHEDULER,
            defaults=Defaults("euler", 3, 4.0, 32, 16, 0),
            source=Source("test", "CC0", "0"),
            tools={},
            quality={},
            settings={"guidance": "classifier-free", **settings},
        )
        with write_bundle(tmp_path / family) as writer:
            (writer.directory / "tokenizer").mkdir()
            shutil.copy(tiny_bundles["sd1"] / "tokenizer" / "tokenizer.json", writer.directory / "tokenizer")
            for name in components:
                (writer.directory / name).mkdir()
                (writer.directory / name / "model.onnx").write_bytes(b"no graph is opened here")
            writer.commit(manifest)
        return Bundle.open(tmp_path / family)

    return write


def expected_latents(pipe: Pipeline, shape: Sequence[int], prompt: str = "a red apple") -> NDArray[np.float32]:
    """Latents of the sampler's plan, run without pipeline or loop."""
    ids = [pipe.tokenizers["tokenizer"].encode(text, 77)[None] for text in ("", prompt)]
    without, within = (encode({"input_ids": each})["states"] for each in ids)

    def model(sample: Array, timestep: float) -> Array:
        first = predicted(sample, without.repeat(len(sample), axis=0))
        return first + np.float32(4.0) * (predicted(sample, within.repeat(len(sample), axis=0)) - first)

    plan = compile_plan("euler", SCHEDULER, 3)
    return run_plan(plan, torch_randn(7, shape), model)


# --- 5-D latents


@pytest.fixture
def clips(written: Callable[..., Bundle]) -> Pipeline:
    engines = clip_engines()
    return Pipeline(written("clips", engines, {"frames": 5}), engines, max_batch=2)


def test_a_clip_from_prompt_to_result(clips: Pipeline) -> None:
    """Noise, loop, previews and decoding take 5-D latents; the result is the family's kind of output."""
    shown: list[Preview] = []
    result = clips("a red apple", **OPTIONS, images=3, on_preview=shown.append, preview_every=1)
    assert (result.kind, result.payload.dtype, result.payload.shape) == ("video", np.uint8, (3, 5, 16, 32, 3))
    np.testing.assert_allclose(result.latents, expected_latents(clips, (3, CHANNELS, 5, 2, 4)), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(result.payload, clips.decode(result.latents))
    assert [each.images.shape for each in shown] == [(3, 16, 32, 3)] * 2
    with pytest.raises(InvalidRequestError, match="the result is video, and has no images; take its payload"):
        _ = result.images


def test_a_clip_of_several_registers_in_a_batch(clips: Pipeline) -> None:
    """Requests of other samplers, whose plans keep histories and draw noise, share calls of 5-D latents."""
    asked: list[dict[str, Any]] = [{"sampler": "dpmpp-2m-sde"}, {"sampler": "euler", "images": 2}, {"guidance": 1.0}]
    alone = [clips("a red apple", **{**OPTIONS, **each}) for each in asked]
    runs = [clips.start("a red apple", **{**OPTIONS, **each}) for each in asked]
    while running := [run for run in runs if not run.done]:
        clips.advance(running)
    for run, expected in zip(runs, alone, strict=True):
        np.testing.assert_allclose(run.latents, expected.latents, rtol=1e-5, atol=1e-5)
        assert np.abs(clips.finish(run).astype(int) - expected.payload).max() <= 1
    first, second = clips.batch(["a red apple", "a rocket"], **{**OPTIONS, "seed": [7, 8]})
    np.testing.assert_allclose(first.latents, expected_latents(clips, (1, CHANNELS, 5, 2, 4)), rtol=1e-5, atol=1e-5)
    assert second.payload.shape == (1, 5, 16, 32, 3)


def test_the_fused_loop_takes_them_too(clips: Pipeline, written: Callable[..., Bundle]) -> None:
    """Stages give the plain loop's clip, histories and noise included."""
    engines = clip_engines(fused=True)
    fused = Pipeline(written("clips", engines, {"frames": 5}), engines)
    assert (fused.loop.name, clips.loop.name) == ("fused", "plain")
    for sampler in ("euler", "dpmpp-2m-sde"):
        one, other = (pipe("a red apple", **OPTIONS, sampler=sampler, images=2) for pipe in (fused, clips))
        np.testing.assert_allclose(one.latents, other.latents, rtol=1e-5, atol=1e-5)
    pair = [fused.start("a red apple", **OPTIONS, sampler=sampler) for sampler in ("euler", "dpmpp-2m-sde")]
    fused.advance(pair)
    assert [run.latent_shape for run in pair] == [(1, CHANNELS, 5, 2, 4)] * 2


def test_latents_that_are_given_have_the_familys_shape(clips: Pipeline) -> None:
    """They decide the size; those of another number of frames or dimensions are refused; latents alone may be asked."""
    noise = torch_randn(7, (1, CHANNELS, 5, 2, 4))
    options = {name: value for name, value in OPTIONS.items() if name not in ("width", "height", "seed")}
    result = clips("a red apple", **options, latents=noise, images=2, output="latent")
    assert (result.request.width, result.request.height) == (32, 16)
    assert (result.payload.dtype, result.payload.shape) == (np.uint8, (0, 5, 16, 32, 3))
    expected = expected_latents(clips, (1, CHANNELS, 5, 2, 4))
    np.testing.assert_allclose(result.latents, expected.repeat(2, axis=0), rtol=1e-5, atol=1e-5)
    for shape, message in (
        ((1, CHANNELS, 4, 2, 4), r"\[1, 4, 4, 2, 4\], and the request's are \[1, 4, 5, 2, 4\]"),
        ((1, CHANNELS, 2, 4), "expected those of clips"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            clips("a red apple", **options, latents=np.zeros(shape, np.float32))


def test_what_is_written_is_the_kinds(clips: Pipeline, tmp_path: Path) -> None:
    """The kind of a result writes its payload."""
    result = clips("a red apple", **OPTIONS)
    OUTPUT_KINDS[result.kind].write(tmp_path / "clip.npy", result.payload, "", {})
    np.testing.assert_array_equal(np.load(tmp_path / "clip.npy"), result.payload)


# --- no image


@pytest.mark.parametrize("fused", [False, True])
def test_a_sound_from_prompt_to_result(written: Callable[..., Bundle], *, fused: bool) -> None:
    """Latents of three dimensions, and an output of two that is no image; nothing shows it while it is drawn."""
    engines = sound_engines(fused=fused)
    pipe = Pipeline(written("sounds", engines, {}), engines)
    result = pipe("a red apple", **OPTIONS, images=2)
    assert (result.kind, result.payload.dtype, result.payload.shape) == ("audio", np.float32, (2, 32))
    np.testing.assert_allclose(result.latents, expected_latents(pipe, (2, CHANNELS, 4)), rtol=1e-5, atol=1e-5)
    expected = result.latents.mean(axis=1).repeat(FACTOR, axis=1)
    np.testing.assert_allclose(result.payload, expected, rtol=1e-5, atol=1e-6)
    run = pipe.start("a red apple", **OPTIONS, images=2)
    while not run.done:
        pipe.advance([run])
    np.testing.assert_array_equal(pipe.finish(run), result.payload)
    with pytest.raises(InvalidRequestError, match="there are no previews of audio; leave on_preview out"):
        pipe("a red apple", **OPTIONS, on_preview=print)


def test_their_bundles_say_what_they_can(written: Callable[..., Bundle]) -> None:
    """What a family says of itself is what its bundles' abilities say."""
    engines = sound_engines()
    told = abilities(written("sounds", engines, {}))
    assert (told["tasks"], told["loops"], told["options"]) == (["text-to-audio"], ["plain"], ["negative_prompt"])


def test_a_family_that_is_not_there(written: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its entry, a bundle is refused with the families that there are; so is a kind that is unknown."""
    engines = sound_engines()
    bundle = written("sounds", engines, {})
    monkeypatch.delitem(OUTPUT_KINDS, "audio")
    with pytest.raises(InvalidRequestError, match="unknown output kind 'audio'; known kinds: image, video"):
        Pipeline(bundle, engines)
    monkeypatch.delitem(FAMILIES, "sounds")
    with pytest.raises(BundleError, match="the bundle is of the family 'sounds', and this version of latentrt runs"):
        Pipeline(bundle, engines)
