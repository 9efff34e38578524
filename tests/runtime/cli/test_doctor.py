"""``latentrt doctor``: what it reports is what is there, and what is missing comes with the way to get it."""

from __future__ import annotations

import json
import os
import platform
import types
from importlib.metadata import version

import onnxruntime
import pytest

from latentrt.engines.errors import EngineUnavailableError
from latentrt.engines.kind import Availability
from latentrt.engines.kinds import KINDS
from latentrt.engines.trt import Sdk
from latentrt.engines.trt import kind as trt_kind
from latentrt.engines.trt.cuda import CudaDevice
from latentrt.runtime.cli import doctor, main

Captured = pytest.CaptureFixture[str]


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
