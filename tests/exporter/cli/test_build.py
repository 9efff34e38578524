"""The commands ``build`` (``latentrt build-engine``) and ``verify``: what they print, and how they end."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from latentrt.engines.store import EngineStore
from latentrt.exporter.builder import construction
from latentrt.exporter.families.stable_diffusion import StableDiffusion
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.cli import main

EditJson = Callable[..., None]
Damage = Callable[[Path, EditJson], object]
UNET = "unet/diffusion_pytorch_model.safetensors"


def status_of(*arguments: str | Path) -> int:
    """Exit status of a command line, be it returned or raised by argparse."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def remove(path: str) -> Damage:
    return lambda source, _edit: (source / path).unlink()


def write(path: str, content: str) -> Damage:
    return lambda source, _edit: (source / path).write_text(content)


def change(path: str, **changes: Any) -> Damage:
    return lambda source, edit: edit(source / path, **changes)


def cut(source: Path, _edit: EditJson) -> None:
    os.truncate(source / UNET, (source / UNET).stat().st_size - 1)


def pickled(source: Path, _edit: EditJson) -> None:
    (source / UNET).rename(source / "unet" / "diffusion_pytorch_model.bin")


def not_a_number(source: Path, _edit: EditJson) -> None:
    tensors = load_file(source / UNET)
    tensors["conv_in.bias"][0] = math.nan
    save_file(tensors, source / UNET)


def no_source(source: Path, _edit: EditJson) -> None:
    shutil.rmtree(source)


def a_file(source: Path, _edit: EditJson) -> None:
    shutil.rmtree(source)
    source.write_text("")


