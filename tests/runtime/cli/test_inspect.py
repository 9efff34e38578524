"""``latentrt inspect``: what it reports of a bundle is what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latentrt.engines.store import EngineStore
from latentrt.runtime import Bundle
from latentrt.runtime.cli import main

Captured = pytest.CaptureFixture[str]


def test_inspect_shows_components_and_defaults(tiny_bundles: dict[str, Path], capsys: Captured) -> None:
    """Every component with its form, precision, size and inputs; the defaults of a request."""
    bundle = tiny_bundles["sd1"]
    assert main(["inspect", str(bundle)]) == 0
    out = capsys.readouterr().out
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert f"{manifest['source']['name']}: " in out
    assert "latents: 4 channels, 1/2 of the image's size, scaling 0.18215; default 32x32, pndm, " in out
    for name, component in manifest["components"].items():
        (form,) = component["graphs"]
        assert any(line.split()[:3] == [name, form, "fp32"] for line in out.splitlines())
    assert "sample: float32[" in out


def test_inspect_json_is_the_manifest(tiny_bundles: dict[str, Path], capsys: Captured) -> None:
    """--json carries bundle.json as it is, and no engines where there are none."""
    bundle = tiny_bundles["sd2"]
    assert main(["inspect", str(bundle), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["manifest"] == json.loads((bundle / "bundle.json").read_text())
    assert report["bundle"] == str(bundle.resolve())
    assert report["engines"] == []


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_inspect_names_what_a_bundle_can_do(tiny: Any, kind: str, capsys: Captured) -> None:
    """Family, tasks, kind of guidance, options, samplers, sizes, loops and engines, in words and as JSON."""
    bundle = tiny.bundle(kind)
    assert main(["inspect", str(bundle)]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
    assert main(["inspect", str(bundle), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["abilities"]
    manifest = Bundle.open(bundle).manifest
    assert next(iter(lines.values())).startswith(f"{manifest.family}, ")
    assert lines["tasks"] == "text-to-image image-to-image inpainting; loops: fused plain"
    assert lines["sizes"].startswith("any multiples of 2 up to 16384 pixels a side, ")
    assert lines["samplers"].split() == told["samplers"]
    assert lines["engines"].startswith("onnxruntime fp32, openvino fp32 bf16, onnxruntime-cuda fp32, ")
    assert (told["tasks"], told["guidance"], told["loops"]) == (
        ["text-to-image", "image-to-image", "inpainting"],
        "classifier-free",
        ["fused", "plain"],
    )
    assert "tensorrt-rtx" not in told["engines"], "there are no plans"
    assert told["engines"]["openvino"] == ["fp32", "bf16"]


def test_inspect_shows_compiled_engines(tiny_bundle: Path, capsys: Captured) -> None:
    """A compiled engine appears with version, target and profile; a damaged one is found by its hash."""
    record = EngineStore(tiny_bundle / "engines").add(
        "0" * 24,
        lambda path: path.write_bytes(b"plan") and None,
        engine="tensorrt-rtx",
        component="unet",
        file="unet.plan",
        precision="fp16",
        profile={"sample": ((1, 4, 8, 8), (2, 4, 16, 16), (2, 4, 16, 16))},
        sdk="tensorrt-rtx",
        sdk_version="1.2.3",
        target="sm_80+",
    )
    assert main(["inspect", str(tiny_bundle)]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if record.key in line]
    for part in ("unet", "tensorrt-rtx", "1.2.3", "fp16", "4 B", "sm_80+", "sample 1x4x8x8:2x4x16x16:2x4x16x16"):
        assert part in line
    assert main(["inspect", str(tiny_bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engines"][0]["key"] == record.key
    (tiny_bundle / "engines" / record.key / "unet.plan").write_bytes(b"plaN")
    assert main(["inspect", str(tiny_bundle), "--verify-hash"]) == 1
    assert "the SHA-256 of unet.plan is not the recorded one" in capsys.readouterr().err
