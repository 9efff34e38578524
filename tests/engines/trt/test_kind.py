"""Kinds of engines on an NVIDIA GPU: what they need of a GPU, and of the SDK."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from latentrt.engines import TensorSpec
from latentrt.engines.errors import EngineUnavailableError
from latentrt.engines.kind import MISSING, PRESENT, UNUSABLE, EngineArguments
from latentrt.engines.trt import kind
from latentrt.engines.trt.cuda import CudaDevice
from latentrt.engines.trt.kind import TENSORRT, TENSORRT_RTX, TensorRTKind
from latentrt.engines.trt.session import TensorRTEngine


@pytest.fixture(params=[TENSORRT, TENSORRT_RTX], ids=lambda each: each.name)
def each(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TensorRTKind:
    """Either kind, with its SDK installed on a machine with a GPU."""
    monkeypatch.setattr(kind, "load_sdk", lambda name: SimpleNamespace(version=f"{name} 1", builds_without_gpu=False))
    monkeypatch.setattr(kind, "load_cuda", lambda: None)
    on_a_gpu(monkeypatch, "sm_90")
    return request.param  # type: ignore[no-any-return]


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    monkeypatch.setattr(kind, "cuda_devices", lambda: (CudaDevice("GPU", architecture),))


def test_a_probe(each: TensorRTKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names version and GPU, and otherwise the first of SDK, GPU and CUDA's package that is not there."""
    found = each.probe()
    assert (found.state, found.version, found.detail) == (PRESENT, f"{each.name} 1", "GPU (sm_90)")

    def missing(*_: object) -> None:
        raise EngineUnavailableError("install it")

    monkeypatch.setattr(kind, "load_cuda", missing)
    assert (each.probe().state, each.probe().detail) == (MISSING, "install it")
    monkeypatch.setattr(kind, "cuda_devices", lambda: ())
    assert each.probe().state == UNUSABLE
    assert each.probe().detail.startswith(f"{each.name} needs an NVIDIA GPU")
    assert not each.builds_without_device()
    monkeypatch.setattr(kind, "load_sdk", missing)
    assert each.probe().state == MISSING
    assert not each.builds_without_device()


@pytest.mark.parametrize(
    ("architecture", "refused"),
    [("sm_75", {"bf16", "fp8"}), ("sm_80", {"fp8"}), ("sm_89", set()), ("sm_90", set()), ("sm_120", set())],
)
def test_precisions_of_a_gpu(
    each: TensorRTKind, monkeypatch: pytest.MonkeyPatch, architecture: str, refused: set[str]
) -> None:
    """bf16 came with sm_80 and fp8 with sm_89; other precisions run on every GPU."""
    on_a_gpu(monkeypatch, architecture)
    for precision in (None, *each.precisions):
        if precision in refused:
            with pytest.raises(
                EngineUnavailableError, match=rf"\({architecture}\) has no instructions for {precision}"
            ):
                each.require(precision)
        else:
            each.require(precision)


def test_an_engine_of_a_plan(each: TensorRTKind) -> None:
    """It opens the plan with the names of the graph, for the GPUs that the plan was built for."""
    x = TensorSpec("x", "float32", ("batch",))
    engine = each.make(EngineArguments("unet_step", Path("step.plan"), (x,), (x,), target="sm_80+"))
    assert isinstance(engine, TensorRTEngine)
    assert (engine.plan, engine.engine, engine.target) == (Path("step.plan"), each.name, "sm_80+")
    assert engine.label == f"unet_step ({each.name})"
