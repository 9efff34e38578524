"""Textual inversion: words whose vectors come from a file instead of a text encoder's table.

Gal et al. 2022, arXiv 2208.01618. Files are safetensors in the layouts that are in use: diffusers'
``{"<token>": vectors}``, ``emb_params`` of AUTOMATIC1111's web UI, and those with vectors for two text encoders,
``clip_l`` and ``clip_g``. One word may stand for several vectors, and then takes as many places of a prompt.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.engines import TensorSpec
from latentrt.engines.errors import InvalidRequestError

from ..engine_calls import Floats
from ..files import StoredTensor, read_bounded, stored_tensors

EXTRA_EMBEDDINGS = "extra_embeddings"
"""Input of a text encoder with additional vectors; id -1 stands for the first, -2 for the second, and so on."""
MOST_BYTES = 64 * 2**20
"""Largest file that is read; a hundred vectors of the widest encoder have under 1 MB."""
MOST_VECTORS = 75
"""Most vectors of a word, which have to fit a chunk of tokens."""
MOST_WORDS = 1024
"""Most words of a pipeline."""

_ENCODERS = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
_PARAMETERS = "emb_params"
_LONGEST_WORD = 200


@dataclass(frozen=True)
class RecordedFile:
    """A file that a request was drawn with.

    Attributes:
        name: The word of the prompt that stands for it.
        path: The file's name, as the caller gave it.
        sha256: SHA-256 of the content, 64 hexadecimal digits.
    """

    name: str
    path: str
    sha256: str


@dataclass(frozen=True)
class Embedding:
    """A word with vectors of its own.

    Attributes:
        record: The word and its file.
        vectors: The vectors by text encoder, float32 ``[vectors, width]``.
    """

    record: RecordedFile
    vectors: Mapping[str, Floats] = field(repr=False)


class Embeddings:
    """The words of a pipeline. Immutable, so one serves all threads.

    Args:
        words: The words, each once.
    """

    def __init__(self, words: Sequence[Embedding] = ()) -> None:
        self.records = tuple(word.record for word in words)
        self.ids: dict[str, dict[str, tuple[int, ...]]] = {}
        """Ids that stand for a word's vectors, by text encoder and then by word."""
        tables: dict[str, list[Floats]] = {}
        for word in words:
            for encoder, vectors in word.vectors.items():
                rows = tables.setdefault(encoder, [])
                first = len(rows)
                rows.extend(vectors)
                known = self.ids.setdefault(encoder, {})
                known[word.record.name] = tuple(-1 - row for row in range(first, len(rows)))
        self._tables = {encoder: np.stack(rows) for encoder, rows in tables.items()}

    def feeds(self, encoder: str, ids: NDArray[np.int64], spec: TensorSpec) -> dict[str, NDArray[Any]]:
        """Inputs of a text encoder that takes vectors: those that the ids name, or a row of zeros.

        Args:
            encoder: The encoder's component.
            ids: Token ids, int64 ``[1, length]``, with ids below zero for vectors.
            spec: The input for vectors.

        Returns:
            ``input_ids``, int64 ``[1, length]``, renumbered, and the vectors, float32 ``[vectors, width]``.
        """
        added = ids < 0
        if not added.any():
            return {"input_ids": ids, EXTRA_EMBEDDINGS: np.zeros((1, int(spec.shape[1])), np.float32)}
        rows, places = np.unique(-1 - ids[added], return_inverse=True)
        ids = ids.copy()
        ids[added] = -1 - places
        return {"input_ids": ids, EXTRA_EMBEDDINGS: self._tables[encoder][rows]}


def read_embeddings(given: Mapping[str, str | os.PathLike[str]], widths: Mapping[str, int]) -> Embeddings:
    """Read the vectors of words from files.

    Args:
        given: The file of each word.
        widths: Width of the vectors that a text encoder takes, by encoder; those that take none are left out.

    Raises:
        InvalidRequestError: naming the file that is wrong, and the reason.
    """
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"embeddings is a {type(given).__name__}, expected a mapping from words to files")
    if not given:
        return Embeddings()
    if not widths:
        raise InvalidRequestError("the text encoders of this bundle take no embeddings; build it again")
    if len(given) > MOST_WORDS:
        raise InvalidRequestError(f"{len(given)} embeddings are given, expected at most {MOST_WORDS}")
    return Embeddings([_read(word, path, widths) for word, path in given.items()])


