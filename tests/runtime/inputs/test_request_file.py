"""Requests in JSON files and in PNGs: they are repeated bit for bit, and broken or hostile ones are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime import Bundle, Pipeline
from latentrt.runtime.bundle.manifest import Component
from latentrt.runtime.cli import main
from latentrt.runtime.images.png import read_parameters, read_text
from latentrt.runtime.inputs.create import create_request
from latentrt.runtime.inputs.request_file import (
    KEYWORD,
    MOST_BYTES,
    document,
    read_png,
    read_request,
    record,
    schema_text,
)
from latentrt.runtime.request.options import RequestOptions
from latentrt.runtime.request.request import Request
from latentrt.runtime.vae.tiling import Tiling

SCHEMA = Path(__file__).resolve().parents[3] / "docs" / "request.schema.json"
Captured = pytest.CaptureFixture[str]

# Each option with a value that differs from what it would be without.
VALUES: Mapping[str, Any] = {
    "negative_prompt": "a leaf",
    "steps": 3,
    "guidance": 3,
    "seed": 2**64 - 1,
    "sampler": "heun",
    "width": 48,
    "height": 24,
    "images": 2,
    "clip_skip": 1,
    "guidance_start": 0.1,
    "guidance_end": 0.9,
    "guidance_rescale": 0.25,
    "vae_tiling": Tiling(16, 8, "cut"),
    "prompt_2": "a “rocket”\n\0",
    "negative_prompt_2": "é",
    "original_size": (96, 64),
    "crop": (8, 0),
    "target_size": (48, 40),
    "negative_original_size": (16, 8),
    "negative_crop": (4, 2),
    "negative_target_size": (24, 16),
    "prompt_syntax": "weighted",
    "variation_seed": 5,
    "safety": "black",
    "variation_strength": 0.5,
}


def pixels(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path))


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def png(path: Path, texts: Mapping[str, str]) -> Path:
    """A PNG of another program, with texts."""
    info = PngImagePlugin.PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text, zip=len(text) > 10**6)
    Image.new("RGB", (2, 2)).save(path, pnginfo=info)
    return path


def test_the_schema_is_the_codes() -> None:
    """The published schema is what the code makes of a request's options, and a sound one."""
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(), (
        "write it with: python -c 'from latentrt.runtime.inputs.request_file import *; print(schema_text(), end=str())'"
    )
    schema = json.loads(schema_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert set(schema["properties"]) == {"$schema", "prompt", "embeddings", "loras", *RequestOptions.__annotations__}
    derived = {"classifier_free"}  # a new field is an option, or has a place in the record, or could not be repeated
    assert {each.name for each in dataclasses.fields(Request)} - derived == set(schema["properties"]) - {"$schema"}
    assert all(entry["description"] for name, entry in schema["properties"].items() if name != "$schema")


def test_a_request_survives_its_record(tiny: Any, tmp_path: Path) -> None:
    """Every option comes back with its type, the record fits the schema, and what is as usual is not in it."""
    manifest = Bundle.open(tiny.bundle("sdxl")).manifest
    manifest = dataclasses.replace(manifest, components={**manifest.components, "safety_checker": Component("", {})})
    request = create_request(manifest, "a red apple", **VALUES)
    path = png(tmp_path / "o.png", {KEYWORD: record(request, "sdxl") or ""})
    found = read_png(path)
    options = dict(found.options)
    assert create_request(manifest, options.pop("prompt"), **options) == request
    assert found.model == "sdxl"
    jsonschema.validate(document(request), json.loads(schema_text()))
    usual = create_request(manifest, "a", seed=1)
    assert set(document(usual)) == {
        *("prompt", "steps", "guidance", "seed", "sampler", "width", "height"),
        *("negative_prompt", "images", "clip_skip"),
    }


@pytest.mark.heavy
def test_a_picture_is_drawn_again(tiny: Any, tmp_path: Path, capsys: Captured) -> None:
    """From its PNG alone bit for bit; what the command line says as well comes before what the PNG says."""
    bundle, first, again = str(tiny.bundle("sd1")), tmp_path / "a.png", tmp_path / "b.png"
    embedding = tmp_path / "cat.safetensors"
    save_file({"x": torch.full((2, 32), 0.3)}, embedding)
    command = ["generate", bundle, "a (<cat>:1.2), “é”", "--output", str(first), "--embedding", f"<cat>={embedding}"]
    command += ["--prompt-syntax", "weighted", "--negative-prompt", "leaf", "--steps", "2", "--images", "2"]
    assert main([*command, "--width", "48", "--sampler", "euler-a", "--guidance-start", "0.2", "--vae-tile", "16"]) == 0
    assert main(["generate", bundle, "--from", str(first), "--output", str(again)]) == 0
    np.testing.assert_array_equal(pixels(first), pixels(again))
    assert read_text(first, KEYWORD) == read_text(again, KEYWORD)
    assert read_parameters(first) == read_parameters(again)
    capsys.readouterr()
    assert (
        main(["generate", bundle, "a dog", "--from", str(first), "--images", "1", "--output", str(again), "--json"])
        == 0
    )
    asked = json.loads(capsys.readouterr().out)["request"]
    assert (asked["prompt"], asked["images"], asked["sampler"], asked["steps"]) == ("a dog", 1, "euler-a", 2)
    other = ["--sampler", "euler", "--timesteps", "900,500,100"]
    assert main(["generate", bundle, "--from", str(first), *other, "--output", str(again)]) == 0
    assert main(["generate", bundle, "--from", str(again), "--steps", "1", "--output", str(again)]) == 0
    save_file({"x": torch.full((2, 32), 0.4)}, embedding)
    assert main(["generate", bundle, "--from", str(first), "--output", str(again)]) == 2
    assert "the embedding '<cat>' in" in (error := capsys.readouterr().err)
    assert "its SHA-256 differs" in error
    embedding.unlink()
    assert main(["generate", bundle, "--from", str(first), "--output", str(again)]) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.heavy
def test_a_request_file_is_drawn(tiny: Any, tmp_path: Path, capsys: Captured) -> None:
    """The file's options are the pipeline's keywords; it may name its schema."""
    asked = {"prompt": "a (cat:1.3)", "steps": 2, "seed": 5, "guidance": 3, "prompt_syntax": "weighted"}
    path, output = written(tmp_path / "r.json", {"$schema": "request.schema.json", **asked}), tmp_path / "o.png"
    assert main(["generate", str(tiny.bundle("sd1")), "--request", str(path), "--output", str(output)]) == 0
    with Pipeline.load(tiny.bundle("sd1"), "onnxruntime") as pipe:
        options = {name: value for name, value in asked.items() if name != "prompt"}
        np.testing.assert_array_equal(pixels(output), pipe("a (cat:1.3)", **options).images[0])
    capsys.readouterr()
    for content, message in (
        ({"steps": 2}, "no prompt is given; expected one behind BUNDLE, or --request or --from"),
        ({"prompt": "a", "steps": 0}, "steps is 0, expected 1 to 10000"),
        ({"prompt": "a", "prompt_2": "b"}, "have no prompt_2"),
        ({"prompt": "a", "output": "latent"}, "the request ends in latents"),
    ):
        written(path, content)
        assert main(["generate", str(tiny.bundle("sd1")), "--request", str(path), "--output", str(output)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.heavy
def test_a_refined_picture_is_drawn_again(tiny: Any, tmp_path: Path, capsys: Captured) -> None:
    """The PNG holds what was asked of both models, and wants the refiner again."""
    base, refiner = str(tiny.bundle("sdxl")), str(tiny.bundle("sdxl-refiner"))
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    command = ["generate", base, "a cat", "--refiner", refiner, "--steps", "4", "--hand-over", "0.5", "--seed", "3"]
    assert main([*command, "--aesthetic-score", "9", "--output", str(first)]) == 0
    assert main(["generate", base, "--from", str(first), "--refiner", refiner, "--output", str(again)]) == 0
    np.testing.assert_array_equal(pixels(first), pixels(again))
    capsys.readouterr()
    assert main(["generate", base, "--from", str(first), "--output", str(again)]) == 2
    assert "was finished by a refiner; give its bundle as --refiner BUNDLE" in capsys.readouterr().err


BROKEN: Mapping[str, tuple[Any, str]] = {
    "no JSON": ("{", "is no JSON"),
    "empty": ("", "is no JSON"),
    "no object": ([1], r"is \[1\], expected a JSON object"),
    "nested": ("[" * 100_000, "is no JSON"),
    "twice": ('{"steps": 1, "steps": 2}', 'has "steps" twice'),
    "NaN": ('{"guidance": NaN}', "holds NaN, which JSON does not have"),
    "infinity": ('{"guidance": -Infinity}', "holds -Infinity"),
    "digits": ('{"seed": ' + "9" * 5000 + "}", "is no JSON"),
    "unknown": ({"step": 1}, 'has an unknown option "step"; known options: .*steps'),
    "a text": ({"steps": "20"}, 'steps is "20", expected a whole number'),
    "a fraction": ({"steps": 1.5}, "steps is 1.5, expected a whole number"),
    "a truth": ({"steps": True}, "steps is true, expected a whole number"),
    "a list": ({"sampler": ["euler"]}, r'sampler is \["euler"\], expected a text'),
    "an object": ({"prompt": {"a": 1}}, "prompt is .*, expected a text"),
    "a short pair": ({"crop": [1]}, r"crop is \[1\], expected a list of 2, each a whole number"),
    "texts in a list": ({"sigmas": ["a"]}, "sigmas is .*, expected a list of any length, each a number"),
    "tiles": ({"vae_tiling": {"side": 9}}, 'vae_tiling has an unknown entry "side"; known: size'),
    "tiles of text": ({"vae_tiling": {"size": "9"}}, 'vae_tiling: size is "9", expected a whole number'),
    "embeddings": ({"embeddings": [1]}, r"embeddings is \[1\], expected names with paths"),
    "embeddings without paths": ({"embeddings": [{"name": "a"}]}, "expected names with paths"),
    "embeddings of numbers": ({"embeddings": {"a": 1}}, "embeddings: path is 1, expected a text"),
    "a device": (
        {"embeddings": [{"name": "a", "path": "/dev/zero", "sha256": "0"}]},
        "the embedding 'a' in '/dev/zero' is no regular file",
    ),
    "too long": (" " * (MOST_BYTES + 1), "bytes, expected at most"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_requests_are_refused(tmp_path: Path, name: str) -> None:
    """One sentence says what is wrong, of a file as of a PNG."""
    content, message = BROKEN[name]
    path = written(tmp_path / "r.json", content)
    with pytest.raises(InvalidRequestError, match=message):
        read_request(path)
    if isinstance(content, dict):
        with pytest.raises(InvalidRequestError, match=message):
            read_png(png(tmp_path / "o.png", {KEYWORD: json.dumps({"format": 1, "request": content})}))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "does not say how it was drawn"),
        ({"parameters": "a cat"}, "does not say how it was drawn"),
        ({KEYWORD: "a cat"}, "is no JSON"),
        ({KEYWORD: "{}"}, "has the format null, expected 1"),
        ({KEYWORD: '{"format": 2}'}, "has the format 2, expected 1"),
        ({KEYWORD: '{"format": 1}'}, "is missing, or no JSON object"),
        ({KEYWORD: '{"format": 1, "request": {}, "hand_over": "x"}'}, 'hand_over is "x", expected a number'),
        ({KEYWORD: " " * 2**21}, "cannot read .*: it is no sound PNG|expected at most"),
    ],
)
def test_hostile_pngs_are_refused(tmp_path: Path, texts: Mapping[str, str], message: str) -> None:
    """So is a picture that another program wrote, and a text that is too long, also when it was packed."""
    with pytest.raises(InvalidRequestError, match=message):
        read_png(png(tmp_path / "o.png", texts))


def test_a_damaged_record_raises_nothing_else(tiny: Any, tmp_path: Path) -> None:
    """Records with any character changed are read or refused, and what was read is a request or refused."""
    manifest = Bundle.open(tiny.bundle("sd1")).manifest
    options = {name: VALUES[name] for name in ("steps", "guidance", "sampler", "seed", "vae_tiling", "prompt_syntax")}
    text = json.dumps({"prompt": "a", **document(create_request(manifest, "a", **options))})
    draw = random.Random(0)
    path, sound = tmp_path / "r.json", 0
    for _ in range(1500):
        letters = list(text)
        for _ in range(draw.randint(1, 3)):
            letters[draw.randrange(len(letters))] = draw.choice('{}[]",:0123456789.eE-+ntfalse \\u\0é')
        path.write_text("".join(letters), encoding="utf-8")
        try:
            found = dict(read_request(path).options)
            create_request(manifest, found.pop("prompt", ""), **found)
            sound += 1
        except InvalidRequestError:
            pass
    assert sound > 10


def test_what_is_too_long_for_a_png_is_left_out(tiny: Any) -> None:
    """A record that readers would refuse is none."""
    request = create_request(Bundle.open(tiny.bundle("sd1")).manifest, "a" * MOST_BYTES)
    assert record(request, "sd1") is None


def test_files_that_requests_record_must_be_the_same(tmp_path: Path) -> None:
    """A recorded file's hash is compared in whatever case its letters are."""
    file = tmp_path / "a.bin"
    file.write_bytes(b"x")
    digest = hashlib.sha256(b"x").hexdigest()
    entry = {"name": "a", "path": str(file), "sha256": digest.upper()}
    path = written(tmp_path / "r.json", {"embeddings": [entry]})
    assert read_request(path).embeddings == {"a": str(file)}
    file.write_bytes(b"y")
    with pytest.raises(InvalidRequestError, match="its SHA-256 differs; give the file itself"):
        read_request(path)