DAMAGE: dict[str, Damage] = {
    "missing": no_source,
    "file": a_file,
    "no-index": remove("model_index.json"),
    "other-pipeline": change("model_index.json", _class_name="FluxPipeline"),
    "other-component": change("model_index.json", unet=["diffusers", "UNet3DConditionModel"]),
    "other-scheduler": change("scheduler/scheduler_config.json", _class_name="NoScheduler"),
    "broken-scheduler": change("scheduler/scheduler_config.json", beta_end=-1),
    "no-json": write("unet/config.json", "{"),
    "list": write("unet/config.json", "[]"),
    "absurd": change("unet/config.json", layers_per_block=10**6),
    "does-not-fit": change("unet/config.json", layers_per_block=2),
    "cut": cut,
    "nan": not_a_number,
    "pickled": pickled,
    "no-vocabulary": remove("tokenizer/tokenizer.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_source(
    tiny_source: Path,
    tmp_path: Path,
    edit_json: EditJson,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    """A bad source ends with status 1 and one line on stderr, before any export, and nothing is written."""
    monkeypatch.setattr(construction, "export_component", lambda *_: pytest.fail("something was exported"))
    DAMAGE[damage](tiny_source, edit_json)
    (tmp_path / "out").mkdir()
    assert status_of("build-engine", tiny_source, "--output", tmp_path / "out" / "bundle") == 1
    output, errors = capfd.readouterr()
    assert errors.startswith("latentrt: ")
    assert errors.count("\n") == 1
    assert "Traceback" not in errors + output
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "flags",
    [
        ("--engine", "openvinyl"),
        ("--precision", "fp12"),
        ("--profile", "height"),
        ("--profile", "height=32:16:64"),
        ("--profile", "height=a:b:c"),
        ("--profile", "height=16:16"),
        ("--profile", "depth=16:16:16"),
        ("--profile", "height=32", "--profile", "height=64"),
        ("--profile", "batch=1:1:99999"),
        ("--height", "32", "--profile", "height=16:32:64"),
        ("--height", "0"),
        ("--width", "-16"),
        ("--batch", "0"),
        ("--height", "33"),
        ("--width", "4.5"),
        ("--height", "99999998"),
        ("--sampler", "magic"),
        ("--sampler", "flow-euler"),
        ("--steps", "0"),
        ("--steps", "-1"),
        ("--steps", "1001"),
        ("--steps", "many"),
        ("--guidance", "nan"),
        ("--guidance", "inf"),
        ("--guidance", "-1"),
        ("--height",),
        ("--magic",),
    ],
    ids=" ".join,
)
def test_bad_flags(
    tiny_source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
) -> None:
    """A wrong command line ends with status 2, before any export, and says what is wrong."""
    monkeypatch.setattr(construction, "export_component", lambda *_: pytest.fail("something was exported"))
    assert status_of("build-engine", tiny_source, "--output", tmp_path / "bundle", *flags) == 2
    output, errors = capfd.readouterr()
    assert errors.splitlines()[-1].startswith("latentrt")
    assert "Traceback" not in errors + output
    assert not (tmp_path / "bundle").exists()


def test_missing_arguments(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a source, or without a place for the bundle, the status is 2."""
    assert status_of("build-engine") == 2
    assert status_of("build-engine", tmp_path) == 2
    assert status_of("verify", tmp_path) == 2
    assert "--source" in capfd.readouterr().err


# --- places that cannot be written


@pytest.mark.parametrize("place", ["file/bundle", "file", "notes", "/proc/latentrt/bundle", "long" * 100])
def test_unwritable_output(
    tiny_source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    place: str,
) -> None:
    """A place that cannot be written ends with status 1 and one line, before any export; what is there stays."""
    monkeypatch.setattr(construction, "export_component", lambda *_: pytest.fail("something was exported"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    assert status_of("build-engine", tiny_source, "--output", tmp_path / place) == 1
    errors = capfd.readouterr().err
    assert errors.startswith("latentrt: ")
    assert errors.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "notes", "source"]
    assert (tmp_path / "file").read_text() == (tmp_path / "notes" / "notes.txt").read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.heavy
@pytest.mark.parametrize("left_over", [200_000, 1000], ids=["graph", "tokenizer"])
def test_full_disk(
    tiny_source: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    left_over: int,
) -> None:
    """A disk that fills up, at whatever file, ends with status 1 and one line, and nothing is left on it."""
    monkeypatch.setattr(StableDiffusion, "components", ("text_encoder",))
    (small_disk / "rest").write_bytes(bytes(256 * 1024 - left_over))
    assert status_of("build-engine", tiny_source, "--output", small_disk / "bundle") == 1
    errors = capfd.readouterr().err
    assert "free some space" in errors
    assert errors.count("\n") == 1
    assert [path.name for path in small_disk.iterdir()] == ["rest"]


# --- what works


@pytest.mark.heavy
def test_build_and_verify(
    tiny_source: Path, tmp_path: Path, copied_exports: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """A build says what it did, as text and as JSON; ``verify`` passes on it and fails on another source."""
    bundle = tmp_path / "bundle"
    flags = ("--steps", "7", "--guidance", "2.5", "--sampler", "ddim")
    assert status_of("build-engine", tiny_source, "--output", bundle, *flags) == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    assert len(copied_exports) == len(StableDiffusion.components)
    assert output.count("dB against torch") == len(StableDiffusion.components) + 1, (
        "the stages of the U-Net are compared too"
    )
    assert f"{bundle}: ready" in output.splitlines()[-1]
    defaults = Bundle.open(bundle, verify_hash=True).manifest.defaults
    assert (defaults.steps, defaults.guidance, defaults.sampler) == (7, 2.5, "ddim")
    assert (defaults.width, defaults.height) == (32, 32)

    assert status_of("build-engine", tiny_source, "--output", bundle, *flags, "--json") == 0
    output, errors = capfd.readouterr()
    report = json.loads(output)
    assert errors == ""
    assert report["bundle"] == str(bundle)
    assert (report["exported"], report["quality"], report["engines"]) == ([], {}, [])

    assert status_of("verify", bundle, "--source", tiny_source) == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    assert "7 graphs compute what the source computes" in output

    assert status_of("verify", bundle, "--source", tiny_source, "--json") == 0
    figures = json.loads(capfd.readouterr().out)["psnr_db"]
    stages = {f"unet/{stage}.onnx" for stage in ("prompt", "schedule", "step")}
    assert set(figures) == {f"{name}/model.onnx" for name in StableDiffusion.components} | stages
    assert min(figures.values()) > 80

    not_a_number(tiny_source, lambda *_: None)
    assert status_of("verify", bundle, "--source", tiny_source) == 1
    errors = capfd.readouterr().err
    assert "was not built from source" in errors
    assert errors.count("\n") == 1


def test_verify_refuses(
    tiny_source: Path, tiny_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """``verify`` ends with status 1 and one line for what is no bundle, no source, or damaged."""
    file = tiny_bundle / "unet" / "model.onnx"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    for arguments in ((tmp_path, tiny_source), (tmp_path / "nowhere", tiny_source), (tiny_bundle, tmp_path)):
        assert status_of("verify", arguments[0], "--source", arguments[1]) == 1
        assert capfd.readouterr().err.count("\n") == 1
    file.write_bytes(content)
    assert status_of("verify", tiny_bundle, "--source", tiny_source) == 1
    errors = capfd.readouterr().err
    assert "SHA-256" in errors
    assert errors.count("\n") == 1
    assert EngineStore(tiny_bundle / "engines").records() == []
