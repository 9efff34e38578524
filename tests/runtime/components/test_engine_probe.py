"""What cannot run here is refused in one sentence that says what to install or to choose."""

from __future__ import annotations

import types
from typing import Any

import pytest

from latentrt.engines import onnxrt, onnxrt_gpu
from latentrt.engines.errors import EngineUnavailableError, InvalidRequestError, LatentRTError
from latentrt.engines.kinds import KINDS
from latentrt.engines.onnxrt_gpu import PROVIDERS
from latentrt.engines.openvino import engine as ov
from latentrt.engines.trt import kind as trt_kind
from latentrt.engines.trt.cuda import CudaDevice
from latentrt.runtime.bundle.manifest import PRECISIONS
from latentrt.runtime.components.engine_probe import check_engine, probe

CPU_ENGINES = ("onnxruntime", "openvino")
INSTALL = {
    "onnxruntime": "pip install onnxruntime",
    "openvino": 'pip install "latentrt[openvino]"',
    "onnxruntime-cuda": 'pip install "latentrt[cuda]"',
    "onnxruntime-tensorrt": 'pip install "latentrt[cuda]"',
    "onnxruntime-tensorrt-rtx": "pip install onnxruntime-ep-nv-tensorrt-rtx",
    "tensorrt": 'pip install "latentrt[tensorrt]"',
    "tensorrt-rtx": 'pip install "latentrt[tensorrt-rtx]"',
}
REFUSED = {  # engine -> precisions that no machine computes with it
    "onnxruntime": {"bf16", "fp8"},
    "openvino": {"fp8"},
    "onnxruntime-cuda": {"bf16", "int8", "fp8", "int8-weights"},
    "onnxruntime-tensorrt": {"int8-weights"},
    "onnxruntime-tensorrt-rtx": {"int8-weights"},
    "tensorrt": {"int8-weights"},
    "tensorrt-rtx": {"int8-weights"},
}


class Machine:
    """A machine with everything, from which a test takes something away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpus = (CudaDevice("NVIDIA Test", "sm_90"),)
        self.abilities = ["FP32", "BF16"]
        self.providers = [provider.name for provider in PROVIDERS.values()]
        self.missing: set[str] = set()
        self.patch = monkeypatch
        for module in (trt_kind, onnxrt_gpu):
            monkeypatch.setattr(module, "cuda_devices", lambda: self.gpus)
        monkeypatch.setattr(ov, "load_core", lambda: self)
        monkeypatch.setattr(onnxrt_gpu, "_plug_in", lambda ort, plugin: "")
        self._provide("onnxruntime", onnxrt, {"get_available_providers": lambda: self.providers})
        monkeypatch.setattr(onnxrt_gpu, "load_sdk", lambda: onnxrt.load_sdk())
        self._provide("openvino", ov, {})
        monkeypatch.setattr(trt_kind, "load_cuda", lambda: None)
        real = trt_kind.load_sdk

        def load_sdk(name: str) -> Any:
            if name in self.missing:
                monkeypatch.setitem(__import__("sys").modules, name.replace("-", "_"), None)
                return real(name)
            return types.SimpleNamespace(version="11.0")

        monkeypatch.setattr(trt_kind, "load_sdk", load_sdk)

    def _provide(self, name: str, module: Any, content: dict[str, Any]) -> None:
        real = module.load_sdk

        def load_sdk() -> Any:
            if name in self.missing:
                self.patch.setitem(__import__("sys").modules, name, None)
                return real()
            return types.SimpleNamespace(__version__="9.9", **content)

        self.patch.setattr(module, "load_sdk", load_sdk)

    def get_property(self, device: str, name: str) -> list[str]:
        return self.abilities


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def sentence(error: pytest.ExceptionInfo[LatentRTError]) -> str:
    """The message, which is one sentence with a way out."""
    message = str(error.value)
    assert "\n" not in message
    assert not message.endswith(".")
    assert 20 < len(message) < 250
    assert "; " in message
    return message


@pytest.mark.parametrize("lacking", ["nothing", "package", "gpu", "instructions"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("engine", KINDS)
def test_every_engine_at_every_precision(machine: Machine, engine: str, precision: str, lacking: str) -> None:
    """It passes, or is refused for what is lacking, and says what to do."""
    if lacking == "package":
        machine.missing = {engine}
        machine.providers = []
    elif lacking == "gpu":
        machine.gpus = ()
    elif lacking == "instructions":
        machine.gpus = (CudaDevice("NVIDIA Test", "sm_75"),)
        machine.abilities = ["FP32"]
    if precision in REFUSED.get(engine, ()):
        with pytest.raises(InvalidRequestError) as wrong:
            check_engine(engine, precision)
        message = sentence(wrong)
        assert message.startswith(f"{engine} does not compute in {precision}; choose fp32, ")
        able = [name for name, kind in KINDS.items() if precision in kind.precisions]
        assert message.endswith(f"or one of the engines {', '.join(able)}")
    elif lacking == "package":
        with pytest.raises(EngineUnavailableError) as missing:
            check_engine(engine, precision)
        assert INSTALL[engine] in sentence(missing)
    elif lacking == "gpu" and engine not in CPU_ENGINES:
        with pytest.raises(EngineUnavailableError) as absent:
            check_engine(engine, precision)
        assert sentence(absent).startswith(f"{engine} needs an NVIDIA GPU and its driver")
    elif lacking == "instructions" and (precision == "bf16" or (precision == "fp8" and engine not in CPU_ENGINES)):
        with pytest.raises(EngineUnavailableError) as slow:
            check_engine(engine, precision)
        assert f"has no instructions for {precision}" in sentence(slow)
        assert "choose precision fp" in str(slow.value)
    else:
        check_engine(engine, precision)


def test_unknown_names() -> None:
    """What is known is listed."""
    with pytest.raises(InvalidRequestError, match=r"unknown engine 'magic'; known engines: onnxruntime, .*, auto$"):
        check_engine("magic", None)
    with pytest.raises(InvalidRequestError, match="unknown precision 'fp7'; known precisions: fp32, fp16, bf16"):
        check_engine("onnxruntime", "fp7")


def test_states(machine: Machine) -> None:
    """Each engine is present with what it runs on, missing with the way to get it, or unusable with the reason."""
    found = {name: probe(name) for name in KINDS}
    assert {each.state for each in found.values()} == {"present"}
    assert (found["onnxruntime"].detail, found["openvino"].detail) == ("CPU", "CPU: fp32, bf16")
    assert found["tensorrt"].detail == "NVIDIA Test (sm_90)"
    assert {name: each.version for name, each in found.items()} == {
        name: "11.0" if name.startswith("tensorrt") else "9.9" for name in KINDS
    }
    machine.gpus = ()
    machine.missing = {"openvino", "tensorrt"}
    assert {name: probe(name).state for name in KINDS} == {
        "onnxruntime": "present",
        "openvino": "missing",
        **dict.fromkeys(PROVIDERS, "unusable"),
        "tensorrt": "missing",
        "tensorrt-rtx": "unusable",
    }
    assert probe("openvino").version == ""
    assert probe("tensorrt-rtx").version == "11.0"
