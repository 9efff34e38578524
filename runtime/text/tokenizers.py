"""Tokenizers from a ``tokenizer.json``: from text to the ids that a text encoder takes.

Ids equal those of transformers' ``CLIPTokenizer`` and ``T5Tokenizer``, called with ``padding="max_length"`` and
``truncation=True``. CLIP's is byte-level BPE with an end-of-word suffix (Radford et al., "Learning Transferable Visual
Models From Natural Language Supervision", 2021, section 2.4), T5's a unigram model (Raffel et al. 2020, arXiv
1910.10683, section 2.2.1; Kudo 2018, arXiv 1804.10959). File format: the ``tokenizers`` library.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from latentrt.engines.errors import BundleError, InvalidRequestError, LatentRTError

MAX_PROMPT_BYTES = 1_000_000
"""Longest prompt in bytes of UTF-8: all but the first ``max_length`` tokens are cut off, but cost time first."""
MAX_FILE_BYTES = 64 * 2**20
"""Largest ``tokenizer.json`` that is read; CLIP's and T5's own are under 4 MB."""

_LONG = 4096
"""Bytes from which a prompt takes a millisecond or more."""
_PROBE = "a photo of 2 cat's 😀!"


class PromptTokenizer(Protocol):
    """Makes the token ids that a text encoder takes from a prompt."""

    max_length: int

    def encode(self, text: str, max_length: int | None = None) -> NDArray[np.int64]:
        """Token ids ``[max_length]``, cut off or padded to that length; ``None`` is the tokenizer's own.

        Raises:
            InvalidRequestError: if the prompt is no string, has lone surrogates, or is too long.
        """

    def count(self, text: str) -> int:
        """Number of tokens before truncation, special ones included.

        Raises:
            InvalidRequestError: as :meth:`encode`.
        """

    def words(self, text: str) -> list[int]:
        """Token ids without the special ones, however many.

        Raises:
            InvalidRequestError: as :meth:`encode`.
        """

    def with_words(self, words: Mapping[str, Sequence[int]]) -> PromptTokenizer:
        """A tokenizer that also knows other words.

        Args:
            words: The ids that each word becomes.

        Raises:
            InvalidRequestError: if it knows one of them already.
        """


class FileTokenizer(ABC):
    """A tokenizer of the ``tokenizers`` library; immutable once loaded, so one serves all threads.

    Make one with :meth:`load`.

    Args:
        tokenizer: The library's, without truncation and padding; nothing may change it afterwards.
        max_length: Default length of an encoded prompt, special tokens included.
        pad_token_id: Id that fills the places that a prompt leaves free.
        end_token_id: Id of the end-of-text token.
    """

    model: ClassVar[str]
    """Name of the text encoder's model, for messages."""
    frame: ClassVar[int]
    """Special tokens around every prompt; the last is the end-of-text token."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, pad_token_id: int, end_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.max_length = max_length
        self.pad_token_id = pad_token_id
        self.end_token_id = end_token_id
        self._words: Mapping[int, Sequence[int]] = {}

    @classmethod
    @abstractmethod
    def check_model(cls, path: Path, model: Mapping[str, Any]) -> None:
        """Refuse a ``tokenizer.json`` of another kind.

        Args:
            path: The file, for the message.
            model: The file's entry ``model``; empty if it has none.

        Raises:
            BundleError: if it is not of this kind.
        """

    @classmethod
    def load(cls, directory: Path, max_length: int, pad_token_id: int | None = None) -> Self:
        """Read ``tokenizer.json``; truncation and padding written in it are replaced by the arguments.

        Args:
            directory: Directory of the file.
            max_length: Number of ids of an encoded prompt; the special tokens must fit.
            pad_token_id: Id to pad with; by default the end-of-text token.

        Raises:
            BundleError: if the file is missing, damaged or of another kind, or does not know ``pad_token_id``.
        """
        path = directory / "tokenizer.json"
        cls._check_length(str(path), max_length)
        text = _read(path)
        cls.check_model(path, _model(path, text))
        with _translated(
            BundleError(f"{path} is not a tokenizer that the tokenizers library can load; export it again")
        ):
            tokenizer = Tokenizer.from_str(text)
            # A file saved after use carries the truncation and padding of its last call. They are the library's shared
            # mutable state as well: without them, encoding only reads.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            empty = tokenizer.encode("").ids
            probe = tokenizer.encode(_PROBE).ids
        first, last = probe[: cls.frame - 1], probe[-1:]
        if len(empty) != cls.frame or [*first, *last] != empty or len(probe) <= cls.frame:
            raise BundleError(
                f"{path} encodes an empty prompt as {empty}, expected the {cls.frame} special tokens of a "
                f"{cls.model} tokenizer"
            )
        end = int(empty[-1])
        pad = end if pad_token_id is None else pad_token_id
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        if not 0 <= pad < size:
            raise BundleError(f"{path}: pad_token_id is {pad}, expected an id of its vocabulary, 0 to {size - 1}")
        return cls(tokenizer, max_length, pad, end)

    def with_words(self, words: Mapping[str, Sequence[int]]) -> Self:
        """A tokenizer that also knows other words, wherever they stand in a prompt, in small or capital letters.

        Args:
            words: The ids that each word becomes.

        Raises:
            InvalidRequestError: if it knows a word already.
        """
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        for word in words:
            if tokenizer.token_to_id(word) is not None:
                raise InvalidRequestError(f"{word!r} is a token already; choose another word, such as <{word}>")
        # As transformers adds them for diffusers.
        tokenizer.add_tokens([AddedToken(word, normalized=True, special=False) for word in words])
        found = type(self)(tokenizer, self.max_length, self.pad_token_id, self.end_token_id)
        added = {word: tokenizer.token_to_id(word) for word in words}
        found._words = {number: tuple(words[word]) for word, number in added.items() if number is not None}
        return found

    @classmethod
    def _check_length(cls, where: str, max_length: int) -> None:
        if max_length < cls.frame:
            raise BundleError(
                f"{where}: max_length is {max_length}, expected at least {cls.frame}, for the special tokens"
            )

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, special ones included; ids are below it."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, max_length: int | None = None) -> NDArray[np.int64]:
        """Token ids of one prompt: its words between the special tokens, and padding.

        Args:
            text: The prompt, at most :data:`MAX_PROMPT_BYTES` in UTF-8. Tokens beyond ``max_length`` are cut off, all
                but the end-of-text token.
            max_length: Number of ids; ``None`` is the tokenizer's own.

        Returns:
            int64 ``[max_length]``.

        Raises:
            InvalidRequestError: if the prompt is no string, has lone surrogates, or is too long.
            BundleError: if the special tokens alone are longer than ``max_length``.
        """
        length = self.max_length if max_length is None else max_length
        self._check_length(f"the {self.model} tokenizer", length)
        ids = self._ids(text)
        row = np.full(length, self.pad_token_id, np.int64)
        kept = ids if len(ids) <= length else [*ids[: length - 1], self.end_token_id]
        row[: len(kept)] = kept
        return row

    def encode_batch(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids of several prompts.

        Args:
            texts: The prompts, any number, in a list or tuple.

        Returns:
            int64 ``[len(texts), max_length]``.

        Raises:
            InvalidRequestError: as :meth:`encode`, or if ``texts`` is itself a string.
        """
        if isinstance(texts, str):
            raise InvalidRequestError("prompts are one string, expected a list of strings; use encode for one prompt")
        rows = [self.encode(text) for text in texts]
        return np.stack(rows) if rows else np.empty((0, self.max_length), np.int64)

    def count(self, text: str) -> int:
        """Number of tokens of a prompt before truncation, special ones included.

        Raises:
            InvalidRequestError: as :meth:`encode`.
        """
        return len(self._ids(text))

    def words(self, text: str) -> list[int]:
        """Token ids of a prompt without the special ones around it, however many.

        Raises:
            InvalidRequestError: as :meth:`encode`.
        """
        return self._ids(text)[self.frame - 1 : -1]

    def _ids(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise InvalidRequestError(f"prompt is {type(text).__name__}, expected a string")
        try:
            # Every character takes a byte or more, so a hopeless prompt need not be encoded to be refused.
            size = len(text) if len(text) > MAX_PROMPT_BYTES else len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"prompt has a lone surrogate at position {error.start}, expected text that UTF-8 can hold"
            ) from None
        if size > MAX_PROMPT_BYTES:
            raise InvalidRequestError(
                f"prompt is {size} bytes or more, expected at most {MAX_PROMPT_BYTES}; shorten it"
            )
        with _translated(BundleError("tokenizer.json fails on this prompt; export the tokenizer again")):
            # The library holds the GIL in encode and lets it go in encode_batch; the latter starts a thread pool, which
            # only a prompt that would keep other threads waiting is worth.
            encoding = self._tokenizer.encode(text) if size < _LONG else self._tokenizer.encode_batch([text])[0]
            ids = list(encoding.ids)
        if not self._words:
            return ids
        return [each for found in ids for each in self._words.get(found, (found,))]


