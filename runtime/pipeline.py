"""From a prompt, and maybe a picture, through the denoising loop to pixels."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Engine
from latentrt.engines.errors import EngineClosedError, EngineUnavailableError, InvalidRequestError

from .bundle.manifest import IMAGE_ENCODER, SAFETY_CHECKER, TINY_DECODER
from .bundle.reader import Bundle
from .components.engine_choice import EngineChoice, EngineSettings, FixedSize, choose_engine, most_pictures
from .components.lora_switching import LoraEngines, read_loras
from .components.offloading import Offloader, trim_memory
from .components.opened import OpenedEngines
from .components.opening import components_for, embedding_widths, load_tokenizers, make_loop, open_engines
from .denoising.controlnets import ControlNets
from .denoising.latent_preparation import begin_from, start_run
from .denoising.loop import Loop, check_together
from .denoising.run import PreparedLatents, Run
from .engine_calls import Conditioning, Floats, outputs_of
from .families import Text, family_of
from .inputs.batch import Batch
from .inputs.create import fixed_size_of
from .inputs.prepared import PreparedRequests
from .lora.reading import AppliedLora, Lora, Loras
from .output.previews import PreviewOptions, Previews, take_previews
from .output.result import Result, StepInfo, Timings, stacked_registers
from .output.safety_checker import check_pictures
from .request.control import Control
from .request.options import RequestOptions
from .request.request import Request
from .samplers.noise import Noise, SharedNoise, TorchGenerator
from .text.textual_inversion import EXTRA_EMBEDDINGS, read_embeddings
from .text_encoding.cache import TensorCache
from .text_encoding.image_prompt import encode_picture, no_picture
from .vae.decoding import decode_latents, encode_pixels
from .vae.tiling import Tiling

_T = TypeVar("_T")

LOOPS = ("auto", "fused", "plain")
"""Ways to run the denoising loop."""

PROMPT_CACHE = 256 << 20
"""Bytes of encoded texts that a pipeline keeps unless told otherwise."""


class DrawOptions(RequestOptions, PreviewOptions, total=False):
    """Keywords of a request, with those that :class:`Request` does not keep."""

    latents: NDArray[Any] | None
    loras: Loras | None


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
        max_batch: Most pictures that the denoiser and the decoder are given at a time; ``None`` sets no limit.
        turns: What opens and closes the engines, if they are
            :class:`~latentrt.runtime.components.offloading.OffloadedEngine`.
        embeddings: By word of prompts, files with vectors that it stands for, see
            :mod:`latentrt.runtime.text.textual_inversion`.
        settings: What the engines were made with. Components that are not among them are opened so, once a request
            needs them, and those that LoRAs change; without it neither can be.

    Raises:
        InvalidRequestError: if a file of an embedding does not fit.

    Attributes:
        embeddings: Words with vectors of their own.
        family: What the bundle's family does.
        opened: Gives the engine of a component, opened now if no request needed it before.
        loras: LoRAs that are on, in their order.
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
        max_batch: int | None = None,
        turns: Offloader | None = None,
        embeddings: Mapping[str, str | os.PathLike[str]] | None = None,
        settings: EngineSettings | None = None,
    ) -> None:
        self.bundle = bundle
        self.engine_choice = engine_choice or EngineChoice("custom", "the caller opened the engines")
        self.fixed_size = fixed_size
        self.manifest = bundle.manifest
        self.family = family_of(self.manifest)
        self.max_batch = fixed_size.images if fixed_size else max_batch
        self._shut, self._turns = threading.Event(), turns
        self._switch = None if settings is None else LoraEngines(bundle, self.family, settings, turns, engines)
        self._changed: set[str] = set()  # components with other weights than the bundle's
        self._use(engines, ())
        self._texts = TensorCache(prompt_cache)
        self.embeddings = read_embeddings(embeddings or {}, embedding_widths(self.engines, self.family))
        self.tokenizers = load_tokenizers(bundle, self.family, self.embeddings)
        self.loras: tuple[AppliedLora, ...] = ()
        self._prompt_cache = prompt_cache
        self._aside: Pipeline | None = None  # with the LoRAs that a request named last
        self._lock = threading.Lock()
        self._switching = threading.RLock()

    @property
    def engines(self) -> Mapping[str, Engine]:
        """Opened engines by component; :attr:`opened` opens others that the bundle has."""
        return self.opened.engines

    def _use(self, engines: Mapping[str, Engine], loras: Sequence[Lora]) -> None:
        """Draw with these engines, and open others with these LoRAs."""
        opener = None if self._switch is None else self._switch.opener(loras, self._changed)
        self.opened = OpenedEngines(engines, self.manifest.components, opener, self._shut)
        self.loop = make_loop(engines, self.family, self.max_batch)
        self.loop.control = ControlNets(
            self.opened, tuple(self.manifest.components), self.family.denoiser, fused=self.loop.name == "fused"
        )

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
            prompt_cache: Most bytes to keep of texts that were encoded; 0 keeps nothing.
            engine_cache: ``"read"`` opens models that OpenVINO has compiled and the bundle keeps, where they fit;
                ``"write"`` also stores what had to be compiled; ``"off"`` opens none.
            fixed_size: Width and height in pixels and number of images, the only ones that this pipeline draws;
                ``None`` in place of a number is the bundle's default, or one image. OpenVINO is faster then.
            max_batch: Most pictures that the denoiser and the decoder are given at a time; more take several calls.
                ``None`` is what compiled plans take, or else no limit.
            low_memory: Open each component when its turn comes, and close it when another's does. So there is only the
                largest in memory at a time, and every request reads all weights anew.
            verify_hash: Hash every file of the bundle first.
            embeddings: By word of prompts, a safetensors file of a textual inversion that it stands for.
            loras: LoRAs to put on, see :meth:`set_loras`.
            switchable: With ONNX Runtime on a CPU: leave weights that LoRAs change exchangeable, so that putting one
                on opens nothing anew. Steps are a little slower, and pictures differ in the last bits from those of a
                pipeline without.

        Raises:
            BundleError: if the bundle is missing, damaged, hostile, or lacks what is asked for.
            EngineUnavailableError: if the engine cannot run here.
            InvalidRequestError: for an unknown engine, precision or loop, a size that cannot be drawn, or an embedding
                that does not fit.
            SourceError: if a LoRA is damaged, or one for another model.
        """
        if loop not in LOOPS:
            raise InvalidRequestError(f"unknown loop {loop!r}; known loops: {', '.join(LOOPS)}")
        if type(prompt_cache) is not int or prompt_cache < 0:
            raise InvalidRequestError(f"prompt_cache is {prompt_cache!r}, expected a number of bytes, or 0 for none")
        if max_batch is not None and (type(max_batch) is not int or max_batch < 1):
            raise InvalidRequestError(
                f"max_batch is {max_batch!r}, expected a number of pictures, or None for no limit"
            )
        bundle = Bundle.open(Path(path), verify_hash=verify_hash)
        size = None if fixed_size is None else fixed_size_of(bundle, *fixed_size)
        if size is not None and max_batch is not None and max_batch < size.images:
            raise InvalidRequestError(
                f"max_batch is {max_batch}, and engines for {size.images} pictures are asked for; give one of the two"
            )
        if switchable and low_memory:
            raise InvalidRequestError("switchable keeps engines open, and low_memory closes them; give one of the two")
        settings = EngineSettings(engine, precision, threads, engine_cache, size, verify_hash, low_memory, switchable)
        components = components_for(bundle, loop)
        failed: dict[str, str] = {}
        turns = Offloader() if low_memory else None
        with ExitStack() as stack:
            while True:
                choice = choose_engine(bundle, components, settings, failed)
                if switchable and choice.name != "onnxruntime":
                    raise InvalidRequestError(
                        f"switchable is for onnxruntime on a CPU, and the engine is {choice.name}"
                    )
                try:
                    chosen = dataclasses.replace(settings, name=choice.name)
                    engines = open_engines(bundle, components, chosen, turns)
                    break
                except EngineUnavailableError as error:
                    if settings.name != "auto":
                        raise
                    failed[choice.name] = str(error)  # there, as far as could be seen, and yet it does not start
            for opened in engines.values():
                stack.callback(opened.close)
            most = most_pictures(bundle, components, chosen)
            pipeline = cls(
                bundle,
                engines,
                prompt_cache=prompt_cache,
                engine_choice=choice,
                fixed_size=size,
                max_batch=max_batch if most is None else min(most, max_batch or most),
                turns=turns,
                embeddings=embeddings,
                settings=chosen,
            )
            if loras:
                stack.callback(pipeline.close)
                pipeline.set_loras(loras)
            stack.pop_all()
        return pipeline

    def __call__(self, prompt: str, **options: Unpack[DrawOptions]) -> Result:
        """Draw pictures of ``prompt``.

        Args:
            prompt: What to draw.
            options: ``negative_prompt``, ``steps``, ``guidance``, ``seed``, ``sampler``, ``width``, ``height``,
                ``images`` and so on: the fields of :class:`~latentrt.runtime.request.request.Request`. What is left
                out or ``None`` is the bundle's default. Some are for models of some families alone.
                ``latents``, ``[k, channels, h, w]``, take the place of the seed's noise; with ``denoising_start`` they
                are those of a run that ended there with ``denoising_end``, of this model or of another.
                ``on_preview`` is called with a :class:`~latentrt.runtime.output.previews.Preview` after every
                ``preview_every`` calls of the denoiser. ``loras`` are those of this request alone, as for
                :meth:`set_loras`; of what requests name themselves the last is kept open.

        Raises:
            InvalidRequestError: before anything is computed.
            EngineError: if an engine fails, or computes values that are not finite.
            EngineClosedError: if the pipeline was closed.
        """
        return _last(self.stream(prompt, **options))

    def stream(self, prompt: str, **options: Unpack[DrawOptions]) -> Generator[StepInfo, None, Result]:
        """Draw pictures, yielding after every call of the denoiser; the generator's return value is the result.

        The request is checked at once, before the first ``next``. Closing the generator (or dropping it) cancels
        the request. Takes what :meth:`__call__` takes.

        Example:
            >>> def draw(pipe):  # doctest: +SKIP
            ...     result = yield from pipe.stream("a red apple", steps=20)
        """
        rest, previews = take_previews(options)
        pipe, rest = self._for(rest)
        return pipe._single(pipe._prepare(Batch.single, prompt, rest), previews)

    def batch(self, prompts: Sequence[str], **options: Any) -> list[Result]:
        """Draw pictures of several prompts together, each step with one call of the denoiser for all.

        Args:
            prompts: What to draw.
            options: As for :meth:`__call__`, the same for all prompts; ``images`` are those of each. Texts may be lists
                with one for each prompt. So may be ``seed``: then each prompt gets the pictures that it gets alone, to
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
        """As :meth:`batch`, yielding after every step, with the latents of all pictures one prompt after the other."""
        rest, previews = take_previews(options)
        pipe, rest = self._for(rest)
        return pipe._previewed(pipe._prepare(Batch.create, prompts, rest), previews)

    def _single(self, prepared: PreparedRequests, previews: Previews | None) -> Generator[StepInfo, None, Result]:
        (result,) = yield from self._previewed(prepared, previews)
        return result

    def _previewed(
        self, prepared: PreparedRequests, previews: Previews | None
    ) -> Generator[StepInfo, None, list[Result]]:
        if previews is None:
            return self._stream(prepared)
        draw = functools.partial(self._preview, prepared.batch.requests[0])
        return previews.of(self._stream(prepared), draw)

    def _preview(self, request: Request, step: StepInfo) -> NDArray[np.uint8]:
        """What a request may have shown: where unsafe pictures are to be black, unsafe previews are too."""
        images = self.preview(step, request.vae_tiling)
        return check_pictures(self.opened, images, "black")[0] if request.safety == "black" else images

    def _stream(self, prepared: PreparedRequests) -> Generator[StepInfo, None, list[Result]]:
        try:
            runs, timings = self._start(prepared), prepared.timings
            first = runs[0]
            total = len(first)
            while not first.done:
                index, begin = first.index, time.perf_counter()
                self._take_step(runs, self.loop)
                timings.step.append(time.perf_counter() - begin)
                scale = 1.0 if first.done else float(first.plan.input_scale[first.index])
                timestep, registers = float(first.plan.timesteps[index]), stacked_registers(runs)
                yield StepInfo(index, total, timestep, timings.step[-1], registers, scale)
            begin = time.perf_counter()
            latents = np.concatenate([run.latents for run in runs])
            request = first.request
            images = np.empty((0, request.height, request.width, 3), np.uint8)
            if request.output == "image":
                images = self.decode(latents, request.vae_tiling, request.decoder)
                images = self._pasted(first, images)
            decoded = time.perf_counter()
            images, flagged = check_pictures(self.opened, images, request.safety)
            timings.vae_decoder = decoded - begin
            if flagged is not None:
                timings.safety_checker += time.perf_counter() - decoded
        finally:
            self._rest()
        timings.total = timings.text_encoder + timings.prompt + timings.schedule + sum(timings.step)
        timings.total += timings.vae_decoder + timings.vae_encoder + timings.safety_checker
        found, count = [], first.request.images
        for number, (run, texts) in enumerate(zip(runs, prepared.texts, strict=True)):
            own = slice(number * count, (number + 1) * count)
            spent = dataclasses.replace(timings, step=list(timings.step))
            truncated = sum(text.truncated for text in texts)
            marks = None if flagged is None else flagged[own]
            found.append(Result(images[own], latents[own], spent, run.request, truncated, marks))
        return found

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
            pipe, rest = self._for(options)
            (run,) = pipe._start(pipe._prepare(Batch.single, prompt, rest))
            return run
        finally:
            self._rest()

    def advance(self, runs: Sequence[Run]) -> None:
        """Take every run one step further, with one call of the denoiser for all, or as few as ``max_batch`` allows.

        Runs may join and leave between calls. They may differ in everything but the size of their pictures, and each
        gets the picture that it gets alone, to rounding. A run must not be in two calls at the same time. Runs that
        began with other LoRAs take a call of their own.

        Raises:
            InvalidRequestError: if a run is done or there twice, or sizes differ.
            EngineError: if the engine fails or computes values that are not finite; no run of that call has moved then.
        """
        self._require_open()
        apart: dict[Loop, list[Run]] = {}
        for run in runs:
            apart.setdefault(run.loop or self.loop, []).append(run)
        try:
            if len(apart) != 1:
                check_together(runs)
            for loop, together in apart.items():
                self._take_step(together, loop)
        except BaseException:
            self._rest()
            raise

    def _take_step(self, runs: Sequence[Run], loop: Loop) -> None:
        loop.advance(runs)
        for run in runs:
            if run.begun is not None and run.begun.kept is not None:
                run.begun.kept.restore(run)

    def _pasted(self, run: Run, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        paste = None if run.begun is None else run.begun.paste
        return images if paste is None else paste.onto(images)

    def finish(self, run: Run) -> NDArray[np.uint8]:
        """Pixels ``[images, height, width, 3]`` of a run that is done.

        Where its request has pictures checked, ``run.flagged`` says afterwards which are unsafe.

        Raises:
            InvalidRequestError: if it is not.
            EngineError: if an engine fails.
        """
        if not run.done:
            raise InvalidRequestError(f"the run has taken {run.index} of {len(run)} steps; advance it to its end")
        try:
            images = self._pasted(run, self.decode(run.latents, run.request.vae_tiling, run.request.decoder))
            images, run.flagged = check_pictures(self.opened, images, run.request.safety)
        finally:
            self._rest()
        return images

    def _rest(self) -> None:
        """Close what is open, where components take turns; what other threads have under way opens it again."""
        if self._turns is not None:
            self._turns.rest()

    def _require_open(self) -> None:
        if self._shut.is_set():
            raise EngineClosedError("the pipeline is closed; load the bundle again with Pipeline.load")

    def set_loras(self, loras: Loras) -> None:
        """Put LoRAs on in place of those that are: on the bundle's own weights, whatever was on before.

        Only the components that they change are opened anew. Requests that are under way finish as they began, and hold
        the memory of their weights until then; those that come meanwhile are not held up.

        Args:
            loras: Safetensors files, or pairs of a file and its scale, which are added one after the other; nothing
                takes all off.

        Raises:
            SourceError: if a file is damaged, no LoRA, or one for another model. Nothing has changed then, as for the
                other errors.
            BundleError: if the bundle does not say which layers it has.
            InvalidRequestError: for a scale that is none, or a plan that was not built to be refitted.
            EngineError: if an engine does not open.
        """
        with self._switching:
            new = self._with_loras(loras)
            with self._lock:
                for name in ("opened", "loop", "loras", "_texts", "_changed"):
                    setattr(self, name, getattr(new, name))
        trim_memory()  # what the weights before took, unless a request is under way

    def _for(self, options: Mapping[str, Any]) -> tuple[Pipeline, dict[str, Any]]:
        """The pipeline as it stands, or with the LoRAs that a request names, and the request's other options."""
        rest = {name: value for name, value in options.items() if name != "loras"}
        if options.get("loras") is None:
            return self._snapshot(), rest
        with self._switching:
            pipe = self._with_loras(options["loras"])
            if pipe.loras != self.loras:
                self._aside = pipe
            return pipe, rest

    def _snapshot(self) -> Pipeline:
        """The pipeline as it stands, which goes on as it is when other LoRAs are put on."""
        with self._lock:
            snapshot = copy.copy(self)
        snapshot._aside = None
        return snapshot

    def _with_loras(self, given: Loras) -> Pipeline:
        """A pipeline with these LoRAs and no others; it shares all engines with this one that they leave alone."""
        self._require_open()
        loras = read_loras(self.bundle, self.family, given)
        wanted = tuple(lora.applied for lora in loras)
        for known in (self, self._aside):
            if known is not None and known.loras == wanted:
                return known._snapshot()
        if self._switch is None:
            raise InvalidRequestError("the engines were opened elsewhere; load the bundle with Pipeline.load for LoRAs")
        new = self._snapshot()
        engines, new._changed = self._switch.open(new.engines, loras, new._changed)
        new._use(engines, loras)
        new._texts = TensorCache(self._prompt_cache)
        new.loras = wanted
        return new

    def _prepare(self, create: Callable[..., Batch], prompts: object, options: Mapping[str, Any]) -> PreparedRequests:
        """Check everything that can be checked without an engine."""
        self._require_open()
        batch = create(self.manifest, prompts, self._sized(options))
        if self.loras:
            requests = tuple(dataclasses.replace(request, loras=self.loras) for request in batch.requests)
            batch = dataclasses.replace(batch, requests=requests)
        tiling, size = batch.requests[0].vae_tiling, self.fixed_size
        if size is not None and tiling is not None and tiling.splits(size.width, size.height):
            raise InvalidRequestError(
                f"this pipeline's decoder was loaded for {size.width}x{size.height} alone, and tiles of {tiling.size} "
                "are asked for; load a pipeline without fixed_size"
            )
        start = time.perf_counter()
        plan = self.family.plan(batch.requests[0])
        self.loop.check(plan)
        planned = time.perf_counter()
        if self.embeddings.records:
            records = self.embeddings.records
            requests = tuple(dataclasses.replace(each, embeddings=records) for each in batch.requests)
            batch = dataclasses.replace(batch, requests=requests)
        texts = [self.family.texts(request, self.tokenizers) for request in batch.requests]
        if size is not None and any(len(ids) > 1 for each in texts for text in each for ids in text.tokens.values()):
            raise InvalidRequestError(
                "this pipeline was loaded for texts of one chunk of tokens alone, and the prompt takes more; "
                "load a pipeline without fixed_size"
            )
        timings = Timings(schedule=planned - start, text_encoder=time.perf_counter() - planned)
        return PreparedRequests(batch, plan, texts, timings)

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

    def _start(self, prepared: PreparedRequests) -> list[Run]:
        """Encode the texts and begin the loop, with a run for each request."""
        timings, requests = prepared.timings, prepared.batch.requests
        first = requests[0]
        noise: list[Noise | None] = [None] * len(requests)
        if prepared.batch.one_stream:
            noise = [*SharedNoise(TorchGenerator(first.seed), [first.images] * len(requests)).members()]
        if first.safety != "off":  # opened before anything is drawn: one that does not open would waste the pictures
            begin = time.perf_counter()
            self.opened(SAFETY_CHECKER)
            timings.safety_checker = time.perf_counter() - begin
        begun = self._begun(prepared, noise)
        begin = time.perf_counter()
        extra = {} if begun is None else begun.conditioning
        told = self._told(prepared.batch)
        wanted = [
            (
                text,
                {
                    **self.family.vectors(request, negative=request.guided and number == 0),
                    **told[0 if request.guided and number == 0 else 1],
                    **extra,
                },
            )
            for request, texts in zip(requests, prepared.texts, strict=True)
            for number, text in enumerate(texts)
        ]
        conditioned = iter(self._condition(wanted, timings, requests[0].control))
        encoded = time.perf_counter()
        timings.text_encoder += encoded - begin - timings.prompt
        latent = self.manifest.latent
        shape = (
            first.images,
            latent.channels,
            first.height // latent.vae_scale_factor,
            first.width // latent.vae_scale_factor,
        )
        latents = prepared.batch.latents
        runs = [
            start_run(request, prepared.plan, [next(conditioned) for _ in texts], shape, own, latents, begun)
            for request, texts, own in zip(requests, prepared.texts, noise, strict=True)
        ]
        for run in runs:
            run.loop = self.loop
            self.loop.begin(run)
            if run.request.control and self.loop.control is not None:
                self.loop.control.begin(run, prepared.batch.control_images)
        timings.schedule += time.perf_counter() - encoded
        return runs

    def _begun(self, prepared: PreparedRequests, noise: list[Noise | None]) -> PreparedLatents | None:
        """What the one request with a picture begins with; its stream of noise goes on from there."""
        request, given = prepared.batch.requests[0], prepared.batch.given
        if given is None:
            return None
        start = time.perf_counter()
        noise[0] = stream = TorchGenerator(request.seed)
        encode = functools.partial(encode_pixels, self.opened, self.manifest, request.vae_tiling)
        inpaints = self.family.inpaints
        found = begin_from(request, prepared.plan, given, self.manifest.latent, stream, encode, inpaints=inpaints)
        prepared.timings.vae_encoder = time.perf_counter() - start
        return found

    def _told(self, batch: Batch) -> tuple[Conditioning, Conditioning]:
        """What the denoiser is told of a picture in the prompt: in the unconditional half, and in the other."""
        if batch.image_prompt is None:
            none = no_picture(self.family)
            return none, none
        scale = batch.requests[0].ip_adapter_scale
        return encode_picture(self.opened(IMAGE_ENCODER), batch.image_prompt, 1.0 if scale is None else scale)

    def _condition(
        self, wanted: Sequence[tuple[Text, Conditioning]], timings: Timings, controls: Sequence[Control] = ()
    ) -> list[Conditioning]:
        """What texts come to, from the cache where they are there, with the vectors that come with each.

        Each component serves all texts before the next one does, for where components take turns.
        """
        names = tuple(each.name for each in controls)
        keys = [
            (
                text.key,
                names,
                tuple((n, v.tobytes()) for n, v in vectors.items() if names or n in self.loop.prompt_inputs),
            )
            for text, vectors in wanted
        ]
        found = {key: self._texts.get(key) for key in keys}
        missing = {key: each for key, each in zip(keys, wanted, strict=True) if found[key] is None}
        encoded: dict[Hashable, dict[str, dict[str, Floats]]] = {key: {} for key in missing}
        for name in self.family.text_encoders:
            for key, (text, _) in missing.items():
                if name in text.tokens:
                    # One by one: in a batch of two the last bits would depend on what else is in the cache.
                    chunks = [self._encoded(name, ids[None], text.outputs[name]) for ids in text.tokens[name]]
                    encoded[key][name] = {n: np.concatenate([each[n] for each in chunks]) for n in chunks[0]}
        begin = time.perf_counter()
        for key, (text, vectors) in missing.items():
            raw = {**self.family.condition(text, encoded[key]), **vectors}
            conditioning = self.loop.condition(raw)
            if controls and self.loop.control is not None:
                conditioning |= self.loop.control.condition(controls, raw)
            self._texts.put(key, conditioning)
            found[key] = conditioning
        if missing:
            timings.prompt += time.perf_counter() - begin
        return [
            {**known, **{name: values for name, values in vectors.items() if name in known}}
            for key, (_, vectors) in zip(keys, wanted, strict=True)
            if (known := found[key]) is not None
        ]

    def _encoded(self, name: str, ids: NDArray[np.int64], outputs: Sequence[str]) -> dict[str, Floats]:
        """Outputs of a text encoder for one chunk of tokens."""
        engine, feeds = self.engines[name], {"input_ids": ids}
        if (spec := engine.inputs.get(EXTRA_EMBEDDINGS)) is not None:
            feeds = self.embeddings.feeds(name, ids, spec)
        return outputs_of(engine, name, outputs, feeds)

    def preview(self, step: StepInfo, vae_tiling: Tiling | None = None) -> NDArray[np.uint8]:
        """The pictures as they stand after a step, uint8 ``[images, height, width, 3]``, with the noise that is left.

        A tiny decoder draws them where the bundle has one. No safety checker looks at them.
        """
        tiny = TINY_DECODER in self.manifest.components
        return self.decode(step.latents * np.float32(step.scale), vae_tiling, "tiny" if tiny else "full")

    def decode(
        self, latents: Floats, vae_tiling: Tiling | None = None, decoder: str | None = None
    ) -> NDArray[np.uint8]:
        """Latents ``[images, channels, h, w]``, as a step yields them, to pixels ``[images, height, width, 3]``.

        No safety checker looks at them.

        Args:
            latents: What to decode.
            vae_tiling: How to cut large pictures into tiles; ``None`` decodes them whole.
            decoder: ``"full"``, the model's own, or ``"tiny"``, where the bundle has one.

        Raises:
            InvalidRequestError: if there is no such decoder.
        """
        try:
            return decode_latents(self.opened, self.manifest, latents, vae_tiling, decoder, self.max_batch)
        finally:
            self._rest()

    def close(self) -> None:
        """Close the engines; a second call does nothing. Requests that are being served fail."""
        self._aside = None
        self.opened.close()
        self._texts.clear()
        if self._switch is not None:
            self._switch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _last(stream: Generator[StepInfo, None, _T]) -> _T:
    """Run a stream to its end."""
    while True:
        try:
            next(stream)
        except StopIteration as stop:
            result: _T = stop.value
            return result
