"""Text to image: the denoising loop in numpy around engine calls."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Array, Engine
from latentrt.engines.errors import BundleError, EngineClosedError, EngineError, InvalidRequestError

from .bundle import Bundle
from .engine_choice import EngineSettings, make_engine
from .noise import TorchGenerator
from .request import Request, RequestOptions
from .samplers import compile_plan
from .samplers.plan import Plan, step
from .tokenizers import ClipTokenizer

Floats = NDArray[np.float32]

COMPONENTS = ("text_encoder", "unet", "vae_decoder")
"""What text to image needs of a bundle."""


@dataclass(frozen=True)
class StepInfo:
    """State of the loop after one call of the denoiser.

    Attributes:
        index: Number of this call, from 0.
        total: Number of calls of the whole run.
        timestep: Timestep that the denoiser was called at.
        latents: float32 ``[images, channels, height / factor, width / factor]``; a copy.
        elapsed: Seconds that this step took.
    """

    index: int
    total: int
    timestep: float
    latents: Floats
    elapsed: float


@dataclass
class Timings:
    """Seconds spent in each stage of a request.

    Attributes:
        text_encoder: Tokenizer and text encoder.
        prompt: The denoiser's prompt stage; 0 where the bundle has none.
        schedule: Compiling the sampler's plan, and the denoiser's schedule stage where the bundle has one.
        step: Each step of the loop.
        vae_decoder: Decoding to pixels.
        total: All of it.
    """

    text_encoder: float = 0.0
    prompt: float = 0.0
    schedule: float = 0.0
    step: list[float] = field(default_factory=list)
    vae_decoder: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class Result:
    """What a request gave.

    Attributes:
        images: uint8 ``[images, height, width, 3]``.
        latents: float32 ``[images, channels, height / factor, width / factor]``.
        timings: Seconds of each stage.
        request: The request with every default filled in, the seed among them.
        truncated: Tokens of prompt and negative prompt that did not fit the text encoder and were cut off.
    """

    images: NDArray[np.uint8]
    latents: Floats
    timings: Timings
    request: Request
    truncated: int


class Pipeline:
    """A bundle opened for text to image. One pipeline may be used from many threads at once.

    Engines are opened once and shared; all that belongs to a request lives with the request.

    Args:
        bundle: The bundle.
        engines: Opened engines for :data:`COMPONENTS`; closed together with the pipeline.
    """

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine]) -> None:
        self.bundle = bundle
        self.engines = dict(engines)
        self.manifest = bundle.manifest
        self._closed = False
        if "tokenizer" not in self.manifest.tokenizers:
            raise BundleError(f"{bundle.path} has no tokenizer named 'tokenizer', which text to image needs")
        settings = self.manifest.tokenizers["tokenizer"]
        bundle.file(f"{settings.directory}/tokenizer.json")
        self.tokenizer = ClipTokenizer.load(
            bundle.path / settings.directory, max_length=settings.max_length, pad_token_id=settings.pad_token_id
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        engine: str = "auto",
        *,
        precision: str | None = None,
        threads: int = 0,
        verify_hash: bool = False,
    ) -> Self:
        """Open a bundle.

        Args:
            path: Directory that ``latentrt build-engine`` wrote.
            engine: ``"onnxruntime"``, ``"tensorrt"``, ``"tensorrt-rtx"`` or ``"auto"``.
            precision: ``"fp32"``, ``"fp16"``, or ``None`` for the highest that the bundle has.
            threads: Threads inside an operator on a CPU; 0 is automatic.
            verify_hash: Hash every file of the bundle first.

        Raises:
            BundleError: if the bundle is missing, damaged, hostile, or lacks what is asked for.
            EngineUnavailableError: if the engine cannot run here.
            InvalidRequestError: for an unknown engine.
        """
        bundle = Bundle.open(Path(path), verify_hash=verify_hash)
        settings = EngineSettings(engine, precision, threads)
        with ExitStack() as stack:
            engines: dict[str, Engine] = {}
            for component in COMPONENTS:
                opened = make_engine(bundle, component, settings).open()
                stack.callback(opened.close)
                engines[component] = opened
            pipeline = cls(bundle, engines)
            stack.pop_all()
        return pipeline

    def __call__(self, prompt: str, **options: Unpack[RequestOptions]) -> Result:
        """Draw pictures of ``prompt``.

        Args:
            prompt: What to draw.
            options: ``negative_prompt``, ``steps``, ``guidance``, ``seed``, ``sampler``, ``width``, ``height``,
                ``images``, ``clip_skip``: the fields of :class:`~latentrt.runtime.request.Request`. What is left out
                or ``None`` is the bundle's default.

        Raises:
            InvalidRequestError: before anything is computed.
            EngineError: if an engine fails, or computes values that are not finite.
            EngineClosedError: if the pipeline was closed.
        """
        stream = self.stream(prompt, **options)
        while True:
            try:
                next(stream)
            except StopIteration as stop:
                result: Result = stop.value
                return result

    def stream(self, prompt: str, **options: Unpack[RequestOptions]) -> Generator[StepInfo, None, Result]:
        """Draw pictures, yielding after every call of the denoiser; the generator's return value is the result.

        The request is checked at once, before the first ``next``. Closing the generator (or dropping it) cancels
        the request. Takes what :meth:`__call__` takes.

        Example:
            >>> def draw(pipe):  # doctest: +SKIP
            ...     result = yield from pipe.stream("a red apple", steps=20)
        """
        if self._closed:
            raise EngineClosedError("the pipeline is closed; load the bundle again with Pipeline.load")
        if unknown := options.keys() - RequestOptions.__annotations__.keys():
            known = ", ".join(RequestOptions.__annotations__)
            raise InvalidRequestError(f"unknown option {min(unknown)!r}; known options: {known}")
        request = Request.create(self.manifest, prompt, **options)
        start = time.perf_counter()
        plan = compile_plan(request.sampler, self.manifest.scheduler, request.steps)
        planned = time.perf_counter()
        tokens, truncated = self._tokenize(request)
        timings = Timings(schedule=planned - start, text_encoder=time.perf_counter() - planned)
        return self._stream(request, plan, tokens, truncated, timings)

    def _stream(
        self, request: Request, plan: Plan, tokens: NDArray[np.int64], truncated: int, timings: Timings
    ) -> Generator[StepInfo, None, Result]:
        start = time.perf_counter()
        embeddings = self._encode(tokens, request)
        timings.text_encoder += time.perf_counter() - start

        latent = self.manifest.latent
        shape = (request.images, latent.channels, request.height // latent.factor, request.width // latent.factor)
        generator = TorchGenerator(request.seed)
        registers = np.zeros((plan.registers, *shape), np.float32)
        np.multiply(generator.randn(shape), np.float32(plan.init_scale), out=registers[0])
        total = len(plan.timesteps)
        for index in range(total):
            begin = time.perf_counter()
            prediction = self._predict(registers[0], index, plan, embeddings, request)
            noise = generator.randn(shape) if plan.uses_noise[index] else None
            registers = step(plan, index, registers, prediction, noise)
            timings.step.append(time.perf_counter() - begin)
            yield StepInfo(index, total, float(plan.timesteps[index]), registers[0].copy(), timings.step[-1])

        begin = time.perf_counter()
        latents = registers[0].copy()
        images = self.decode(latents)
        end = time.perf_counter()
        timings.vae_decoder = end - begin
        timings.total = timings.schedule + timings.text_encoder + sum(timings.step) + timings.vae_decoder
        return Result(images, latents, timings, request, truncated)

    def _tokenize(self, request: Request) -> tuple[NDArray[np.int64], int]:
        """Token ids ``[texts, max_length]``, the unconditional text first, and how many tokens were cut off."""
        texts = [request.negative_prompt, request.prompt] if request.guided else [request.prompt]
        cut = sum(max(0, self.tokenizer.count(text) - self.tokenizer.max_length) for text in texts)
        return self.tokenizer.encode_batch(texts), cut

    def _encode(self, tokens: NDArray[np.int64], request: Request) -> Floats:
        """Text states of every row of the denoiser's batch: all unconditional rows, then all conditional ones.

        As in diffusers, ``clip_skip`` concerns the prompt; the negative prompt is always encoded by all layers.
        """
        states = self._run("text_encoder", "last_hidden_state", input_ids=tokens)
        if request.clip_skip:
            skipped = self._run("text_encoder", "penultimate_hidden_state", input_ids=tokens[-1:])
            states = np.concatenate([states[:-1], skipped])
        return np.repeat(states, request.images, axis=0)

    def _predict(self, latents: Floats, index: int, plan: Plan, embeddings: Floats, request: Request) -> Floats:
        """The denoiser's prediction for ``latents`` at one row of the plan, guidance applied."""
        scaled = latents * np.float32(plan.input_scale[index])
        guided = request.guided_at(index, len(plan.timesteps))
        sample = np.concatenate([scaled, scaled]) if guided else scaled
        timestep = np.full(len(sample), plan.timesteps[index], np.float32)
        states = embeddings[-len(sample) :]  # the conditional rows come last
        prediction = self._run("unet", "out_sample", sample=sample, timestep=timestep, encoder_hidden_states=states)
        if not guided:
            return prediction
        unconditional, conditional = prediction[: len(latents)], prediction[len(latents) :]
        combined: Floats = unconditional + np.float32(request.guidance) * (conditional - unconditional)
        if request.guidance_rescale:
            combined *= _contrast_factor(combined, conditional, request.guidance_rescale)
        return combined

    def decode(self, latents: Floats) -> NDArray[np.uint8]:
        """Latents ``[images, channels, h, w]``, as a step yields them, to pixels ``[images, height, width, 3]``."""
        latent = self.manifest.latent
        sample = latents / np.float32(latent.scaling) + np.float32(latent.shift)
        pixels = self._run("vae_decoder", "sample", latent_sample=sample)
        scaled = np.clip(pixels / 2 + np.float32(0.5), 0, 1).transpose(0, 2, 3, 1) * 255
        return np.rint(scaled).astype(np.uint8, order="C")

    def _run(self, component: str, output: str, **feeds: Array) -> Floats:
        """One output of an engine in float32; every input is cast to the element type that its graph takes.

        Raises:
            EngineError: if the engine fails, or the output holds NaN or infinity, which would end in a black picture.
        """
        engine = self.engines[component]
        specs = engine.inputs
        outputs = engine.run(
            {
                name: array.astype(specs[name].dtype, copy=False) if name in specs else array
                for name, array in feeds.items()
            }
        )
        if output not in outputs:
            raise BundleError(f"{component} has no output {output!r}; it has {', '.join(outputs)}")
        values: Floats = outputs[output].astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise EngineError(
                f"{component} computed values that are not finite (NaN or infinity); "
                "run it at precision fp32, or with a lower guidance"
            )
        return values

    def close(self) -> None:
        """Close the engines; a second call does nothing. Requests that are being served fail."""
        self._closed = True
        for engine in self.engines.values():
            engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _contrast_factor(combined: Floats, conditional: Floats, share: float) -> Floats:
    """Factor ``[images, 1, 1, 1]`` that brings a ``share`` of the guided prediction to the conditional one's contrast.

    Lin et al. 2023 (arXiv 2305.08891), equations 15 and 16.
    """
    axes = tuple(range(1, combined.ndim))
    ratio = conditional.std(axis=axes, keepdims=True) / np.maximum(combined.std(axis=axes, keepdims=True), 1e-12)
    return np.asarray(share * ratio + (1 - share), np.float32)
