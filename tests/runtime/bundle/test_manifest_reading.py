"""The ``manifest``: what is written is read back, and whatever is wrong ends in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.engines.base import TensorSpec
from latentrt.engines.errors import BundleError, BundleVersionError
from latentrt.runtime.bundle.manifest import (
    Adapter,
    Component,
    Defaults,
    FileEntry,
    Graph,
    Latent,
    Manifest,
    Source,
    Tokenizer,
)
from latentrt.runtime.bundle.manifest_reading import read_manifest

GRAPH = Graph(
    file="unet/model.onnx",
    precision="fp16",
    opset=20,
    inputs=(TensorSpec("sample", "float16", ("batch", 4, "height", "width")),),
    outputs=(TensorSpec("out_sample", "float16", ("batch", 4, "height", "width")),),
    external=("unet/model.onnx.data",),
)
MANIFEST = Manifest(
    format_version=2,
    family="sd1",
    prediction_type="epsilon",
    components={"unet": Component("unet", {"opset20-fp16": GRAPH})},
    files={
        "unet/model.onnx": FileEntry(12, "0" * 64),
        "unet/model.onnx.data": FileEntry(0, "f" * 64),
        "tokenizer/tokenizer.json": FileEntry(2**40, "1" * 64),
    },
    latent=Latent(channels=4, vae_scale_factor=8, scaling=0.18215, shift=0.0),
    tokenizers={"tokenizer": Tokenizer("tokenizer", 77, 49407)},
    scheduler={"_class_name": "PNDMScheduler", "beta_end": 0.012, "trained_betas": None, "list": [1, True, "ä"]},
    defaults=Defaults("dpmpp-2m", 20, 7.5, 512, 768, 0),
    source=Source("a model 🐈", "", "abc", (Adapter("style.safetensors", "0" * 64, -0.5),)),
    tools={"torch": "2.9.0+cpu"},
    quality={"unet/model.onnx": 81.25},
    settings={"guidance": "embedded", "zeros": False, "length": 512, "scale": 0.5},
)


def edited(*path: str | int, value: Any) -> str:
    """The manifest's JSON with one value replaced."""
    record = json.loads(MANIFEST.to_json())
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(record)


def removed(*path: str) -> str:
    record = json.loads(MANIFEST.to_json())
    place = record
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return json.dumps(record)


def test_round_trip() -> None:
    """A manifest that is written is read back equal, floats and emoji included."""
    assert read_manifest(MANIFEST.to_json()) == MANIFEST


def test_json_is_deterministic() -> None:
    """The order in which entries were added does not show; keys are sorted, and a newline ends the text."""
    shuffled = replace(MANIFEST, files=dict(reversed(list(MANIFEST.files.items()))))
    assert shuffled.to_json() == MANIFEST.to_json()
    assert MANIFEST.to_json().endswith("}\n")
    assert list(json.loads(MANIFEST.to_json())) == sorted(json.loads(MANIFEST.to_json()))


def test_nan_is_not_written() -> None:
    """A measurement of NaN or infinity, which JSON cannot hold, is refused while writing."""
    for value in (float("nan"), float("inf")):
        with pytest.raises(BundleError, match="cannot be written as JSON"):
            replace(MANIFEST, quality={"psnr": value}).to_json()


@pytest.mark.parametrize("version", [1, 3, 99])
def test_another_format(version: int) -> None:
    """Another format is named together with the one that can be read, even if its other keys are unknown."""
    text = json.dumps({"format_version": version, "surprise": []})
    remedy = "upgrade latentrt" if version > 2 else "build the bundle again"
    with pytest.raises(BundleVersionError, match=rf"format_version is {version}.*reads format 2; {remedy}"):
        read_manifest(text)


WRONG: list[tuple[tuple[str | int, ...], Any]] = [
    (("format_version",), "1"),
    (("format_version",), True),
    (("format_version",), 0),
    (("family",), ""),
    (("family",), "a b"),
    (("prediction_type",), "noise"),
    (("components",), []),
    (("components", "unet", "name"), "vae"),
    (("components", "unet", "graphs"), None),
    (("components", "unet", "graphs", "opset20-fp16", "precision"), "fp12"),
    (("components", "unet", "graphs", "opset20-fp16", "opset"), 20.0),
    (("components", "unet", "graphs", "opset20-fp16", "opset"), -1),
    (("components", "unet", "graphs", "opset20-fp16", "file"), "unet/model.ort"),
    (("components", "unet", "graphs", "opset20-fp16", "file"), "../model.onnx"),
    (("components", "unet", "graphs", "opset20-fp16", "external"), ["/etc/passwd"]),
    (("components", "unet", "graphs", "opset20-fp16", "external"), "unet/model.onnx.data"),
    (("components", "unet", "graphs", "opset20-fp16", "inputs", 0, "dtype"), "float128"),
    (("components", "unet", "graphs", "opset20-fp16", "inputs", 0, "shape"), [0]),
    (("components", "unet", "graphs", "opset20-fp16", "inputs", 0, "shape"), [-4]),
    (("components", "unet", "graphs", "opset20-fp16", "inputs", 0, "shape"), [1] * 9),
    (("components", "unet", "graphs", "opset20-fp16", "inputs", 0, "name"), ""),
    (("files",), {"a": 1}),
    (("files", "unet/model.onnx", "size"), -1),
    (("files", "unet/model.onnx", "size"), 1.5),
    (("files", "unet/model.onnx", "size"), 10**18),
    (("files", "unet/model.onnx", "sha256"), "0" * 63),
    (("files", "unet/model.onnx", "sha256"), "A" * 64),
    (("latent", "channels"), 0),
    (("latent", "channels"), 129),
    (("latent", "factor"), 6),
    (("latent", "factor"), 128),
    (("latent", "factor"), True),
    (("latent", "scaling"), 0),
    (("latent", "scaling"), -1.0),
    (("latent", "scaling"), "0.18"),
    (("latent", "shift"), None),
    (("tokenizers", "tokenizer", "directory"), ""),
    (("tokenizers", "tokenizer", "max_length"), 1),
    (("tokenizers", "tokenizer", "pad_token_id"), -1),
    (("scheduler",), "ddim"),
    (("defaults", "steps"), 0),
    (("defaults", "guidance"), -1),
    (("defaults", "width"), 511),
    (("defaults", "height"), 0),
    (("defaults", "clip_skip"), -1),
    (("defaults", "sampler"), None),
    (("source", "name"), 5),
    (("source", "fingerprint"), "\ud800"),
    (("source", "adapters"), {}),
    (("source", "adapters", 0, "sha256"), "0" * 63),
    (("source", "adapters", 0, "scale"), None),
    (("tools", "torch"), 2),
    (("quality", "unet/model.onnx"), "good"),
    (("tokenizers", "tokenizer", "kind"), "a b"),
    (("settings",), []),
    (("settings",), {f"setting{number}": 0 for number in range(65)}),
    (("settings", "zeros"), None),
    (("settings", "zeros"), [True]),
    (("settings", "guidance"), "x" * 201),
]


