"""Tokenizers are read from whole vocabulary files alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Refusal = Callable[..., str]


def test_incomplete_tokenizer(tiny_source: Path, refusal: Refusal) -> None:
    """Without its vocabulary a tokenizer is refused; transformers would make one that knows no words."""
    (tiny_source / "tokenizer" / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(tiny_source, load=True)
    (tiny_source / "tokenizer" / "vocab.json").write_text("{}")
    assert "merges.txt" in refusal(tiny_source, load=True)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_tokenizer(tiny_source: Path, file: str, refusal: Refusal) -> None:
    """A tokenizer's file that is no JSON is refused."""
    (tiny_source / "tokenizer" / file).write_text("{")
    assert "tokenizer" in refusal(tiny_source, load=True)
