"""From a prompt to chunks of tokens with weights, and from the states of the chunks to those of the prompt.

CLIP's text encoders read 77 tokens: two special ones and 75 of a prompt. A longer prompt is cut into chunks of 75. Each
chunk is encoded as a prompt of its own, and the denoiser attends to the states of all, side by side. A weight
multiplies the states of its token; then each chunk's states are scaled to the mean that they had. Both are rules of
AUTOMATIC1111's web interface ("Infinite prompt length" and "Attention/emphasis" in its manual). The module
:mod:`latentrt.runtime.text.prompt_syntax` reads the syntax itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..engine_calls import Floats
from .prompt_syntax import Span, parse

SYNTAXES = ("plain", "long", "weighted")
"""Ways to read a prompt: literally, cut off after one chunk; literally, in chunks; or with weights, in chunks."""
MOST_CHUNKS = 8
"""Most chunks of a prompt; tokens beyond them are cut off."""

_SMALL = 1e-6


class ChunkTokenizer(Protocol):
    """The part of a tokenizer that chunks need."""

    max_length: int

    def encode(self, text: str, max_length: int | None = None) -> NDArray[np.int64]:
        """Token ids of a whole chunk, int64 ``[max_length]``, special ones and padding included."""

    def words(self, text: str) -> list[int]:
        """Token ids without the special ones, however many."""


@dataclass(frozen=True)
class Chunks:
    """A prompt in chunks.

    Attributes:
        tokens: Token ids, int64 ``[chunks, length]``.
        weights: Factors on the tokens' states, float32 ``[chunks, length]``; ``None`` where all are 1.
        truncated: Tokens that did not fit and were cut off.
    """

    tokens: NDArray[np.int64]
    weights: Floats | None = field(default=None, repr=False)
    truncated: int = 0


def cut(prompt: str, syntax: str, tokenizer: ChunkTokenizer) -> Chunks:
    """Read a prompt and cut it into chunks.

    Args:
        prompt: Any text.
        syntax: One of :data:`SYNTAXES`, but not ``"plain"``.
        tokenizer: A CLIP tokenizer.

    Raises:
        InvalidRequestError: if the prompt is no string, has lone surrogates, or is too long.
    """
    # The tokenizer comes first, since it refuses what the parser must not see.
    whole = tokenizer.words(prompt)
    sections = parse(prompt) if syntax == "weighted" else [[Span(prompt)]]
    room, left = tokenizer.max_length - 2, MOST_CHUNKS * (tokenizer.max_length - 2)
    found: list[tuple[list[int], list[float]]] = []
    rest: list[str] = []
    for number, section in enumerate(sections):
        ids: list[int] = []
        weights: list[float] = []
        for span in section:
            if left <= 0:  # thousands of pieces that no chunk has room for are counted together
                rest.append(span.text)
                continue
            tokens = tokenizer.words(span.text) if syntax == "weighted" else whole
            left -= len(tokens)
            ids += tokens
            weights += [span.weight] * len(tokens)
        last = number == len(sections) - 1
        # A break at the very end begins nothing; any other begins a chunk, however little is before or behind it.
        stops = range(0, len(ids), room) if ids else range(0 if last and found else 1)
        found += [(ids[first : first + room], weights[first : first + room]) for first in stops]
    truncated = sum(len(ids) for ids, _ in found[MOST_CHUNKS:]) + (len(tokenizer.words(" ".join(rest))) if rest else 0)
    return _framed(found[:MOST_CHUNKS], truncated, tokenizer)


def _framed(found: Sequence[tuple[list[int], list[float]]], truncated: int, tokenizer: ChunkTokenizer) -> Chunks:
    """Put special tokens and padding, which weigh 1, around each chunk."""
    empty = tokenizer.encode("")
    tokens, weights = np.tile(empty, (len(found), 1)), np.ones((len(found), len(empty)), np.float32)
    for row, (ids, own) in enumerate(found):
        behind = 1 + len(ids)
        tokens[row, 1:behind], weights[row, 1:behind] = ids, own
        tokens[row, behind] = empty[1]  # the end of the text, which follows the start of an empty one at once
    return Chunks(tokens, None if (weights == 1).all() else weights, truncated)


def joined(states: Floats, weights: Floats | None = None) -> Floats:
    """Join the states of a prompt's chunks.

    Args:
        states: float32 ``[chunks, length, width]``.
        weights: float32 ``[chunks, length]``; ``None`` leaves the states as they are.

    Returns:
        float32 ``[1, chunks * length, width]``.
    """
    if weights is not None:
        states = np.stack([_weighed(chunk, own) for chunk, own in zip(states, weights, strict=True)])
    return states.reshape(1, -1, states.shape[-1])


def _weighed(states: Floats, weights: Floats) -> Floats:
    """A chunk's states times their weights, scaled back to the mean that they had."""
    if (weights == 1).all():
        return states
    weighed = states * weights[:, None]
    before, after = states.mean(dtype=np.float64), weighed.mean(dtype=np.float64)
    # Weights of both signs may cancel out; dividing by next to nothing would leave noise.
    if abs(after) <= _SMALL * np.abs(weighed).mean(dtype=np.float64):
        return weighed
    scaled: Floats = weighed * np.float32(before / after)
    return scaled
