"""Calls of CUDA's runtime that fail, each in one sentence with CUDA's own words."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from latentrt.engines.errors import EngineError, EngineMemoryError, EngineUnavailableError
from latentrt.engines.trt import TensorRTEngine
from latentrt.engines.trt.cuda import cuda_devices
from latentrt.engines.trt.cudart import Cuda, load_cuda, mib


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("no", name="cuda"), "is not installed; install it with: pip install"),
        (ModuleNotFoundError("no", name="cuda.bindings"), "is not installed; install it with: pip install"),
        (ImportError("libcudart.so.13: no such file"), r"cannot be imported \(libcudart.so.13: no such file\)"),
        (RuntimeError("broken"), r"cannot be loaded \(broken\)"),
    ],
)
def test_missing_cuda_python(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing or broken cuda-python is one sentence with the command that installs it."""

    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(EngineUnavailableError, match=rf"cuda-python, which runs plans, {message}") as caught:
        load_cuda()
    assert caught.value.__cause__ is error


def test_out_of_memory_after_the_check(cuda: Any, fake_gpu: Any) -> None:
    """Memory that another program took between the check and the allocation is the same kind of error."""
    cuda.module.failures["cudaMalloc"] = fake_gpu.CudaError.cudaErrorMemoryAllocation
    with pytest.raises(EngineMemoryError, match=r"CUDA failed to allocate 1.0 MiB for x: memoryallocation"):
        cuda.malloc(1 << 20, "x")


@pytest.mark.parametrize(("size", "text"), [(0, "0.0 MiB"), (3 << 20, "3.0 MiB"), (5 << 29, "2.5 GiB")])
def test_sizes_for_people(size: int, text: str) -> None:
    """Bytes are told in MiB or GiB."""
    assert mib(size) == text


@pytest.mark.skipif(bool(cuda_devices()), reason="this machine has a GPU")
def test_failures_of_the_real_cuda_are_translated() -> None:
    """Where there is no driver, cuda-python's own status becomes one sentence."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is an optional extra")
    cuda = Cuda(runtime)
    for call in (cuda.use, cuda.memory, cuda.stream, lambda: cuda.to_host(0, 0, 1), lambda: cuda.host_malloc(1, "x")):
        with pytest.raises(EngineError, match=r"^CUDA failed to [^\n]* \(cudaError\w+\)$"):
            call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("cudaSetDevice", "choose the device"),
        ("cudaMemGetInfo", "ask for free memory"),
        ("cudaMalloc", "allocate"),
        ("cudaHostAlloc", "pinned host memory"),
        ("cudaMemcpyAsync", "copy"),
        ("cudaStreamCreateWithFlags", "create a stream"),
        ("cudaStreamSynchronize", "run unet.plan|wait for the device"),
    ],
)
def test_failures_of_cuda(gpu: Any, engine: TensorRTEngine, call: str, words: str) -> None:
    """Each CUDA call that fails is one sentence with CUDA's own words; the next run works."""
    feeds = gpu.feeds()
    gpu.cuda.failures[call] = gpu.fakes.CudaError.cudaErrorInvalidValue
    with pytest.raises(EngineError, match=rf"CUDA failed to .*({words}).*: invalidvalue \(cudaErrorInvalidValue\)$"):
        engine.run(feeds)
    gpu.cuda.failures.clear()
    for work in gpu.cuda.streams.values():
        work.clear()
    gpu.check(engine.run(feeds), feeds)


def test_failures_while_closing_are_logged(gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Closing goes on to the end whatever fails, and says what did."""
    engine = gpu.engine().open()
    engine.run(gpu.feeds())
    gpu.cuda.failures["cudaFreeHost"] = gpu.fakes.CudaError.cudaErrorInvalidValue
    engine.close()
    assert gpu.cuda.leaks == {"pinned": 1}
    assert "CUDA failed to free pinned host memory: invalidvalue" in caplog.text
    gpu.cuda.pinned.clear()