class ClipTokenizer(FileTokenizer):
    """CLIP's tokenizer: start, words, end, padding.

    SD 1.x pads with the end-of-text token, SD 2.x and the second encoder of SDXL with id 0.
    """

    model = "CLIP"
    frame = 2

    @classmethod
    def load(cls, directory: Path, max_length: int = 77, pad_token_id: int | None = None) -> Self:
        """See :meth:`FileTokenizer.load`."""
        return super().load(directory, max_length, pad_token_id)

    @classmethod
    def check_model(cls, path: Path, model: Mapping[str, Any]) -> None:
        """Refuse all but BPE with CLIP's end-of-word suffix: others would load, and give ids that mean nothing."""
        kind, suffix = model.get("type"), model.get("end_of_word_suffix")
        if (kind, suffix) != ("BPE", "</w>"):
            raise BundleError(
                f"{path} holds a model of type {kind!r} with word ending {suffix!r}, expected CLIP's: 'BPE' with '</w>'"
            )


class T5Tokenizer(FileTokenizer):
    """T5's tokenizer: words, end, padding."""

    model = "T5"
    frame = 1

    @classmethod
    def load(cls, directory: Path, max_length: int = 512, pad_token_id: int | None = 0) -> Self:
        """See :meth:`FileTokenizer.load`; T5 pads with id 0."""
        return super().load(directory, max_length, pad_token_id)

    @classmethod
    def check_model(cls, path: Path, model: Mapping[str, Any]) -> None:
        """Refuse all but a unigram model with an id for unknown pieces."""
        kind, unknown = model.get("type"), model.get("unk_id")
        if kind != "Unigram" or unknown is None:
            raise BundleError(
                f"{path} holds a model of type {kind!r} with unk_id {unknown!r}, expected T5's: 'Unigram' with an "
                "unk_id"
            )