@pytest.mark.parametrize(("path", "value"), WRONG, ids=lambda item: str(item)[:60])
def test_wrong_value(path: tuple[str | int, ...], value: Any) -> None:
    """A value of the wrong type or out of range is refused by a sentence that names its key."""
    with pytest.raises(BundleError) as caught:
        read_manifest(edited(*path, value=value), origin="here/bundle.json")
    message = str(caught.value)
    named = [str(part) for part in path if isinstance(part, str)]
    assert message.startswith("here/bundle.json: ")
    assert named[0] in message
    assert named[-1] in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "path",
    [("family",), ("files",), ("latent", "shift"), ("source", "licence"), ("defaults", "steps"), ("format_version",)],
    ids="-".join,
)
def test_missing_key(path: tuple[str, ...]) -> None:
    """A missing key is named."""
    with pytest.raises(BundleError, match=f"lacks the key '{path[-1]}'"):
        read_manifest(removed(*path))


@pytest.mark.parametrize("place", [(), ("latent",), ("files", "unet/model.onnx"), ("source",)], ids=str)
def test_unknown_key(place: tuple[str, ...]) -> None:
    """A key that this format does not have is named, not ignored."""
    with pytest.raises(BundleError, match="unknown key 'extra'"):
        read_manifest(edited(*place, "extra", value=1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "expected an object"),
        ("null", "expected an object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1e999}', "too large"),
        ('{"a": ' + "9" * 10_000 + "}", "too large"),
        ('{"a": 1, "a": 1}', "twice"),
        (" " * (5 << 20), "at most"),
    ],
    ids=lambda text: text[:20],
)
def test_not_a_manifest(text: str, message: str) -> None:
    """Texts that are no manifest, bombs among them, end in one sentence."""
    with pytest.raises(BundleError, match=message):
        read_manifest(text)


def test_deep_scheduler() -> None:
    """A scheduler configuration that JSON can just nest is refused before anything recurses through it."""
    value: Any = 1
    for _ in range(100):
        value = [value]
    with pytest.raises(BundleError, match=r"scheduler\.x is nested too deeply"):
        read_manifest(edited("scheduler", "x", value=value))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("UNET/Model.onnx", "one file on some systems"),
        ("unet/model.onnx/weights", "both as a file and as the directory"),
        ("bundle.json", "place of the manifest"),
        ("engines/abc/plan", "place of the manifest or of compiled engines"),
        ("Engines/abc/plan", "place of the manifest or of compiled engines"),
        ("../outside", "leaves its directory"),
    ],
)
def test_paths_that_cannot_be_listed(extra: str, message: str) -> None:
    """Paths that collide with each other or with the bundle's own places are refused."""
    with pytest.raises(BundleError, match=message):
        read_manifest(edited("files", extra, value={"size": 1, "sha256": "0" * 64}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda: removed("files", "unet/model.onnx"),
            "opset20-fp16 names 'unet/model.onnx', which files does not list",
        ),
        (lambda: removed("files", "unet/model.onnx.data"), "'unet/model.onnx.data', which files does not list"),
        (lambda: removed("files", "tokenizer/tokenizer.json"), "tokenizers.tokenizer needs 'tokenizer/tokenizer.json'"),
        (
            lambda: edited("components", "unet", "graphs", "opset20-fp16", "external", value=["unet/model.onnx"]),
            "names a file twice",
        ),
    ],
)
def test_references_to_files(spoil: Callable[[], str], message: str) -> None:
    """Whatever a graph or a tokenizer needs has to be listed."""
    with pytest.raises(BundleError, match=message):
        read_manifest(spoil())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), value=JSON)
def test_any_value_anywhere(data: st.DataObject, value: Any) -> None:
    """Any JSON in any place gives a manifest that can be written again, or BundleError, and nothing else."""
    record: Any = json.loads(MANIFEST.to_json())
    place, key = record, data.draw(st.sampled_from(sorted(record)))
    while isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = value
    try:
        manifest = read_manifest(json.dumps(record))
    except BundleError:
        return
    assert read_manifest(manifest.to_json()) == manifest


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30))
def test_any_text(text: str) -> None:
    """No text whatever raises anything but BundleError."""
    with pytest.raises(BundleError):
        read_manifest(text)
