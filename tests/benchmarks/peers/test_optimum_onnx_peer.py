"""Optimum as a peer: its options, and the checkpoint that transformers 4 reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.benchmarks.peers import optimum_onnx_peer, wire


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "option dtype is 'int8', expected one of 'fp32'"),
        ({"type": "fp32"}, "option 'type' is unkn"),
    ],
)
def test_options_that_a_peer_lacks_are_refused(peer_job: dict[str, Any], options: dict[str, Any], message: str) -> None:
    """An option or a value that is unknown is never passed over."""
    with pytest.raises(wire.UnsupportedError, match=message):
        optimum_onnx_peer.Contender().open({**peer_job, "options": options})


def test_transformers_4_is_given_what_it_reads(emoji_source: Path, tmp_path: Path) -> None:
    """The copy has the same vocabulary, merges and weights under the names of old; the rest are links."""
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    target = tmp_path / "copy"
    assert len(optimum_onnx_peer.adapt(emoji_source, target)) == 2
    files = [str(target / "tokenizer" / name) for name in ("vocab.json", "merges.txt")]
    tokenizer = Tokenizer.from_file(str(emoji_source / "tokenizer" / "tokenizer.json"))
    read = BPE.from_file(*files, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    text = "a red apple, 7 elephants"
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.model = read
    assert tokenizer.encode(text, add_special_tokens=False).ids == expected
    before = load_file(emoji_source / "text_encoder" / "model.safetensors")
    after = load_file(target / "text_encoder" / "model.safetensors")
    assert set(after) == {f"text_model.{name}" for name in before}
    assert all(np.array_equal(after[f"text_model.{name}"], tensor) for name, tensor in before.items())
    assert (target / "unet" / "config.json").resolve() == (emoji_source / "unet" / "config.json").resolve()
    assert optimum_onnx_peer.adapt(target, tmp_path / "again") == []
