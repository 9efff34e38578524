"""Reading a source's tokenizers: for each kind its files, and the class of transformers that reads them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import CLIPTokenizer, PreTrainedTokenizerBase, T5Tokenizer

from latentrt.engines.errors import SourceError


@dataclass(frozen=True)
class Kind:
    """A kind of tokenizer.

    Attributes:
        tokenizer: The class that reads it.
        files: Sets of files, any of which makes a tokenizer.
        rows: Tokens that the text encoder knows unless its configuration says otherwise.
    """

    tokenizer: type[PreTrainedTokenizerBase]
    files: tuple[tuple[str, ...], ...]
    rows: int


KINDS: Mapping[str, Kind] = {
    "clip": Kind(CLIPTokenizer, (("tokenizer.json",), ("vocab.json", "merges.txt")), 49408),
    "t5": Kind(T5Tokenizer, (("tokenizer.json",), ("spiece.model",)), 32128),
}
"""Kinds of tokenizer, keys of :data:`latentrt.runtime.text.tokenizers.TOKENIZERS`."""


def read_tokenizer(directory: Path, kind: str, label: str, padding: str | None = None) -> PreTrainedTokenizerBase:
    """Build a tokenizer from its vocabulary files.

    Args:
        directory: Where they are.
        kind: A key of :data:`KINDS`.
        label: Its name in messages.
        padding: Token to pad with in place of the one that the files name.

    Raises:
        SourceError: if a file is missing or damaged, or cannot be converted with what is installed.
    """
    there = [names for names in KINDS[kind].files if all((directory / name).is_file() for name in names)]
    if not there:
        # Without them transformers makes a tokenizer that knows no words.
        either = " nor ".join(" with ".join(names) for names in KINDS[kind].files)
        raise SourceError(f"{label} is incomplete: {directory.name}/ has neither {either}")
    if there[0] == ("spiece.model",) and importlib.util.find_spec("sentencepiece") is None:
        raise SourceError(
            f"{label} is a spiece.model alone, which takes the package sentencepiece to convert; install it with "
            "pip install sentencepiece"
        )
    try:
        tokenizer: PreTrainedTokenizerBase = KINDS[kind].tokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **({"pad_token": padding} if padding else {})
        )
        if not tokenizer.get_vocab():
            raise SourceError(f"{label} knows no tokens")
    except SourceError:
        raise
    except Exception as error:  # the library raises whatever it runs into
        lines = str(error).strip().splitlines()
        raise SourceError(f"{label} cannot be read: {lines[0][:200] if lines else type(error).__name__}") from error
    return tokenizer
