"""``latentrt inspect`` and ``latentrt doctor``: what they report is what is there."""

from __future__ import annotations

import json
import os
import platform
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from latentrt.engines.errors import EngineUnavailableError, InvalidRequestError
from latentrt.engines.kind import Availability
from latentrt.engines.kinds import KINDS
from latentrt.engines.store import EngineStore
from latentrt.engines.trt import Sdk
from latentrt.engines.trt import kind as trt_kind
from latentrt.engines.trt.cuda import CudaDevice
from latentrt.runtime import Bundle
from latentrt.runtime.abilities import abilities
from latentrt.runtime.cli import doctor, main
from latentrt.runtime.inputs.create import create_request
from latentrt.runtime.request.options import FAMILY_OPTIONS
from latentrt.runtime.samplers import SAMPLERS

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


def test_a_bundle_does_what_inspect_names_and_refuses_the_rest(tiny_bundles: dict[str, Path]) -> None:
    """Each sampler that is named draws, and each other one is one clear sentence; so are foreign options."""
    bundle = Bundle.open(tiny_bundles["sd1"])
    told = abilities(bundle)
    assert "euler" in told["samplers"]
    assert set(told["samplers"]) < set(SAMPLERS), "flow matching needs a model of its own"
    for name in SAMPLERS:
        request = create_request(bundle.manifest, "a red apple", sampler=name, steps=8)
        if name in told["samplers"]:
            assert len(request.compile_plan(bundle.manifest.scheduler)) >= 8
        else:
            with pytest.raises(InvalidRequestError, match=r"\w"):
                request.compile_plan(bundle.manifest.scheduler)
    for name in set(FAMILY_OPTIONS) - {"negative_prompt", "clip_skip", "prompt_syntax"}:
        assert name not in told["options"]
    with pytest.raises(InvalidRequestError, match="models of the family stable-diffusion have no prompt_2"):
        create_request(bundle.manifest, "a red apple", prompt_2="a rocket")
    with pytest.raises(InvalidRequestError, match="width is 33, expected a multiple of 2; the nearest are 32 and 34"):
        create_request(bundle.manifest, "a red apple", width=33)


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


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without TensorRT of either kind."""

    def missing(name: str) -> object:
        raise EngineUnavailableError(f"{name} is not installed; install it with: pip install {name}")

    monkeypatch.setattr(trt_kind, "load_sdk", missing)


@pytest.mark.usefixtures("no_tensorrt")
def test_doctor_reports_machine_and_engines(capsys: Captured) -> None:
    """Versions are the installed ones; what is missing comes with the way to get it."""
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["latentrt"] == version("latentrt")
    assert report["machine"]["python"] == platform.python_version()
    assert report["machine"]["processors"] == os.cpu_count()
    engines = {engine["name"]: engine for engine in report["engines"]}
    assert list(engines) == [*KINDS, "export"]
    assert engines["onnxruntime"] == {
        "name": "onnxruntime",
        "state": "present",
        "version": onnxruntime.__version__,
        "runs": True,
        "builds": True,
        "detail": "CPU",
    }
    openvino = engines["openvino"]
    assert openvino["version"] == version("openvino")
    assert (openvino["runs"], openvino["builds"]) == (True, True)
    assert openvino["detail"].startswith("CPU: fp32")
    tensorrt = engines["tensorrt"]
    assert (tensorrt["state"], tensorrt["runs"], tensorrt["builds"]) == ("missing", False, False)
    assert "pip install tensorrt" in engines["tensorrt"]["detail"]
    assert engines["export"]["version"] == version("torch")


@pytest.mark.usefixtures("no_tensorrt")
def test_doctor_prints_a_table(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row an engine; GPUs are listed by name."""
    monkeypatch.setattr(doctor, "cuda_devices", lambda: (CudaDevice("NVIDIA Test", "sm_90"),))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "gpus: NVIDIA Test (sm_90)" in lines
    assert any(line.split()[:5] == ["onnxruntime", "present", onnxruntime.__version__, "yes", "yes"] for line in lines)
    assert any(line.split()[:5] == ["tensorrt", "missing", "-", "no", "no"] for line in lines)


@pytest.mark.usefixtures("no_tensorrt")
def test_doctor_without_the_exporter(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lean installation is told which extra exports models."""
    monkeypatch.setattr(doctor, "_EXPORT_PACKAGES", ("torch", "a-package-that-is-not-there"))
    assert main(["doctor", "--json"]) == 0
    export = json.loads(capsys.readouterr().out)["engines"][-1]
    assert (export["builds"], export["detail"]) == (
        False,
        'a-package-that-is-not-there is missing; install it with: pip install "latentrt[export]"',
    )


GPU_ENGINES = ("onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx", "tensorrt", "tensorrt-rtx")


def test_doctor_says_what_auto_would_choose(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with everything it is plans where there are some, else CUDA; on a CPU ONNX Runtime."""
    missing: set[str] = set()

    def probe(name: str) -> Availability:
        return Availability(name, "missing" if name in missing else "present", "1", "")

    monkeypatch.setattr(doctor, "probe", probe)

    def auto() -> tuple[object, str]:
        assert main(["doctor", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)["auto"]
        assert main(["doctor"]) == 0
        return report, capsys.readouterr().out.splitlines()[-1]

    assert auto() == (
        {"with_plans": ["tensorrt", "tensorrt-rtx"], "otherwise": "onnxruntime-cuda"},
        "auto: tensorrt where a bundle has plans for this GPU, "
        "else tensorrt-rtx where a bundle has plans for this GPU, else onnxruntime-cuda",
    )
    missing |= set(GPU_ENGINES)
    assert auto() == ({"with_plans": [], "otherwise": "onnxruntime"}, "auto: onnxruntime")
    missing |= {"onnxruntime", "openvino"}
    assert auto() == ({"with_plans": [], "otherwise": None}, "auto: nothing can run here")


@pytest.mark.usefixtures("no_tensorrt")
def test_doctor_tells_missing_from_unusable(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX without a GPU is unusable for drawing, and still builds."""
    monkeypatch.setattr(trt_kind, "load_sdk", lambda name: Sdk(name, types.ModuleType(name)))
    for module in (doctor, trt_kind):
        monkeypatch.setattr(module, "cuda_devices", lambda: ())
    monkeypatch.setattr(Sdk, "version", "1.7.0")
    assert main(["doctor", "--json"]) == 0
    engines = {engine["name"]: engine for engine in json.loads(capsys.readouterr().out)["engines"]}
    for name, builds in (("tensorrt", False), ("tensorrt-rtx", True)):
        found = engines[name]
        assert (found["state"], found["version"], found["runs"], found["builds"]) == (
            "unusable",
            "1.7.0",
            False,
            builds,
        )
        assert "no CUDA device was found" in found["detail"]


def test_doctor_here(capsys: Captured) -> None:
    """Whatever this machine has, doctor succeeds and writes nothing to stderr."""
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "onnxruntime" in out
