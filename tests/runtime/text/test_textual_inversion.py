"""Textual inversion against diffusers' load_textual_inversion, and files that are broken or hostile."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from latentrt.engines import TensorSpec
from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime import Pipeline
from latentrt.runtime.cli import main
from latentrt.runtime.text.textual_inversion import MOST_BYTES, MOST_VECTORS, read_embeddings
from latentrt.runtime.text.tokenizers import ClipTokenizer

GATE = 45.0  # dB
WIDTHS = {"text_encoder": 32, "text_encoder_2": 48}
Captured = pytest.CaptureFixture[str]


def vectors(count: int, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 0.5


def saved(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    save_file(dict(tensors), path)
    return path


def psnr(pictures: NDArray[np.uint8], expected: NDArray[np.float32]) -> float:
    """In dB."""
    error = np.square(pictures.astype(np.float64) - np.round(expected * 255)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def expect(pipe: Any, prompt: str, **options: Any) -> NDArray[np.float32]:
    """diffusers' picture."""
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    asked = {"num_inference_steps": 2, "guidance_scale": 4.0, "width": 32, "height": 32, "output_type": "np"}
    found = pipe(prompt, generator=torch.Generator().manual_seed(3), **asked, **options)
    return np.asarray(found.images, np.float32)


OURS: Mapping[str, Any] = {"seed": 3, "steps": 2, "guidance": 4.0, "sampler": "euler"}
PROMPTS = [
    ("a <cat> on a boat", "an <eight>"),
    ("<eight>, <CAT><cat>", "leaf"),
    ("my<cat>s " + "boat " * 70 + "<eight>", ""),
]


@pytest.mark.heavy
def test_the_pictures_are_diffusers(tiny: Any, tmp_path: Path) -> None:
    """Words of one and of eight vectors, both layouts, in capitals, within words, at the end of a full prompt."""
    files = {
        "<cat>": saved(tmp_path / "cat.safetensors", {"<cat>": vectors(1)[0]}),
        "<eight>": saved(tmp_path / "eight.safetensors", {"emb_params": vectors(8, seed=1)}),
    }
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tiny.source("sd1"), local_files_only=True)
    theirs.load_textual_inversion({"<cat>": vectors(1)[0]})
    theirs.load_textual_inversion({"emb_params": vectors(8, seed=1)}, token="<eight>")
    with Pipeline.load(tiny.bundle("sd1"), "onnxruntime", embeddings=files) as pipe:
        for prompt, negative in PROMPTS:
            ours = pipe(prompt, negative_prompt=negative, **OURS)
            assert psnr(ours.images, expect(theirs, prompt, negative_prompt=negative)) >= GATE, prompt
        assert [record.name for record in ours.request.embeddings] == ["<cat>", "<eight>"]
        converted = theirs.maybe_convert_prompt(PROMPTS[-1][0], theirs.tokenizer)
        assert ours.truncated == len(theirs.tokenizer(converted).input_ids) - 77 > 0
        words = pipe("a (<cat>:1.3) (on:1.1)", prompt_syntax="weighted", **OURS).latents
        assert np.abs(words - pipe("a (cat:1.3) (on:1.1)", prompt_syntax="weighted", **OURS).latents).max() > 1e-3


@pytest.mark.heavy
def test_two_text_encoders_have_vectors_each(tiny: Any, tmp_path: Path) -> None:
    """A file with ``clip_l`` and ``clip_g`` serves both encoders of SDXL, one with one of them that encoder alone."""
    both, one = {"clip_l": vectors(2), "clip_g": vectors(2, 48)}, {"x": vectors(3, 48, 1)}
    files = {"<both>": saved(tmp_path / "b.safetensors", both), "<one>": saved(tmp_path / "o.safetensors", one)}
    theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny.source("sdxl"), local_files_only=True)
    second = {"text_encoder": theirs.text_encoder_2, "tokenizer": theirs.tokenizer_2}
    theirs.load_textual_inversion(both["clip_l"], token="<both>")
    theirs.load_textual_inversion(both["clip_g"], token="<both>", **second)
    theirs.load_textual_inversion(one["x"], token="<one>", **second)
    with Pipeline.load(tiny.bundle("sdxl"), "onnxruntime", embeddings=files) as pipe:
        for prompt in ("a <both> boat", "a <one> and a <both>"):
            ours = pipe(prompt, negative_prompt="a leaf", **OURS).images
            assert psnr(ours, expect(theirs, prompt, negative_prompt="a leaf")) >= GATE, prompt


@pytest.mark.heavy
def test_other_prompts_are_as_they_were(tiny: Any, tmp_path: Path) -> None:
    """A pipeline with a word of its own draws what does not name it bit for bit as one without."""
    files = {"<cat>": saved(tmp_path / "cat.safetensors", {"<cat>": vectors(3)})}
    with (
        Pipeline.load(tiny.bundle("sd1"), "onnxruntime") as plain,
        Pipeline.load(tiny.bundle("sd1"), "onnxruntime", embeddings=files) as pipe,
    ):
        np.testing.assert_array_equal(pipe("a cat", **OURS).images, plain("a cat", **OURS).images)
        assert plain("a cat", **OURS).request.embeddings == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_is_widened(tmp_path: Path, dtype: torch.dtype) -> None:
    """Values are those that torch reads."""
    tensor = vectors(2).to(dtype)
    found = read_embeddings({"<a>": saved(tmp_path / "a.safetensors", {"x": tensor})}, WIDTHS)
    assert found.ids == {"text_encoder": {"<a>": (-1, -2)}}
    feeds = found.feeds(
        "text_encoder", np.array([[5, -2, -2, 7]]), TensorSpec("extra_embeddings", "float32", ("embeddings", 32))
    )
    np.testing.assert_array_equal(feeds["input_ids"], [[5, -1, -1, 7]])
    np.testing.assert_array_equal(feeds["extra_embeddings"], tensor[1:].float().numpy())


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")


