"""The model runner, which draws with one set of weights, and the switch that replaces it when LoRAs are put on."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Engine
from latentrt.engines.errors import EngineClosedError, InvalidRequestError

from .bundle.manifest import IMAGE_ENCODER, SAFETY_CHECKER
from .bundle.reader import Bundle
from .components.engine_choice import EngineSettings
from .components.lora_switching import LoraEngines, read_loras
from .components.offloading import Offloader, trim_memory
from .components.opened import OpenedEngines
from .components.opening import make_loop
from .denoising.latent_preparation import begin_from, start_run
from .denoising.run import PreparedLatents, Run
from .engine_calls import Conditioning, Floats
from .families import Family, Text
from .inputs.batch import Batch
from .inputs.prepared import PreparedRequests
from .lora.reading import AppliedLora, Lora, Loras
from .output.kinds import Decoding, OutputKind
from .output.result import Result, StepInfo, Timings, stacked_registers
from .output.safety_checker import check_images
from .request.request import Request
from .samplers.noise import Noise, SharedNoise, TorchGenerator
from .text.textual_inversion import Embeddings
from .text_encoding.encoding import PromptEncoder
from .text_encoding.image_prompt import encode_image_prompt, no_image_prompt
from .vae.decoding import encode_pixels
from .vae.tiling import Tiling


@dataclass(frozen=True)
class RunnerSettings:
    """Everything that the runners of one pipeline share, whichever LoRAs are on.

    Attributes:
        family: The bundle's family.
        kind: The family's output kind.
        embeddings: Words with vectors of their own.
        prompt_cache: Most bytes of encoded prompts that each runner keeps.
        max_batch: Most images of one call of the denoiser and of the decoder; ``None`` sets no limit.
        offloader: Opens and closes the engines, if only one may be open at a time.
    """

    family: Family
    kind: OutputKind
    embeddings: Embeddings
    prompt_cache: int
    max_batch: int | None
    offloader: Offloader | None


class ModelRunner:
    """Draws with one set of weights: those of the bundle, or with LoRAs. Serves many threads.

    A runner's weights never change. Requests in flight keep the runner that they began with.

    Args:
        settings: What all runners of the pipeline share.
        opened: Gives the engine of a component, opened when a request first needs it.
        loras: LoRAs that its weights contain, in their order.
        changed: Components whose weights are not the bundle's.

    Attributes:
        opened: As above.
        loras: As above.
        changed: As above.
        loop: The denoising loop.
        prompts: Encodes texts, and keeps them.
    """

    def __init__(
        self,
        settings: RunnerSettings,
        opened: OpenedEngines,
        loras: tuple[AppliedLora, ...] = (),
        changed: Collection[str] = (),
    ) -> None:
        self._settings, self._family, self._manifest = settings, settings.family, settings.family.manifest
        self.opened, self.loras, self.changed = opened, loras, changed
        self.loop = make_loop(opened.engines, settings.family, settings.max_batch, opened)
        self.prompts = PromptEncoder(settings.family, opened, self.loop, settings.embeddings, settings.prompt_cache)

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The engines that are open, by component."""
        return self.opened.engines

    def start(self, prepared: PreparedRequests) -> list[Run]:
        """Encode the texts and the image, and begin the loop, with a run for each request.

        Raises:
            EngineError: if an engine fails, or computes values that are not finite.
        """
        timings, requests = prepared.timings, prepared.batch.requests
        first = requests[0]
        noise: list[Noise | None] = [None] * len(requests)
        if prepared.batch.one_stream:
            noise = [*SharedNoise(TorchGenerator(first.seed), [first.images] * len(requests)).members()]
        if first.safety != "off":  # opened before anything is drawn: one that does not open would waste the images
            begin = time.perf_counter()
            self.opened(SAFETY_CHECKER)
            timings.safety_checker = time.perf_counter() - begin
        begun = self._prepare_latents(prepared, noise)
        begin = time.perf_counter()
        texts = self._texts(prepared, {} if begun is None else begun.conditioning)
        conditioned = iter(self.prompts.encode(texts, first, timings))
        encoded = time.perf_counter()
        timings.text_encoder += encoded - begin - timings.prompt
        shape, latents = self._family.latent_shape(first), prepared.batch.latents
        runs = [
            start_run(request, prepared.plan, [next(conditioned) for _ in own], shape, stream, latents, begun)
            for request, own, stream in zip(requests, prepared.texts, noise, strict=True)
        ]
        for run in runs:
            self.loop.begin_with(run, prepared.batch.control_images)
        timings.schedule += time.perf_counter() - encoded
        return runs

    def _prepare_latents(self, prepared: PreparedRequests, noise: list[Noise | None]) -> PreparedLatents | None:
        """The latents that the one request with an image begins with; its stream of noise goes on from there."""
        request, given = prepared.batch.requests[0], prepared.batch.given
        if given is None:
            return None
        start = time.perf_counter()
        noise[0] = stream = TorchGenerator(request.seed)
        found = begin_from(
            request,
            prepared.plan,
            given,
            self._manifest.latent,
            self._family.latent_shape(request),
            stream,
            functools.partial(encode_pixels, self.opened, self._manifest, request.vae_tiling),
            inpaints=self._family.inpaints,
        )
        prepared.timings.vae_encoder = time.perf_counter() - start
        return found

    def _texts(self, prepared: PreparedRequests, extra: Conditioning) -> list[tuple[Text, Conditioning]]:
        """Every prompt of every request with its own inputs of the denoiser, and the inputs that all prompts share."""
        prompted = self._encode_image_prompt(prepared.batch)
        found: list[tuple[Text, Conditioning]] = []
        for request, texts in zip(prepared.batch.requests, prepared.texts, strict=True):
            for number, text in enumerate(texts):
                negative = request.guided and number == 0
                vectors = self._family.vectors(request, negative=negative)
                found.append((text, {**vectors, **prompted[0 if negative else 1], **extra}))
        return found

    def _encode_image_prompt(self, batch: Batch) -> tuple[Conditioning, Conditioning]:
        """The denoiser's inputs of an image prompt: for the unconditional half, and for the conditional one."""
        if batch.image_prompt is None:
            none = no_image_prompt(self._family)
            return none, none
        scale = batch.requests[0].ip_adapter_scale
        return encode_image_prompt(self.opened(IMAGE_ENCODER), batch.image_prompt, 1.0 if scale is None else scale)

    def stream(self, prepared: PreparedRequests) -> Generator[StepInfo, None, list[Result]]:
        """Draw requests together, yielding after every call of the denoiser.

        Returns:
            As the generator's value, a result for each request.

        Raises:
            EngineError: if an engine fails, or computes values that are not finite.
        """
        try:
            runs, timings = self.start(prepared), prepared.timings
            first = runs[0]
            total = len(first)
            while not first.done:
                index, begin = first.index, time.perf_counter()
                self.loop.advance(runs)
                timings.step.append(time.perf_counter() - begin)
                scale = 1.0 if first.done else float(first.plan.input_scale[first.index])
                timestep, registers = float(first.plan.timesteps[index]), stacked_registers(runs)
                yield StepInfo(index, total, timestep, timings.step[-1], registers, scale)
            latents = np.concatenate([run.latents for run in runs])
            payload, flagged = self._output(first, latents, timings)
        finally:
            self.release()
        timings.add_up()
        found, count = [], first.request.images
        for number, (run, texts) in enumerate(zip(runs, prepared.texts, strict=True)):
            own = slice(number * count, (number + 1) * count)
            spent = dataclasses.replace(timings, step=list(timings.step))
            truncated = sum(text.truncated for text in texts)
            marks = None if flagged is None else flagged[own]
            kind = self._settings.kind.name
            found.append(Result(payload[own], latents[own], spent, run.request, truncated, marks, kind))
        return found

    def finish(self, run: Run) -> NDArray[Any]:
        """The payload of a run that is done, such as pixels ``[images, height, width, 3]``; sets ``run.flagged``.

        Raises:
            InvalidRequestError: if it is not done.
            EngineError: if an engine fails.
        """
        if not run.done:
            raise InvalidRequestError(f"the run has taken {run.index} of {len(run)} steps; advance it to its end")
        try:
            payload, run.flagged = self._settings.kind.check_safety(
                self.opened, self._decoded(run, run.latents), run.request.safety
            )
        finally:
            self.release()
        return payload

    def _output(self, run: Run, latents: Floats, timings: Timings) -> tuple[NDArray[Any], tuple[bool, ...] | None]:
        """Decode the latents of a run for its request's output, and say which entries are flagged."""
        kind, request = self._settings.kind, run.request
        begin = time.perf_counter()
        payload = kind.empty(self._family, request) if request.output == "latent" else self._decoded(run, latents)
        decoded = time.perf_counter()
        payload, flagged = kind.check_safety(self.opened, payload, request.safety)
        timings.vae_decoder = decoded - begin
        if flagged is not None:
            timings.safety_checker += time.perf_counter() - decoded
        return payload, flagged

    def _decoded(self, run: Run, latents: Floats) -> NDArray[Any]:
        """Decode the latents of a run with its request's decoder, and paste the result into the starting image."""
        payload = self.decode(latents, run.request.vae_tiling, run.request.decoder)
        paste = None if run.begun is None else run.begun.paste
        return payload if paste is None else paste.onto(payload)

    def decode(self, latents: Floats, vae_tiling: Tiling | None = None, decoder: str | None = None) -> NDArray[Any]:
        """Decode latents, see :meth:`latentrt.runtime.pipeline.Pipeline.decode`."""
        try:
            return self._settings.kind.decode(self._decoding(vae_tiling, decoder), latents)
        finally:
            self.release()

    def preview(self, step: StepInfo, vae_tiling: Tiling | None = None) -> NDArray[np.uint8]:
        """Images of the latents after a step, see :meth:`latentrt.runtime.pipeline.Pipeline.preview`."""
        try:
            return self._settings.kind.preview(self._decoding(vae_tiling), step.latents * np.float32(step.scale))
        finally:
            self.release()

    def preview_for(self, request: Request, step: StepInfo) -> NDArray[np.uint8]:
        """The preview that a request may show: if unsafe images are to be black, so are unsafe previews."""
        images = self.preview(step, request.vae_tiling)
        return check_images(self.opened, images, "black")[0] if request.safety == "black" else images

    def _decoding(self, tiling: Tiling | None, decoder: str | None = None) -> Decoding:
        return Decoding(self.opened, self._manifest, self._settings.max_batch, tiling, decoder)

    def release(self) -> None:
        """Close the open engine, if only one may be open at a time; other threads' requests open it again."""
        if self._settings.offloader is not None:
            self._settings.offloader.release()

    def close(self) -> None:
        """Close the engines, and forget the encoded texts. Requests in flight fail."""
        self.opened.close()
        self.prompts.clear()