TOKENIZERS: Mapping[str, Callable[[Path, int, int], PromptTokenizer]] = {
    "clip": ClipTokenizer.load,
    "t5": T5Tokenizer.load,
}
"""Loaders of tokenizers by kind; arguments are a directory, the length of a prompt, and the id that pads it."""


def load_tokenizer(directory: Path, kind: str, max_length: int, pad_token_id: int) -> PromptTokenizer:
    """Read the ``tokenizer.json`` of a bundle.

    Args:
        directory: Directory of the file.
        kind: A key of :data:`TOKENIZERS`.
        max_length: Number of ids of an encoded prompt.
        pad_token_id: Id to pad with.

    Raises:
        BundleError: if the kind is unknown, or the file is missing, damaged or of another kind.
    """
    if kind not in TOKENIZERS:
        raise BundleError(f"{directory} holds a tokenizer of the kind {kind!r}, expected {' or '.join(TOKENIZERS)}")
    return TOKENIZERS[kind](directory, max_length, pad_token_id)


def _read(path: Path) -> str:
    """The file's text.

    Raises:
        BundleError: if it cannot be read, is too large or no UTF-8.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}; export the tokenizer again") from error
    if len(data) > MAX_FILE_BYTES:
        raise BundleError(f"{path} is larger than {MAX_FILE_BYTES} bytes, expected a tokenizer.json of a few megabytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not UTF-8 text; export the tokenizer again") from error


def _model(path: Path, text: str) -> Mapping[str, Any]:
    """The file's entry ``model``; empty if it has none.

    Raises:
        BundleError: if the file is no JSON.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON; export the tokenizer again") from error
    model = content.get("model") if isinstance(content, dict) else None
    return model if isinstance(model, dict) else {}


@contextmanager
def _translated(failure: LatentRTError) -> Iterator[None]:
    """Raise ``failure`` in place of whatever the ``tokenizers`` library raises."""
    try:
        yield
    except Exception as error:
        raise failure from error
    except BaseException as error:
        # A panic of the Rust code arrives as an exception that is no Exception and that no module exports.
        if type(error).__name__ != "PanicException":
            raise
        raise failure from error