def overlapping(path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1, 32], "data_offsets": [0, 999]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(128))


def large(path: Path) -> None:
    with path.open("wb") as file:
        os.truncate(file.fileno(), MOST_BYTES + 1)


def not_finite(path: Path) -> None:
    saved(path, {"x": torch.full((1, 32), torch.nan)})


HOSTILE: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "cannot be read: No such file"),
    "a directory": (lambda path: path.mkdir(), "cannot be read: Is a directory|no regular file"),
    "a pipe": (os.mkfifo, "no regular file"),
    "too large": (large, "expected at most 67,108,864"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps({"x": 1})), "a pickle, which can run code"),
    "torch.save": (zipped, "a pickle, which can run code"),
    "empty": (lambda path: path.write_bytes(b""), "no sound safetensors file"),
    "a huge header": (huge_header, "no sound safetensors file"),
    "offsets out of the file": (overlapping, "no sound safetensors file"),
    "NaN": (not_finite, "holds NaN or infinity"),
    "integers": (lambda path: saved(path, {"x": torch.ones(1, 32, dtype=torch.int64)}), "holds I64, expected F32"),
    "three dimensions": (lambda path: saved(path, {"x": torch.ones(1, 1, 32)}), r"is \[1, 1, 32\], expected"),
    "no vector": (lambda path: saved(path, {"x": torch.ones(0, 32)}), r"is \[0, 32\], expected"),
    "too many vectors": (lambda path: saved(path, {"x": torch.ones(MOST_VECTORS + 1, 32)}), "has 76 vectors"),
    "another width": (lambda path: saved(path, {"x": torch.ones(1, 33)}), r"width 33, but.*32 \(text_encoder\), 48"),
    "encoders exchanged": (
        lambda path: saved(path, {"clip_l": torch.ones(1, 48), "clip_g": torch.ones(1, 32)}),
        "vectors of width (48 for text_encoder|32 for text_encoder_2), but this model's have",
    ),
    "several": (lambda path: saved(path, {"a": vectors(1), "b": vectors(1, seed=2)}), "holds a, b; expected one"),
    "nothing": (lambda path: saved(path, {}), "holds no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_broken_files_are_refused(tmp_path: Path, name: str) -> None:
    """One sentence names the word, the file, and what is wrong with it."""
    make, message = HOSTILE[name]
    path = tmp_path / "e.safetensors"
    make(path)
    with pytest.raises(InvalidRequestError, match=f"the embedding '<a>' in .*e.safetensors'.*({message})"):
        read_embeddings({"<a>": path}, WIDTHS)


@pytest.mark.parametrize("word", ["", " ", " a", "a\n", "a" * 201, 7])
def test_words_that_cannot_be(tmp_path: Path, word: Any) -> None:
    """A word is text without blanks around it."""
    with pytest.raises(InvalidRequestError, match="cannot name an embedding; expected a word such as <cat-toy>"):
        read_embeddings({word: tmp_path / "e.safetensors"}, WIDTHS)


def test_a_bundle_without_the_input(tmp_path: Path) -> None:
    """Text encoders that others exported take no vectors."""
    with pytest.raises(InvalidRequestError, match="take no embeddings; build it again"):
        read_embeddings({"<a>": tmp_path / "e.safetensors"}, {})
    with pytest.raises(InvalidRequestError, match="expected a mapping from words to files"):
        read_embeddings(["e.safetensors"], WIDTHS)  # type: ignore[arg-type]


def test_a_word_that_is_a_token_already(emoji_source: Path) -> None:
    """It cannot be given another meaning."""
    tokenizer = ClipTokenizer.load(emoji_source / "tokenizer")
    with pytest.raises(InvalidRequestError, match=r"'<\|endoftext\|>' is a token already; choose another word"):
        tokenizer.with_words({"<|endoftext|>": (-1,)})


@pytest.mark.heavy
def test_the_command_line(tiny: Any, tmp_path: Path, capsys: Captured) -> None:
    """Words are given as TOKEN=FILE, and recorded with the file's hash; what is no such thing is refused."""
    file = saved(tmp_path / "cat=1.safetensors", {"x": vectors(2)})
    command = ["generate", str(tiny.bundle("sd1")), "a <cat>", "--output", str(tmp_path / "o.png"), "--steps", "1"]
    assert main([*command, "--embedding", f"<cat>={file}", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)["request"]["embeddings"]
    assert (record["name"], record["path"], len(record["sha256"])) == ("<cat>", str(file), 64)
    assert main([*command, "--embedding", "cat.safetensors"]) == 2
    assert "expected TOKEN=FILE" in capsys.readouterr().err
    assert main([*command, "--embedding", f"<a>={file}", "--embedding", f"<a>={file}"]) == 2
    assert "'<a>' is given twice" in capsys.readouterr().err
