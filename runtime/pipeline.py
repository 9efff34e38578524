"""Text to image: from a prompt through the denoising loop to pixels."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Engine
from latentrt.engines.device import DeviceArray, to_numpy
from latentrt.engines.errors import BundleError, EngineClosedError, EngineUnavailableError, InvalidRequestError
from latentrt.engines.trt import share_arena

from .bundle import Bundle
from .cache import TensorCache
from .engine_choice import EngineChoice, EngineSettings, FixedSize, choose_engine, make_engine
from .families import Family, Text, family_of
from .loop import Conditioning, Floats, FusedLoop, Loop, PlainLoop, Run, output_of, outputs_of, start_run
from .manifest import TOKENIZER_FILE
from .request import Request, RequestOptions
from .samplers import Plan
from .tokenizers import PromptTokenizer, load_tokenizer

LOOPS = ("auto", "fused", "plain")
"""Ways to run the denoising loop."""

PROMPT_CACHE = 256 << 20
"""Bytes of encoded texts that a pipeline keeps unless told otherwise."""


@dataclass(frozen=True)
class StepInfo:
    """State of the loop after one call of the denoiser.

    Attributes:
        index: Number of this call, from 0.
        total: Number of calls of the whole run.
        timestep: Timestep that the denoiser was called at.
        elapsed: Seconds that this step took.
        registers: The sampler's state, float32 ``[images, R, channels, height / factor, width / factor]``, where the
            engine left it: on a GPU nothing is copied unless somebody looks.
    """

    index: int
    total: int
    timestep: float
    elapsed: float
    registers: Floats | DeviceArray = field(repr=False)

    @functools.cached_property
    def latents(self) -> Floats:
        """float32 ``[images, channels, height / factor, width / factor]``; a copy, made when it is first asked for."""
        return to_numpy(self.registers)[:, 0].copy()


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


@dataclass(frozen=True)
class _Prepared:
    """A request that was checked, before any engine ran."""

    request: Request
    plan: Plan
    texts: list[Text]
    timings: Timings


class Pipeline:
    """A bundle opened for text to image. One pipeline may be used from many threads at once.

    Engines are opened once and shared; all that belongs to a request lives with the request.

    Args:
        bundle: The bundle.
        engines: Opened engines for :func:`components_for`: text encoders, the denoiser or its stages, and the VAE's
            decoder; they are closed together with the pipeline.
        prompt_cache: Most bytes to keep of texts that were encoded, so that one that comes again is not encoded again.
        engine_choice: Which engine that is, and why.
        fixed_size: The only size that the engines take, if there is one.

    Attributes:
        family: What the bundle's family does.
        tokenizers: By name.
    """

    def __init__(
        self,
        bundle: Bundle,
        engines: Mapping[str, Engine],
        *,
        prompt_cache: int = PROMPT_CACHE,
        engine_choice: EngineChoice | None = None,
        fixed_size: FixedSize | None = None,
    ) -> None:
        self.bundle = bundle
        self.engine_choice = engine_choice or EngineChoice("custom", "the caller opened the engines")
        self.fixed_size = fixed_size
        self.engines = dict(engines)
        self.manifest = bundle.manifest
        self.family = family_of(self.manifest)
        self.loop = _make_loop(self.engines, self.family)
        self._texts = TensorCache(prompt_cache)
        self._closed = False
        self.tokenizers = _load_tokenizers(bundle, self.family)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        engine: str = "auto",
        *,
        precision: str | None = None,
        threads: int = 0,
        loop: str = "auto",
        prompt_cache: int = PROMPT_CACHE,
        engine_cache: str = "read",
        fixed_size: tuple[int | None, int | None, int | None] | None = None,
        verify_hash: bool = False,
    ) -> Self:
        """Open a bundle.

        Args:
            path: Directory that ``latentrt build-engine`` wrote.
            engine: One of :data:`~latentrt.runtime.engine_choice.ENGINES`, or ``"auto"`` for the best that can run
                here; :attr:`engine_choice` says which that is, and why.
            precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"``, ``"fp8"``, or ``None`` for the highest there is.
            threads: Threads inside an operator on a CPU; 0 is automatic.
            loop: ``"fused"`` runs the denoiser in stages, with guidance and the sampler's update inside its engine;
                ``"plain"`` runs it whole, with both in numpy. ``"auto"`` is fused wherever the bundle has the stages.
            prompt_cache: Most bytes to keep of texts that were encoded; 0 keeps nothing.
            engine_cache: ``"read"`` opens models that OpenVINO has compiled and the bundle keeps, where they fit;
                ``"write"`` also stores what had to be compiled; ``"off"`` opens none.
            fixed_size: Width and height in pixels and number of images, the only ones that this pipeline draws;
                ``None`` in place of a number is the bundle's default, or one image. OpenVINO is faster then.
            verify_hash: Hash every file of the bundle first.

        Raises:
            BundleError: if the bundle is missing, damaged, hostile, or lacks what is asked for.
            EngineUnavailableError: if the engine cannot run here.
            InvalidRequestError: for an unknown engine, precision or loop, or a size that cannot be drawn.
        """
        if loop not in LOOPS:
            raise InvalidRequestError(f"unknown loop {loop!r}; known loops: {', '.join(LOOPS)}")
        if type(prompt_cache) is not int or prompt_cache < 0:
            raise InvalidRequestError(f"prompt_cache is {prompt_cache!r}, expected a number of bytes, or 0 for none")
        bundle = Bundle.open(Path(path), verify_hash=verify_hash)
        size = None if fixed_size is None else _fixed_size(bundle, *fixed_size)
        settings = EngineSettings(engine, precision, threads, engine_cache, size, verify_hash)
        components = components_for(bundle, loop)
        failed: dict[str, str] = {}
        with ExitStack() as stack:
            while True:
                choice = choose_engine(bundle, components, settings, failed)
                try:
                    engines = _open(bundle, components, dataclasses.replace(settings, name=choice.name))
                    break
                except EngineUnavailableError as error:
                    if settings.name != "auto":
                        raise
                    failed[choice.name] = str(error)  # there, as far as could be seen, and yet it does not start
            for opened in engines.values():
                stack.callback(opened.close)
            pipeline = cls(bundle, engines, prompt_cache=prompt_cache, engine_choice=choice, fixed_size=size)
            stack.pop_all()
        return pipeline

    def __call__(self, prompt: str, **options: Unpack[RequestOptions]) -> Result:
        """Draw pictures of ``prompt``.

        Args:
            prompt: What to draw.
            options: ``negative_prompt``, ``steps``, ``guidance``, ``seed``, ``sampler``, ``width``, ``height``,
                ``images`` and so on: the fields of :class:`~latentrt.runtime.request.Request`. What is left out or
                ``None`` is the bundle's default. Some are for models of some families alone.

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
        return self._stream(self._prepare(prompt, options))

    def _stream(self, prepared: _Prepared) -> Generator[StepInfo, None, Result]:
        run, timings = self._start(prepared), prepared.timings
        total = len(run)
        while not run.done:
            index, begin = run.index, time.perf_counter()
            self.loop.advance([run])
            timings.step.append(time.perf_counter() - begin)
            yield StepInfo(index, total, float(run.plan.timesteps[index]), timings.step[-1], run.registers)
        begin = time.perf_counter()
        latents = run.latents.copy()
        images = self.decode(latents)
        timings.vae_decoder = time.perf_counter() - begin
        timings.total = timings.text_encoder + timings.prompt + timings.schedule + sum(timings.step)
        timings.total += timings.vae_decoder
        return Result(images, latents, timings, run.request, sum(text.truncated for text in prepared.texts))

    def start(self, prompt: str, **options: Unpack[RequestOptions]) -> Run:
        """Begin a request that :meth:`advance` takes further, together with others.

        Takes what :meth:`__call__` takes, and encodes the texts at once. Dropping the run cancels the request.

        Example:
            >>> def draw(pipe):  # doctest: +SKIP
            ...     runs = [pipe.start("a red apple", sampler="euler"), pipe.start("a rocket", steps=8)]
            ...     while running := [run for run in runs if not run.done]:
            ...         pipe.advance(running)
            ...     return [pipe.finish(run) for run in runs]
        """
        return self._start(self._prepare(prompt, options))

    def advance(self, runs: Sequence[Run]) -> None:
        """Take every run one step further, with one call of the denoiser for all.

        Runs may join and leave between calls. They may differ in everything but the size of their pictures, and each
        gets the picture that it gets alone, to rounding. A run must not be in two calls at the same time.

        Raises:
            InvalidRequestError: if a run is done or there twice, or sizes differ.
            EngineError: if the engine fails or computes values that are not finite; no run has moved then.
        """
        self._require_open()
        if self.fixed_size is not None and len(runs) > 1:
            raise InvalidRequestError("a pipeline with a fixed size takes one run at a time; load one without")
        self.loop.advance(runs)

    def finish(self, run: Run) -> NDArray[np.uint8]:
        """Pixels ``[images, height, width, 3]`` of a run that is done.

        Raises:
            InvalidRequestError: if it is not.
        """
        if not run.done:
            raise InvalidRequestError(f"the run has taken {run.index} of {len(run)} steps; advance it to its end")
        return self.decode(run.latents)

    def _require_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the pipeline is closed; load the bundle again with Pipeline.load")

    def _prepare(self, prompt: str, options: Mapping[str, Any]) -> _Prepared:
        """Check everything that can be checked without an engine."""
        self._require_open()
        request = Request.create(self.manifest, prompt, **self._sized(options))
        start = time.perf_counter()
        plan = self.family.plan(request)
        planned = time.perf_counter()
        texts = self.family.texts(request, self.tokenizers)
        timings = Timings(schedule=planned - start, text_encoder=time.perf_counter() - planned)
        return _Prepared(request, plan, texts, timings)

    def _sized(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options of a request, with the fixed size where there is one."""
        if self.fixed_size is None:
            return options
        fixed = dataclasses.asdict(self.fixed_size)
        for name, length in fixed.items():
            if options.get(name) not in (None, length):
                raise InvalidRequestError(
                    f"{name} is {options[name]}, and this pipeline was loaded for {length} alone; load one without "
                    "fixed_size for other sizes"
                )
        return {**options, **fixed}

    def _start(self, prepared: _Prepared) -> Run:
        """Encode the texts and begin the loop."""
        request, timings = prepared.request, prepared.timings
        begin = time.perf_counter()
        conditioning = [
            self._condition(text, self.family.vectors(request, negative=request.guided and number == 0), timings)
            for number, text in enumerate(prepared.texts)
        ]
        encoded = time.perf_counter()
        timings.text_encoder += encoded - begin - timings.prompt
        latent = self.manifest.latent
        shape = (request.images, latent.channels, request.height // latent.factor, request.width // latent.factor)
        run = start_run(request, prepared.plan, conditioning, shape)
        self.loop.begin(run)
        timings.schedule += time.perf_counter() - encoded
        return run

    def _condition(self, text: Text, vectors: Conditioning, timings: Timings) -> Conditioning:
        """What a text comes to, from the cache where it is there, with the vectors that come with it."""
        early = tuple((name, vectors[name].tobytes()) for name in vectors if name in self.loop.prompt_inputs)
        key = (text.key, early)
        found = self._texts.get(key)
        if found is None:
            # One by one: in a batch of two the last bits would depend on what else is in the cache.
            encoded = {
                name: outputs_of(self.engines[name], name, text.outputs[name], {"input_ids": ids})
                for name, ids in text.tokens.items()
            }
            begin = time.perf_counter()
            found = self.loop.condition({**self.family.condition(text, encoded), **vectors})
            timings.prompt += time.perf_counter() - begin
            self._texts.put(key, found)
        return {**found, **{name: values for name, values in vectors.items() if name in found}}

    def decode(self, latents: Floats) -> NDArray[np.uint8]:
        """Latents ``[images, channels, h, w]``, as a step yields them, to pixels ``[images, height, width, 3]``."""
        latent = self.manifest.latent
        sample = latents / np.float32(latent.scaling) + np.float32(latent.shift)
        pixels = output_of(self.engines["vae_decoder"], "vae_decoder", "sample", {"latent_sample": sample})
        scaled = np.clip(pixels / 2 + np.float32(0.5), 0, 1).transpose(0, 2, 3, 1) * 255
        return np.rint(scaled).astype(np.uint8, order="C")

    def close(self) -> None:
        """Close the engines; a second call does nothing. Requests that are being served fail."""
        self._closed = True
        self._texts.clear()
        for engine in self.engines.values():
            engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(bundle: Bundle, components: Sequence[str], settings: EngineSettings) -> dict[str, Engine]:
    """Opened engines by component; if one does not open, the others are closed."""
    engines = {component: make_engine(bundle, component, settings) for component in components}
    share_arena(engines.values())  # one component runs at a time
    with ExitStack() as stack:
        for engine in engines.values():
            stack.callback(engine.open().close)
        stack.pop_all()
    return engines


def _fixed_size(bundle: Bundle, width: int | None, height: int | None, images: int | None) -> FixedSize:
    """The size that was asked for, with the bundle's own where nothing was, checked as a request's is."""
    request = Request.create(bundle.manifest, "", width=width, height=height, images=1 if images is None else images)
    return FixedSize(request.width, request.height, request.images)


def components_for(bundle: Bundle, loop: str = "auto") -> tuple[str, ...]:
    """Components to open for a way to run the loop."""
    there, family = bundle.manifest.components, family_of(bundle.manifest)
    stages = family.stages()
    if loop == "fused" and stages[-1] not in there:
        raise BundleError(f"{bundle.path} holds no stages of its denoiser; build it again, or run the loop plain")
    whole = loop == "plain" or stages[-1] not in there
    denoiser = [family.denoiser] if whole else [stage for stage in stages if stage in there]
    return (*family.text_encoders, *denoiser, "vae_decoder")


def _load_tokenizers(bundle: Bundle, family: Family) -> dict[str, PromptTokenizer]:
    tokenizers = {}
    for name in {family.encoders[encoder]: None for encoder in family.text_encoders}:
        if name not in bundle.manifest.tokenizers:
            raise BundleError(f"{bundle.path} has no tokenizer named {name!r}, which text to image needs")
        settings = bundle.manifest.tokenizers[name]
        bundle.file(f"{settings.directory}/{TOKENIZER_FILE}")
        tokenizers[name] = load_tokenizer(
            bundle.path / settings.directory, settings.kind, settings.max_length, settings.pad_token_id
        )
    return tokenizers


def _make_loop(engines: Mapping[str, Engine], family: Family) -> Loop:
    denoiser = family.denoiser
    prompt, schedule, step = (engines.get(stage) for stage in family.stages())
    return PlainLoop(engines[denoiser], denoiser) if step is None else FusedLoop(step, prompt, schedule, denoiser)
