"""From the texts of requests to the denoiser's conditioning, which is cached."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import Engine

from ..denoising.loop import Loop
from ..engine_calls import Conditioning, Floats, outputs_of
from ..families import Family, Text
from ..output.result import Timings
from ..request.request import Request
from ..text.textual_inversion import EXTRA_EMBEDDINGS, Embeddings
from .cache import TensorCache


class PromptEncoder:
    """Encodes texts with one set of weights, and keeps their conditioning. Serves many threads.

    Args:
        family: The bundle's family.
        engine: Gives the opened engine of a component.
        loop: The loop whose steps the conditioning is for.
        embeddings: Words with vectors of their own.
        cache_bytes: Most bytes of conditioning to keep; 0 keeps nothing.
    """

    def __init__(
        self,
        family: Family,
        engine: Callable[[str], Engine],
        loop: Loop,
        embeddings: Embeddings,
        cache_bytes: int,
    ) -> None:
        self._family, self._engine, self._loop, self._embeddings = family, engine, loop, embeddings
        self._cache = TensorCache(cache_bytes)

    def __len__(self) -> int:
        """How many encoded texts are kept."""
        return len(self._cache)

    def clear(self) -> None:
        """Forget all encoded texts."""
        self._cache.clear()

    def encode(
        self, texts: Sequence[tuple[Text, Conditioning]], request: Request, timings: Timings
    ) -> list[Conditioning]:
        """The conditioning of texts, computed or from the cache.

        Each component serves all texts before the next one does, since with offloading only one is open at a time.

        Args:
            texts: Each with the denoiser's other inputs for it, such as sizes, one row each.
            request: A request that stands for all: it says which steppers' conditioning is needed.
            timings: Gets the seconds of the denoiser's prompt stage.

        Raises:
            BundleError: if the denoiser needs more than the bundle computes.
            EngineError: if an engine fails, or computes values that are not finite.
        """
        keys = self._keys(texts, request)
        found = {key: self._cache.get(key) for key in keys}
        missing = {key: each for key, each in zip(keys, texts, strict=True) if found[key] is None}
        encoded = self._encoded({key: text for key, (text, _) in missing.items()})
        begin = time.perf_counter()
        for key, (text, vectors) in missing.items():
            raw = {**self._family.condition(text, encoded[key]), **vectors}
            found[key] = conditioning = self._loop.condition_for(request, raw)
            self._cache.put(key, conditioning)
        if missing:
            timings.prompt += time.perf_counter() - begin
        # Inputs that are not part of the key may differ from those that the cached text came with.
        return [
            {**known, **{name: values for name, values in vectors.items() if name in known}}
            for key, (_, vectors) in zip(keys, texts, strict=True)
            if (known := found[key]) is not None
        ]

    def _keys(self, texts: Sequence[tuple[Text, Conditioning]], request: Request) -> list[Hashable]:
        """A key for each text: equal keys stand for equal tensors of all that is computed ahead of the steps."""
        added = tuple(key for stepper in self._loop.steppers if (key := stepper.conditioning_key(request)) is not None)
        ahead = self._loop.prompt_inputs
        return [
            (text.key, added, tuple((n, v.tobytes()) for n, v in vectors.items() if added or n in ahead))
            for text, vectors in texts
        ]

    def _encoded(self, texts: Mapping[Hashable, Text]) -> dict[Hashable, dict[str, dict[str, Floats]]]:
        """Outputs of the text encoders by key, by encoder, by output, the chunks of a text one behind the other."""
        encoded: dict[Hashable, dict[str, dict[str, Floats]]] = {key: {} for key in texts}
        for name in self._family.text_encoders:
            for key, text in texts.items():
                if name in text.tokens:
                    # One by one: in a batch of two the last bits would depend on what else is in the cache.
                    chunks = [self._chunk(name, ids[None], text.outputs[name]) for ids in text.tokens[name]]
                    encoded[key][name] = {n: np.concatenate([each[n] for each in chunks]) for n in chunks[0]}
        return encoded

    def _chunk(self, name: str, ids: NDArray[np.int64], outputs: Sequence[str]) -> dict[str, Floats]:
        """Outputs of a text encoder for one chunk of tokens, int64 ``[1, length]``."""
        engine, feeds = self._engine(name), {"input_ids": ids}
        if (spec := engine.inputs.get(EXTRA_EMBEDDINGS)) is not None:
            feeds = self._embeddings.feeds(name, ids, spec)
        return outputs_of(engine, name, outputs, feeds)
