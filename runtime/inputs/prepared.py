"""From a caller's prompts and options to prepared requests: everything that can be checked without an engine is."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from latentrt.engines.errors import InvalidRequestError

from ..components.engine_choice import FixedSize
from ..denoising.loop import Loop
from ..families import Family, Text
from ..lora.reading import AppliedLora
from ..output.kinds import OutputKind
from ..output.result import Timings
from ..request.request import Request
from ..samplers import Plan
from ..text.textual_inversion import Embeddings
from ..text.tokenizers import PromptTokenizer
from .batch import Batch


@dataclass(frozen=True)
class PreparedRequests:
    """Requests that were checked, before any engine ran.

    Attributes:
        batch: The requests, with their images and latents.
        plan: The sampler's plan of all.
        texts: The tokenised texts of each request, the unconditional one first if it is guided.
        timings: Seconds so far: of the plan and of the tokenizers.
    """

    batch: Batch
    plan: Plan
    texts: list[list[Text]]
    timings: Timings


@dataclass(frozen=True)
class RequestPreparer:
    """Prepares the requests of one pipeline. Immutable, so one serves all threads.

    Attributes:
        family: The bundle's family.
        kind: The family's output kind.
        tokenizers: Tokenizers by name.
        embeddings: Words with vectors of their own.
        fixed_size: The only size that the engines take, if there is one.
    """

    family: Family
    kind: OutputKind
    tokenizers: Mapping[str, PromptTokenizer]
    embeddings: Embeddings
    fixed_size: FixedSize | None

    def check_previews(self) -> None:
        """Refuse previews of an output that has none.

        Raises:
            InvalidRequestError: saying so.
        """
        if not self.kind.previews:
            raise InvalidRequestError(f"there are no previews of {self.kind.name}; leave on_preview out")

    def prepare(
        self,
        create: Callable[..., Batch],
        prompts: object,
        options: Mapping[str, Any],
        loop: Loop,
        loras: tuple[AppliedLora, ...] = (),
    ) -> PreparedRequests:
        """Prepare requests.

        Args:
            create: :meth:`Batch.single <latentrt.runtime.inputs.batch.Batch.single>` or ``Batch.create``.
            prompts: What it takes as prompts.
            options: Options of the requests.
            loop: The loop that will advance them.
            loras: LoRAs that are on, which the requests record.

        Raises:
            InvalidRequestError: naming the first value that does not fit.
        """
        batch = create(self.family.manifest, prompts, self._sized(options))
        records = self.embeddings.records
        if loras or records:
            requests = tuple(dataclasses.replace(each, loras=loras, embeddings=records) for each in batch.requests)
            batch = dataclasses.replace(batch, requests=requests)
        self._check(batch)
        start = time.perf_counter()
        plan = self.family.plan(batch.requests[0])
        loop.check(plan)
        planned = time.perf_counter()
        texts = [self._texts(request) for request in batch.requests]
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

    def _check(self, batch: Batch) -> None:
        """Refuse tiles that the engines do not take, what the output does not have, and latents of another shape."""
        first, size = batch.requests[0], self.fixed_size
        tiling = first.vae_tiling
        if size is not None and tiling is not None and tiling.splits(size.width, size.height):
            raise InvalidRequestError(
                f"this pipeline's decoder was loaded for {size.width}x{size.height} alone, and tiles of {tiling.size} "
                "are asked for; load a pipeline without fixed_size"
            )
        self.kind.check(first)
        expected = self.family.latent_shape(first)
        if batch.latents is not None and batch.latents.shape != expected:
            raise InvalidRequestError(
                f"latents have the shape {list(batch.latents.shape)}, and the request's are {list(expected)}"
            )

    def _texts(self, request: Request) -> list[Text]:
        """The tokenised texts of a request."""
        texts = self.family.texts(request, self.tokenizers)
        if self.fixed_size is not None and any(len(ids) > 1 for text in texts for ids in text.tokens.values()):
            raise InvalidRequestError(
                "this pipeline was loaded for texts of one chunk of tokens alone, and the prompt takes more; "
                "load a pipeline without fixed_size"
            )
        return texts