def _read(word: str, path: str | os.PathLike[str], widths: Mapping[str, int]) -> Embedding:
    if not isinstance(word, str) or not word.strip() or word != word.strip() or len(word) > _LONGEST_WORD:
        raise InvalidRequestError(
            f"{repr(word)[:80]} cannot name an embedding; expected a word such as <cat-toy>, "
            f"of up to {_LONGEST_WORD} characters and without blanks around it"
        )
    label = f"the embedding {word!r} in {os.fspath(path)!r}"
    data = _content(path, label)
    vectors = _assigned(_tensors(data, label), widths, label)
    return Embedding(RecordedFile(word, os.fspath(path), hashlib.sha256(data).hexdigest()), vectors)


def _content(path: str | os.PathLike[str], label: str) -> bytes:
    """A file's bytes; a pickle is refused."""
    data = read_bounded(path, label, MOST_BYTES)
    if data[:2] == b"PK" or data[:1] == b"\x80":  # torch.save writes a zip archive, or bare pickle
        raise InvalidRequestError(
            f"{label} is a pickle, which can run code when it is loaded; convert it to safetensors first"
        )
    return data


def _tensors(data: bytes, label: str) -> dict[str, Floats]:
    try:
        found = stored_tensors(data)
    except ValueError as error:
        raise InvalidRequestError(f"{label} is no sound safetensors file: {error}") from error
    if len(found) > MOST_VECTORS:
        raise InvalidRequestError(f"{label} holds {len(found)} tensors, expected one, or one for each text encoder")
    return {each.name: _vectors(each, f"{label}, tensor {each.name[:80]!r},") for each in found}


def _vectors(tensor: StoredTensor, label: str) -> Floats:
    """A tensor as float32 ``[vectors, width]``."""
    values, shape = tensor.floats(), tensor.shape
    if values is None:
        raise InvalidRequestError(f"{label} holds {tensor.kind}, expected F32, F16 or BF16")
    if len(shape) not in (1, 2) or not values.size:
        raise InvalidRequestError(f"{label} is {list(shape)}, expected [vectors, width]")
    if not np.isfinite(values).all():
        raise InvalidRequestError(f"{label} holds NaN or infinity")
    rows = values.reshape(-1, shape[-1])
    if len(rows) > MOST_VECTORS:
        raise InvalidRequestError(f"{label} has {len(rows)} vectors, expected at most {MOST_VECTORS}")
    return rows


def _assigned(tensors: Mapping[str, Floats], widths: Mapping[str, int], label: str) -> dict[str, Floats]:
    """Assign vectors to text encoders: by the tensor's name, or else by their width."""
    if tensors and all(name in _ENCODERS for name in tensors):
        found = {_ENCODERS[name]: vectors for name, vectors in tensors.items() if _ENCODERS[name] in widths}
        for encoder, vectors in found.items():
            if vectors.shape[1] != widths[encoder]:
                raise InvalidRequestError(
                    f"{label} has vectors of width {vectors.shape[1]} for {encoder}, but this model's have "
                    f"{widths[encoder]}"
                )
        if not found:
            raise InvalidRequestError(f"{label} has {', '.join(tensors)}, which this model has no text encoder for")
        return found
    # Files of the web UI may hold more than the vectors.
    named = {_PARAMETERS: tensors[_PARAMETERS]} if _PARAMETERS in tensors else dict(tensors)
    if len(named) != 1:
        raise InvalidRequestError(
            f"{label} holds {', '.join(sorted(tensors))[:120] or 'no tensor'}; expected one tensor, {_PARAMETERS}, "
            "or clip_l and clip_g"
        )
    (vectors,) = named.values()
    found = {encoder: vectors for encoder, width in widths.items() if width == vectors.shape[1]}
    if not found:
        taken = ", ".join(f"{width} ({encoder})" for encoder, width in widths.items())
        raise InvalidRequestError(f"{label} has vectors of width {vectors.shape[1]}, but this model's have {taken}")
    return found