class RunnerSwitch:
    """The runner of a pipeline, replaced as a whole when LoRAs are put on. Serves many threads.

    Args:
        bundle: The bundle.
        settings: What all runners share.
        engines: Opened engines by component.
        made: How the engines were made; ``None`` where the caller opened them: then no others can be.

    Attributes:
        current: The runner with the LoRAs that are on. It is replaced, never changed, so reading it needs no lock.
        aside: The runner with the LoRAs that a request named last, if these are others.
    """

    def __init__(
        self, bundle: Bundle, settings: RunnerSettings, engines: Mapping[str, Engine], made: EngineSettings | None
    ) -> None:
        self._bundle, self._settings = bundle, settings
        self._closed, self._lock = threading.Event(), threading.RLock()
        self._loras = None
        if made is not None:
            self._loras = LoraEngines(bundle, settings.family, made, settings.offloader, engines)
        self.current = self._new(engines, (), set())
        self.aside: ModelRunner | None = None

    def _new(self, engines: Mapping[str, Engine], loras: Sequence[Lora], changed: set[str]) -> ModelRunner:
        """A runner on these engines, which opens others with these LoRAs."""
        opener = None if self._loras is None else self._loras.opener(loras, changed)
        opened = OpenedEngines(engines, self._bundle.manifest.components, opener, self._closed)
        return ModelRunner(self._settings, opened, tuple(lora.applied for lora in loras), changed)

    def require_open(self) -> None:
        """Refuse to go on once the engines were closed.

        Raises:
            EngineClosedError: if they were.
        """
        if self._closed.is_set():
            raise EngineClosedError("the pipeline is closed; load the bundle again with Pipeline.load")

    def put_on(self, loras: Loras) -> None:
        """Replace the current runner, see :meth:`latentrt.runtime.pipeline.Pipeline.set_loras`."""
        with self._lock:
            self.current = self._with(loras)
        trim_memory()  # the memory of the weights before, unless a request in flight holds it

    def runner_for(self, loras: Loras | None) -> ModelRunner:
        """The runner of a request: with the LoRAs that it names, or the current one if it names none."""
        if loras is None:
            return self.current
        with self._lock:
            runner = self._with(loras)
            if runner.loras != self.current.loras:
                self.aside = runner
            return runner

    def _with(self, given: Loras) -> ModelRunner:
        """A runner with these LoRAs and no others; it shares all engines with the current one that they leave alone."""
        self.require_open()
        loras = read_loras(self._bundle, self._settings.family, given)
        wanted = tuple(lora.applied for lora in loras)
        for known in (self.current, self.aside):
            if known is not None and known.loras == wanted:
                return known
        if self._loras is None:
            raise InvalidRequestError("the engines were opened elsewhere; load the bundle with Pipeline.load for LoRAs")
        known_engines = {id(engine) for engine in self.current.engines.values()}
        engines, changed = self._loras.open(self.current.engines, loras, self.current.changed)
        if self._closed.is_set():  # while they were opened
            for engine in engines.values():
                if id(engine) not in known_engines:
                    engine.close()
            self.require_open()
        return self._new(engines, loras, changed)

    def close(self) -> None:
        """Close all engines; a second call does nothing. Requests in flight fail."""
        self.aside = None
        self.current.close()
        if self._loras is not None:
            self._loras.close()
