"""The pipeline: a bundle's face to callers, from a prompt to images."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Engine
from latentrt.engines.checks import check_choice, check_flag, check_integer, show
from latentrt.engines.errors import InvalidRequestError

from .bundle.reader import Bundle
from .components.engine_choice import EngineChoice, EngineSettings, FixedSize
from .components.offloading import Offloader
from .components.opened import OpenedEngines
from .components.opening import LOOPS as LOOPS
from .components.opening import embedding_widths, load_tokenizers, open_bundle
from .denoising.loop import Loop, check_together
from .denoising.run import Advancer, Run
from .engine_calls import Floats
from .families import family_of
from .inputs.batch import Batch
from .inputs.create import fixed_size_of
from .inputs.prepared import PreparedRequests, RequestPreparer
from .lora.reading import AppliedLora, Loras
from .output.kinds import output_kind
from .output.previews import PreviewOptions, take_previews
from .output.result import Result, StepInfo
from .request.options import RequestOptions
from .runner import ModelRunner, RunnerSettings, RunnerSwitch
from .text.textual_inversion import read_embeddings
from .vae.tiling import Tiling

_T = TypeVar("_T")

PROMPT_CACHE = 256 << 20
"""Bytes of encoded prompts that a pipeline keeps by default."""


class DrawOptions(RequestOptions, PreviewOptions, total=False):
    """Keywords of a request, with those that :class:`Request` does not keep."""

    latents: NDArray[Any] | None
    loras: Loras | None


class Pipeline:
    """A bundle opened for text to image. One pipeline may be used from many threads at once.

    Engines are opened once and shared; the state of a request lives with the request. A
    :class:`~latentrt.runtime.runner.ModelRunner` draws; putting LoRAs on replaces it by another.

    Args:
        bundle: The bundle.
        engines: Opened engines by component: text encoders, the denoiser or its stages, and the decoder of latents.
            They are closed together with the pipeline.
        prompt_cache: Most bytes of encoded prompts to keep, so that a prompt that comes again is not encoded again.
        engine_choice: The engine that was chosen, and why.
        fixed_size: The only size that the engines take, if there is one.
        max_batch: Most images of one call of the denoiser and of the decoder; ``None`` sets no limit.
        offloader: Opens and closes the engines, if they are
            :class:`~latentrt.runtime.components.offloading.OffloadedEngine`.
        embeddings: By word of prompts, the file with its vectors, see
            :mod:`latentrt.runtime.text.textual_inversion`.
        settings: How the engines were made. Components that are not among them are opened in the same way once a
            request needs them, and so are those that LoRAs change; without ``settings`` neither is possible.

    Raises:
        BundleError: if the bundle's family is unknown, or a tokenizer is missing.
        InvalidRequestError: if a file of an embedding does not fit.

    Attributes:
        bundle: The bundle.
        manifest: Its manifest.
        family: Its family.
        engine_choice: The engine that was chosen, and why.
        fixed_size: The only size that the engines take, if there is one.
        max_batch: Most images of one call.
        embeddings: Words with vectors of their own.
        tokenizers: Tokenizers by name.
    """

    def __init__(
        self,
        bundle: Bundle,
        engines: Mapping[str, Engine],
        *,
        prompt_cache: int = PROMPT_CACHE,
        engine_choice: EngineChoice | None = None,
        fixed_size: FixedSize | None = None,
        max_batch: int | None = None,
        offloader: Offloader | None = None,
        embeddings: Mapping[str, str | os.PathLike[str]] | None = None,
        settings: EngineSettings | None = None,
    ) -> None:
        self.bundle = bundle
        self.engine_choice = engine_choice or EngineChoice("custom", "the caller opened the engines")
        self.fixed_size = fixed_size
        self.manifest = bundle.manifest
        self.family = family_of(self.manifest)
        self.max_batch = fixed_size.images if fixed_size else max_batch
        self.embeddings = read_embeddings(embeddings or {}, embedding_widths(engines, self.family))
        self.tokenizers = load_tokenizers(bundle, self.family, self.embeddings)
        kind = output_kind(self.family.output_kind)
        self._preparer = RequestPreparer(self.family, kind, self.tokenizers, self.embeddings, fixed_size)
        shared = RunnerSettings(self.family, kind, self.embeddings, prompt_cache, self.max_batch, offloader)
        self._runners = RunnerSwitch(bundle, shared, engines, settings)

    @property
    def engines(self) -> Mapping[str, Engine]:
        """Opened engines by component; :attr:`opened` opens others that the bundle has."""
        return self._runners.current.engines

    @property
    def opened(self) -> OpenedEngines:
        """Gives the engine of a component, opened now if no request needed it before."""
        return self._runners.current.opened

    @property
    def loop(self) -> Loop:
        """The denoising loop of requests that begin now."""
        return self._runners.current.loop

    @property
    def loras(self) -> tuple[AppliedLora, ...]:
        """LoRAs that are on, in their order."""
        return self._runners.current.loras

    @property
    def cached_prompts(self) -> int:
        """How many encoded texts are kept."""
        return len(self._runners.current.prompts)

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
        max_batch: int | None = None,
        low_memory: bool = False,
        verify_hash: bool = False,
        embeddings: Mapping[str, str | os.PathLike[str]] | None = None,
        loras: Loras = (),
        switchable: bool = False,
    ) -> Self:
        """Open a bundle.

        Args:
            path: Directory that ``latentrt build-engine`` wrote.
            engine: One of :data:`~latentrt.runtime.components.engine_choice.ENGINES`, or ``"auto"`` for the best that
                can run here; :attr:`engine_choice` says which that is, and why.
            precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"``, ``"fp8"``, or ``None`` for the highest there is.
            threads: Threads inside an operator on a CPU; 0 is automatic.
            loop: ``"fused"`` runs the denoiser in stages, with guidance and the sampler's update inside its engine;
                ``"plain"`` runs it whole, with both in numpy. ``"auto"`` is fused wherever the bundle has the stages.
            prompt_cache: Most bytes of encoded prompts to keep; 0 keeps nothing.
            engine_cache: ``"read"`` opens models that OpenVINO has compiled and the bundle keeps, where they fit;
                ``"write"`` also stores those that had to be compiled; ``"off"`` opens none.
            fixed_size: Width and height in pixels and number of images, the only ones that this pipeline draws;
                ``None`` in place of a number is the bundle's default, or one image. OpenVINO is faster then.
            max_batch: Most images of one call of the denoiser and of the decoder; more take several calls. ``None`` is
                the limit of compiled plans, or else no limit.
            low_memory: Open each component when it is called, and close it when another is. Only the largest component
                is in memory at a time then, and every request reads all weights anew.
            verify_hash: Hash every file of the bundle first.
            embeddings: By word of prompts, the safetensors file of its textual inversion.
            loras: LoRAs to put on, see :meth:`set_loras`.
            switchable: With ONNX Runtime on a CPU: leave weights that LoRAs change exchangeable, so that putting one
                on opens nothing anew. Steps are a little slower, and images differ in the last bits from those of a
                pipeline without.

        Raises:
            BundleError: if the bundle is missing, damaged, hostile, or lacks what is asked for.
            EngineUnavailableError: if the engine cannot run here.
            InvalidRequestError: for an unknown engine, precision or loop, a size that cannot be drawn, or an embedding
                that does not fit.
            SourceError: if a LoRA is damaged, or one for another model.
        """
        check_choice("loop", loop, LOOPS)
        for name, flag in (("low_memory", low_memory), ("verify_hash", verify_hash), ("switchable", switchable)):
            check_flag(name, flag)
        check_integer("prompt_cache", prompt_cache, 0, hint=" bytes, and 0 keeps nothing")
        if max_batch is not None:
            max_batch = check_integer("max_batch", max_batch, 1, hint=" images, or None for no limit")
        bundle = Bundle.open(Path(path), verify_hash=verify_hash)
        if fixed_size is not None and (not isinstance(fixed_size, Sequence) or len(fixed_size) != 3):
            raise InvalidRequestError(f"fixed_size is {show(fixed_size)}, expected width, height and number of images")
        size = None if fixed_size is None else fixed_size_of(bundle, *fixed_size)
        if size is not None and max_batch is not None and max_batch < size.images:
            raise InvalidRequestError(
                f"max_batch is {max_batch}, and engines for {size.images} images are asked for; give one of the two"
            )
        opened = open_bundle(
            bundle,
            loop,
            EngineSettings(engine, precision, threads, engine_cache, size, verify_hash, low_memory, switchable),
        )
        most = opened.max_batch
        with ExitStack() as stack:
            for each in opened.engines.values():
                stack.callback(each.close)
            pipeline = cls(
                bundle,
                opened.engines,
                prompt_cache=prompt_cache,
                engine_choice=opened.choice,
                fixed_size=size,
                max_batch=max_batch if most is None else min(most, max_batch or most),
                offloader=opened.offloader,
                embeddings=embeddings,
                settings=opened.settings,
            )
            if loras:
                stack.callback(pipeline.close)
                pipeline.set_loras(loras)
            stack.pop_all()
        return pipeline

    def __call__(self, prompt: str, **options: Unpack[DrawOptions]) -> Result:
        """Draw images of ``prompt``.

        Args:
            prompt: What to draw.
            options: ``negative_prompt``, ``steps``, ``guidance``, ``seed``, ``sampler``, ``width``, ``height``,
                ``images`` and so on: the fields of :class:`~latentrt.runtime.request.request.Request`. An option that
                is left out or ``None`` is the bundle's default. Some are for models of some families alone.
                ``latents``, ``[k, channels, h, w]`` for images, take the place of the seed's noise; with
                ``denoising_start`` they are those of a run that ended there with ``denoising_end``, of this model or of
                another. ``on_preview`` is called with a :class:`~latentrt.runtime.output.previews.Preview` after every
                ``preview_every`` calls of the denoiser. ``loras`` are those of this request alone, as for
                :meth:`set_loras`; the pipeline keeps those open that a request named last.

        Raises:
            InvalidRequestError: before anything is computed.
            EngineError: if an engine fails, or computes values that are not finite.
            EngineClosedError: if the pipeline was closed.
        """
        return _last(self.stream(prompt, **options))

    def stream(self, prompt: str, **options: Unpack[DrawOptions]) -> Generator[StepInfo, None, Result]:
        """Draw images, yielding after every call of the denoiser; the generator's return value is the result.

        The request is checked at once, before the first ``next``. Closing the generator (or dropping it) cancels
        the request. Takes what :meth:`__call__` takes.

        Example:
            >>> def draw(pipe):  # doctest: +SKIP
            ...     result = yield from pipe.stream("a red apple", steps=20)
        """
        return _single(self._stream(Batch.single, prompt, options))

    def batch(self, prompts: Sequence[str], **options: Any) -> list[Result]:
        """Draw images of several prompts together, each step with one call of the denoiser for all.

        Args:
            prompts: What to draw.
            options: As for :meth:`__call__`, the same for all prompts; ``images`` are those of each. Texts may be lists
                with one for each prompt. So may be ``seed``: then each prompt gets the images that it gets alone, to
                rounding. With one seed for all, their noise is one stream, as from one generator in diffusers.

        Returns:
            A result for each prompt. Timings are those of the whole batch.

        Raises:
            InvalidRequestError: before anything is computed.
            EngineError: if an engine fails, or computes values that are not finite.
            EngineClosedError: if the pipeline was closed.
        """
        return _last(self.stream_batch(prompts, **options))

    def stream_batch(self, prompts: Sequence[str], **options: Any) -> Generator[StepInfo, None, list[Result]]:
        """As :meth:`batch`, yielding after every step, with the latents of all images one prompt after the other."""
        return self._stream(Batch.create, prompts, options)

    def _stream(
        self, create: Callable[..., Batch], prompts: object, options: Mapping[str, Any]
    ) -> Generator[StepInfo, None, list[Result]]:
        """The steps of a batch that was checked, with previews where they are wanted."""
        rest, previews = take_previews(options)
        if previews is not None:
            self._preparer.check_previews()
        runner, prepared = self._prepare(create, prompts, rest)
        steps = runner.stream(prepared)
        if previews is None:
            return steps
        return previews.of(steps, functools.partial(runner.preview_for, prepared.batch.requests[0]))

    def _prepare(
        self, create: Callable[..., Batch], prompts: object, options: Mapping[str, Any]
    ) -> tuple[ModelRunner, PreparedRequests]:
        """Check everything that can be checked without an engine, for the runner with the LoRAs of the request."""
        rest = {name: value for name, value in options.items() if name != "loras"}
        runner = self._runners.runner_for(options.get("loras"))
        self._runners.require_open()
        return runner, self._preparer.prepare(create, prompts, rest, runner.loop, runner.loras)

    def start(self, prompt: str, **options: Unpack[DrawOptions]) -> Run:
        """Begin a request that :meth:`advance` takes further, together with others.

        Takes what :meth:`__call__` takes, and encodes the texts at once. Dropping the run cancels the request.

        Example:
            >>> def draw(pipe):  # doctest: +SKIP
            ...     runs = [pipe.start("a red apple", sampler="euler"), pipe.start("a rocket", steps=8)]
            ...     while running := [run for run in runs if not run.done]:
            ...         pipe.advance(running)
            ...     return [pipe.finish(run) for run in runs]
        """
        try:
            runner, prepared = self._prepare(Batch.single, prompt, options)
            (run,) = runner.start(prepared)
            return run
        finally:
            self._runners.current.release()

    def advance(self, runs: Sequence[Run]) -> None:
        """Take every run one step further, with one call of the denoiser for all, or as few as ``max_batch`` allows.

        Runs may join and leave between calls. They may differ in everything but the size of their images, and each
        gets the image that it gets alone, to rounding. A run must not be in two calls at the same time. Runs that
        began with other LoRAs take a call of their own.

        Raises:
            InvalidRequestError: if a run is done or there twice, or sizes differ.
            EngineError: if the engine fails or computes values that are not finite; no run of that call has moved then.
        """
        self._runners.require_open()
        apart: dict[Advancer, list[Run]] = {}
        for run in runs:
            apart.setdefault(run.loop or self.loop, []).append(run)
        try:
            if len(apart) != 1:
                check_together(runs)
            for loop, together in apart.items():
                loop.advance(together)
        except BaseException:
            self._runners.current.release()
            raise

    def finish(self, run: Run) -> NDArray[Any]:
        """The output of a run that is done: of images, pixels ``[images, height, width, 3]``.

        If its request has images checked, ``run.flagged`` says afterwards which are unsafe.

        Raises:
            InvalidRequestError: if the run is not done.
            EngineError: if an engine fails.
        """
        return self._runners.current.finish(run)

    def set_loras(self, loras: Loras) -> None:
        """Put LoRAs on in place of those that are: on the bundle's own weights, whatever was on before.

        Only the components that they change are opened anew. Requests in flight finish as they began, and hold the
        memory of their weights until then; requests that come meanwhile are not held up.

        Args:
            loras: Safetensors files, or pairs of a file and its scale, which are added one after the other; nothing
                takes all off.

        Raises:
            SourceError: if a file is damaged, no LoRA, or one for another model. Nothing has changed then, as for the
                other errors.
            BundleError: if the bundle does not say which layers it has.
            InvalidRequestError: for a scale that is no number, or a plan that was not built to be refitted.
            EngineError: if an engine does not open.
        """
        self._runners.put_on(loras)

    def preview(self, step: StepInfo, vae_tiling: Tiling | None = None) -> NDArray[np.uint8]:
        """Images of the latents after a step, uint8 ``[images, height, width, 3]``, with the noise that is left.

        A tiny decoder draws them where the bundle has one. No safety checker checks them.
        """
        return self._runners.current.preview(step, vae_tiling)

    def decode(self, latents: Floats, vae_tiling: Tiling | None = None, decoder: str | None = None) -> NDArray[Any]:
        """Latents, as a step yields them, to the output: of images, pixels ``[images, height, width, 3]``.

        No safety checker checks them.

        Args:
            latents: float32, of the family's shape, ``[images, channels, h, w]`` for images.
            vae_tiling: How to cut large images into tiles; ``None`` decodes them whole.
            decoder: ``"full"``, the model's own, or ``"tiny"``, where the bundle has one.

        Raises:
            InvalidRequestError: if there is no such decoder.
            EngineError: if the engine fails, or computes values that are not finite.
        """
        return self._runners.current.decode(latents, vae_tiling, decoder)

    def close(self) -> None:
        """Close the engines; a second call does nothing. Requests in flight fail."""
        self._runners.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _single(steps: Generator[StepInfo, None, list[_T]]) -> Generator[StepInfo, None, _T]:
    """The same steps, with the one result of a batch of one."""
    (result,) = yield from steps
    return result


def _last(stream: Generator[StepInfo, None, _T]) -> _T:
    """Run a stream to its end."""
    while True:
        try:
            next(stream)
        except StopIteration as stop:
            result: _T = stop.value
            return result
