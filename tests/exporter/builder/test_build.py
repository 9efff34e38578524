"""Bundles are built from what changed alone, compared with their source, and never half written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.engines.errors import (
    EngineUnavailableError,
    ExportError,
    InvalidRequestError,
    OutputError,
    SourceError,
    VerificationError,
)
from latentrt.engines.trt import Range
from latentrt.exporter.builder import build, construction
from latentrt.exporter.builder.build import BuildReport, build_bundle
from latentrt.exporter.builder.request import BuildRequest
from latentrt.exporter.families.stable_diffusion import StableDiffusion
from latentrt.exporter.graphs import export as onnx_export
from latentrt.exporter.graphs.targets import Form
from latentrt.exporter.progress import Silent
from latentrt.exporter.verification.components import GATES
from latentrt.runtime.bundle.reader import Bundle

ChangeWeights = Callable[[Path], None]

FORM = "opset20-fp32"


def snapshot(directory: Path) -> dict[str, bytes]:
    """Content of every file below a directory, hidden ones too."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def unverified(source: Path, output: Path) -> BuildReport:
    return build_bundle(BuildRequest(source, output, verify=False))


@pytest.mark.heavy
def test_verification_failure(
    tiny_source: Path, tmp_path: Path, copied_exports: list[str], change_weights: ChangeWeights
) -> None:
    """Graphs that hold other weights than the source are refused, and no bundle is left."""
    change_weights(tiny_source)
    with pytest.raises(VerificationError, match=r"text_encoder \(fp32\) does not compute what its source computes"):
        build_bundle(BuildRequest(tiny_source, tmp_path / "out" / "bundle"))
    assert copied_exports == [f"text_encoder {FORM}"]
    assert snapshot(tmp_path / "out") == {}
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.heavy
def test_gate(tiny_source: Path, tmp_path: Path, copied_exports: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure below the gate is refused although the graph is right."""
    monkeypatch.setitem(GATES, "fp32", 400.0)
    with pytest.raises(VerificationError, match="at least 400 dB are required"):
        build_bundle(BuildRequest(tiny_source, tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.heavy
def test_second_build_reuses(
    tiny_source: Path, tmp_path: Path, copied_exports: list[str], graph_files: tuple[str, ...]
) -> None:
    """A build of what is there already exports nothing and changes no file."""
    report = unverified(tiny_source, tmp_path / "bundle")
    assert report.exported == graph_files
    before, times = snapshot(report.path), {p: p.stat().st_mtime_ns for p in report.path.rglob("*")}
    again = unverified(tiny_source, tmp_path / "bundle")
    assert again.exported == ()
    assert len(copied_exports) == 4
    assert snapshot(report.path) == before
    assert {p: p.stat().st_mtime_ns for p in report.path.rglob("*")} == times


@pytest.mark.heavy
def test_what_causes_an_export(
    tiny_source: Path,
    tmp_path: Path,
    copied_exports: list[str],
    monkeypatch: pytest.MonkeyPatch,
    change_weights: ChangeWeights,
) -> None:
    """Other weights, other tools, a damaged bundle or a figure that is missing cause exports; new defaults do not."""
    output = tmp_path / "bundle"
    unverified(tiny_source, output)
    first = Bundle.open(output).manifest
    copied_exports.clear()

    build_bundle(BuildRequest(tiny_source, output, verify=False, steps=33, guidance=1.0, sampler="ddim"))
    (tiny_source / "README.md").write_text("license: mit\n")
    unverified(tiny_source, output)
    assert copied_exports == []
    assert Bundle.open(output, verify_hash=True).manifest.source.licence == "mit"
    assert Bundle.open(output).manifest.files == first.files
    kept = Bundle.open(output).manifest.defaults
    assert (kept.steps, kept.guidance, kept.sampler) == (33, 1.0, "ddim"), "a build that names none keeps them"

    build_bundle(BuildRequest(tiny_source, output))  # with verification, of which nothing is known yet
    assert len(copied_exports) == 4
    assert min(Bundle.open(output).manifest.quality.values()) >= GATES["fp32"]
    copied_exports.clear()
    build_bundle(BuildRequest(tiny_source, output))
    assert copied_exports == []

    change_weights(tiny_source)
    unverified(tiny_source, output)
    assert len(copied_exports) == 4
    assert Bundle.open(output).manifest.source.fingerprint != first.source.fingerprint
    assert Bundle.open(output).manifest.quality == {}
    copied_exports.clear()

    with (output / "unet" / "model.onnx").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    unverified(tiny_source, output)
    assert len(copied_exports) == 4
    copied_exports.clear()

    monkeypatch.setattr(build, "tool_versions", lambda: {"torch": "0.1"})
    unverified(tiny_source, output)
    assert len(copied_exports) == 4


@pytest.mark.heavy
def test_another_form_beside_the_first(tiny_source: Path, tmp_path: Path, copied_exports: list[str]) -> None:
    """Another precision is added to a bundle; the graphs that it has stay, byte for byte."""
    before = snapshot(unverified(tiny_source, tmp_path / "bundle").path)
    copied_exports.clear()
    report = build_bundle(BuildRequest(tiny_source, tmp_path / "bundle", precision="fp16", verify=False))
    assert copied_exports == [f"{name} opset20-fp16" for name in StableDiffusion.components]
    bundle = Bundle.open(report.path, verify_hash=True)
    assert all(set(component.graphs) == {FORM, "opset20-fp16"} for component in bundle.manifest.components.values())
    after = snapshot(report.path)
    assert all(after[name] == content for name, content in before.items() if name != "bundle.json")


class Interrupting(Silent):
    """Raises at the nth event."""

    def __init__(self, event: int) -> None:
        self.left = event

    def stage(self, text: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    result = stage


@pytest.mark.heavy
@pytest.mark.parametrize("older", [False, True])
def test_interrupted(
    tiny_source: Path, tmp_path: Path, copied_exports: list[str], older: bool, change_weights: ChangeWeights
) -> None:
    """Ctrl-C at any event leaves the older bundle, or nothing, and no file beside it."""
    output = tmp_path / "out" / "bundle"
    output.parent.mkdir()
    if older:
        unverified(tiny_source, output)
        change_weights(tiny_source)
    before = snapshot(output.parent)
    for event in (0, 1, 4, 7):
        with pytest.raises(KeyboardInterrupt):
            build_bundle(BuildRequest(tiny_source, output, verify=False), Interrupting(event))
        assert snapshot(output.parent) == before
        assert [path.name for path in output.parent.iterdir()] == (["bundle"] if older else [])


@pytest.mark.heavy
def test_failing_export(
    tiny_source: Path,
    tmp_path: Path,
    copied_exports: list[str],
    monkeypatch: pytest.MonkeyPatch,
    change_weights: ChangeWeights,
) -> None:
    """An export that fails after others were done leaves the older bundle untouched."""
    output = tmp_path / "out" / "bundle"
    unverified(tiny_source, output)
    before = snapshot(output.parent)
    change_weights(tiny_source)
    working = construction.export_component

    def fail(component: onnx_export.Component, form: Form, directory: Path) -> object:
        if component.name == "vae_encoder":
            raise ExportError("vae_encoder could not be exported")
        return working(component, form, directory)

    monkeypatch.setattr(construction, "export_component", fail)
    with pytest.raises(ExportError):
        unverified(tiny_source, output)
    assert snapshot(output.parent) == before


def test_damage_is_found_before_anything_is_exported(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are not finite, or a tokenizer that is missing, are found before the first export."""
    monkeypatch.setattr(construction, "export_component", lambda *_: pytest.fail("something was exported"))
    file = tiny_source / "vae" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    tensors["decoder.conv_in.bias"][0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(SourceError, match="vae: the tensor"):
        unverified(tiny_source, tmp_path / "bundle")
    file.write_bytes(whole)
    shutil.rmtree(tiny_source / "tokenizer")
    with pytest.raises(SourceError, match="tokenizer"):
        unverified(tiny_source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 5000}, "1000 timesteps"),
        ({"sampler": "flow-euler"}, "flow"),
        ({"ranges": {"width": Range(16, 33, 64)}}, "width: range 16:33:64 must consist of multiples of 2"),
    ],
    ids=str,
)
def test_requests_that_do_not_suit_the_source(
    tiny_source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, object],
    message: str,
) -> None:
    """What only the source can tell is checked before anything is exported."""
    monkeypatch.setattr(construction, "export_component", lambda *_: pytest.fail("something was exported"))
    with pytest.raises(InvalidRequestError, match=message):
        build_bundle(BuildRequest(tiny_source, tmp_path / "bundle", **arguments))  # type: ignore[arg-type]


def test_engine_that_cannot_be_built(tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing SDK is found before anything is exported."""

    def missing(name: str) -> None:
        raise EngineUnavailableError(f"{name} is not installed")

    monkeypatch.setattr(build, "load_sdk", missing)
    monkeypatch.setattr(construction, "export_component", lambda *_: pytest.fail("something was exported"))
    with pytest.raises(EngineUnavailableError):
        build_bundle(BuildRequest(tiny_source, tmp_path / "bundle", ("onnxruntime", "tensorrt")))


def test_output_that_cannot_be_written(tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place that cannot be written, the source among them, is refused before anything is exported."""
    monkeypatch.setattr(construction, "export_component", lambda *_: pytest.fail("something was exported"))
    before = snapshot(tiny_source)
    for output in (tiny_source, tiny_source / "model_index.json", tiny_source / "model_index.json" / "bundle"):
        with pytest.raises(OutputError):
            unverified(tiny_source, output)
    assert snapshot(tiny_source) == before
