"""Loading an SDK, its log, its failures, and what needs neither."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import threading
from types import ModuleType

import pytest

from latentrt.engines.errors import EngineError, EngineUnavailableError, InvalidRequestError
from latentrt.engines.trt import Sdk, load_sdk
from latentrt.engines.trt.sdk import sdk_errors, sdk_log


def test_import_imports_no_sdk() -> None:
    """Importing the package loads neither SDK, nor cuda-python, torch or onnx."""
    names = ["tensorrt", "tensorrt_rtx", "cuda", "torch", "onnx"]
    code = f"import sys, latentrt.engines.trt; print(set({names}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_missing_sdk_names_the_way_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An SDK that is not installed is named together with the command that installs it."""
    monkeypatch.setitem(sys.modules, name.replace("-", "_"), None)
    with pytest.raises(
        EngineUnavailableError, match=rf'not installed; install it with: pip install "latentrt\[{name}\]"'
    ):
        load_sdk(name)


def test_type_stubs_are_no_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The empty package that type stubs leave behind counts as not installed."""
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with pytest.raises(EngineUnavailableError, match="TensorRT is not installed"):
        load_sdk("tensorrt")


def test_sdk_that_fails_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure inside the SDK's own import is passed on as the reason."""

    def broken(name: str) -> ModuleType:
        raise OSError("libtensorrt_rtx.so.1: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(EngineUnavailableError, match=r"cannot be loaded \(libtensorrt_rtx") as caught:
        load_sdk("tensorrt-rtx")
    assert isinstance(caught.value.__cause__, OSError)


def test_old_sdk_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An SDK before the oldest supported version is refused with both versions named."""
    module = ModuleType("tensorrt")
    module.__version__ = "8.6.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(EngineUnavailableError, match=r"TensorRT 8\.6\.1 is too old, 10\.13 or newer"):
        load_sdk("tensorrt")


@pytest.mark.parametrize("version", ["10.13.0.35", "11.0.0"])
def test_tensorrt_10_and_11_are_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT 10.13 and 11 are taken as one API."""
    module = ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    assert load_sdk("tensorrt") == Sdk("tensorrt", module)


def test_unknown_sdk() -> None:
    """A name that is no SDK's is refused."""
    with pytest.raises(EngineUnavailableError, match="no SDK is called 'cudnn'"):
        load_sdk("cudnn")


def test_log_goes_to_logging(fake: Sdk, caplog: pytest.LogCaptureFixture) -> None:
    """SDK messages become log records; verbose ones are dropped."""
    severity = fake.module.ILogger.Severity
    with caplog.at_level(logging.DEBUG, "latentrt.engines.trt"):
        for level in severity:
            sdk_log(fake).handle.log(level, level.name)
    logged = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert logged == [("ERROR", "INTERNAL_ERROR"), ("ERROR", "ERROR"), ("WARNING", "WARNING"), ("DEBUG", "INFO")]


def test_failures_are_translated(fake: Sdk) -> None:
    """An SDK exception becomes an EngineError that tells the first error logged, and keeps its cause."""

    def build() -> None:
        for message in ("first\n  reason", "what follows from it"):
            sdk_log(fake).handle.log(fake.module.ILogger.Severity.ERROR, message)
        raise TypeError("factory function returned nullptr")

    with pytest.raises(EngineError, match=r"failed to build: first reason$") as caught, sdk_errors(fake, "build"):
        build()
    assert isinstance(caught.value.__cause__, TypeError)


def test_failure_without_log(fake: Sdk) -> None:
    """Without anything logged the exception's own words are the reason; errors of an earlier call are not."""
    with sdk_errors(fake, "parse"):
        sdk_log(fake).handle.log(fake.module.ILogger.Severity.ERROR, "old news")
    with pytest.raises(EngineError, match="failed to build: out of luck"), sdk_errors(fake, "build"):
        raise RuntimeError("out of luck")


def test_failures_of_several_threads_stay_apart(fake: Sdk) -> None:
    """Each thread's error has its own reason, however many fail at the same time; a thread of the SDK's tells all."""
    together = threading.Barrier(8)
    messages: list[str] = []

    def log(message: str) -> None:
        sdk_log(fake).handle.log(fake.module.ILogger.Severity.ERROR, message)

    def fail(number: int) -> None:
        def call() -> None:
            together.wait()
            log(f"reason {number}")
            together.wait()
            raise RuntimeError

        for _ in range(20):
            with pytest.raises(EngineError, match=rf"failed to run: reason {number}$"), sdk_errors(fake, "run"):
                call()
        messages.append("done")

    threads = [threading.Thread(target=fail, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(messages) == 8
    with sdk_log(fake).capture() as errors:
        other = threading.Thread(target=log, args=("of the SDK's own thread",))
        other.start()
        other.join()
    assert errors == ["of the SDK's own thread"]


@pytest.mark.parametrize("error", [InvalidRequestError("ours"), KeyboardInterrupt()])
def test_own_errors_pass(fake: Sdk, error: BaseException) -> None:
    """LatentRT's own errors and KeyboardInterrupt pass untouched."""
    with pytest.raises(type(error)) as caught, sdk_errors(fake, "build"):
        raise error
    assert caught.value is error
