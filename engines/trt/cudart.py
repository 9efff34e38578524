"""The CUDA runtime through cuda-python, which is imported when a plan is opened and not before.

Every call is checked; a failure is one sentence that names the action.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from ..errors import EngineError, EngineMemoryError, EngineUnavailableError

_logger = logging.getLogger("latentrt.engines.trt")

INSTALL = 'install it with: pip install "cuda-bindings>=12.6" (of the major version of CUDA that the driver supports)'


def load_cuda() -> ModuleType:
    """Import ``cuda.bindings.runtime``.

    Raises:
        EngineUnavailableError: if it is not installed or cannot be loaded.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        missing = error.name in ("cuda", "cuda.bindings", "cuda.bindings.runtime")
        reason = "is not installed" if missing else f"cannot be imported ({error})"
        raise EngineUnavailableError(f"cuda-python, which runs plans, {reason}; {INSTALL}") from error
    except (OSError, RuntimeError) as error:
        raise EngineUnavailableError(f"cuda-python, which runs plans, cannot be loaded ({error}); {INSTALL}") from error


def mib(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


class Cuda:
    """One CUDA device. Safe from many threads; each calls :meth:`use` before anything else.

    Args:
        module: ``cuda.bindings.runtime``.
        ordinal: Number of the device, in the driver's order.
    """

    def __init__(self, module: Any, ordinal: int = 0) -> None:
        self.module = module
        self.ordinal = ordinal

    def use(self) -> None:
        """Make this the calling thread's device."""
        self._call("choose the device", self.module.cudaSetDevice(self.ordinal))

    def memory(self) -> tuple[int, int]:
        """Bytes of device memory: free, and in all."""
        free, total = self._call("ask for free memory", self.module.cudaMemGetInfo())
        return int(free), int(total)

    def require(self, nbytes: int, purpose: str, advice: str) -> None:
        """Refuse an allocation that cannot fit, before it is tried.

        Args:
            nbytes: Device memory that is needed.
            purpose: Purpose of the memory, e.g. ``"the weights of unet_step"``.
            advice: The way out where it does not fit.

        Raises:
            EngineMemoryError: if less is free.
        """
        free, total = self.memory()
        if nbytes > free:
            raise EngineMemoryError(
                f"{purpose} need {mib(nbytes)} of device memory, {mib(free)} of {mib(total)} are free; {advice}"
            )

    def malloc(self, nbytes: int, purpose: str, advice: str = "close other programs that use the GPU") -> int:
        """Address of new device memory.

        Raises:
            EngineMemoryError: if it does not fit.
        """
        self.require(nbytes, purpose, advice)
        return int(self._call(f"allocate {mib(nbytes)} for {purpose}", self.module.cudaMalloc(nbytes)))

    def host_malloc(self, nbytes: int, purpose: str) -> int:
        """Address of new pinned host memory."""
        action = f"allocate {mib(nbytes)} of pinned host memory for {purpose}"
        return int(self._call(action, self.module.cudaHostAlloc(nbytes, self.module.cudaHostAllocDefault)))

    def free(self, address: int) -> None:
        """Free device memory. Nothing raises: failures while things are taken down are logged."""
        self._release("free device memory", self.module.cudaFree(address))

    def host_free(self, address: int) -> None:
        """Free pinned host memory; a failure is logged."""
        self._release("free pinned host memory", self.module.cudaFreeHost(address))

    def stream(self) -> Any:
        """A new stream, which does not wait for the default one."""
        return self._call("create a stream", self.module.cudaStreamCreateWithFlags(self.module.cudaStreamNonBlocking))

    def destroy_stream(self, stream: Any) -> None:
        """Destroy a stream; a failure is logged."""
        self._release("destroy a stream", self.module.cudaStreamDestroy(stream))

    def synchronize(self, stream: Any, action: str = "wait for the device") -> None:
        """Wait until a stream has done its work. Failures of that work appear here."""
        self._call(action, self.module.cudaStreamSynchronize(stream))

    def to_device_async(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Copy from (pinned) host memory to the device, in a stream."""
        kind = self.module.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("copy to the device", self.module.cudaMemcpyAsync(target, source, nbytes, kind, stream))

    def on_device_async(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Copy within the device, in a stream."""
        kind = self.module.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("copy on the device", self.module.cudaMemcpyAsync(target, source, nbytes, kind, stream))

    def to_device(self, target: int, source: int, nbytes: int) -> None:
        """Copy from host memory to the device, and wait for it."""
        kind = self.module.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("copy to the device", self.module.cudaMemcpyAsync(target, source, nbytes, kind, 0))
        # From pageable memory the call returns before the device has everything, and our streams do not wait for it.
        self.synchronize(0)

    def to_host(self, target: int, source: int, nbytes: int) -> None:
        """Copy from the device to host memory, and wait for it."""
        kind = self.module.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("copy to the host", self.module.cudaMemcpyAsync(target, source, nbytes, kind, 0))
        self.synchronize(0)

    def begin_capture(self, stream: Any) -> None:
        """Record the work that is put into a stream from now on, in place of running it."""
        # Of this thread only: other threads may allocate meanwhile.
        mode = self.module.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("begin to capture a graph", self.module.cudaStreamBeginCapture(stream, mode))

    def end_capture(self, stream: Any) -> Any:
        """End the recording. Returns an executable graph."""
        graph = self._call("capture a graph", self.module.cudaStreamEndCapture(stream))
        try:
            return self._call("instantiate a graph", self.module.cudaGraphInstantiate(graph, 0))
        finally:
            self._release("destroy a captured graph", self.module.cudaGraphDestroy(graph))

    def abort_capture(self, stream: Any) -> None:
        """Leave the recording after a failure, whatever state it is in."""
        code, *graph = self.module.cudaStreamEndCapture(stream)
        if code == self.module.cudaError_t.cudaSuccess and graph and graph[0] is not None:
            self._release("destroy a captured graph", self.module.cudaGraphDestroy(graph[0]))

    def launch(self, graph: Any, stream: Any) -> None:
        """Run an executable graph in a stream."""
        self._call("launch a graph", self.module.cudaGraphLaunch(graph, stream))

    def destroy_graph(self, graph: Any) -> None:
        """Destroy an executable graph; a failure is logged."""
        self._release("destroy a graph", self.module.cudaGraphExecDestroy(graph))

    @contextlib.contextmanager
    def timed(self, stream: Any, seconds: list[float]) -> Iterator[None]:
        """Append to ``seconds`` the device's time for the work that is put into a stream meanwhile."""
        events = [self._call("create an event", self.module.cudaEventCreate()) for _ in range(2)]
        try:
            self._call("record an event", self.module.cudaEventRecord(events[0], stream))
            yield
            self._call("record an event", self.module.cudaEventRecord(events[1], stream))
            self._call("wait for an event", self.module.cudaEventSynchronize(events[1]))
            elapsed = self._call("read an event", self.module.cudaEventElapsedTime(*events))
            seconds.append(float(elapsed) / 1e3)
        finally:
            for event in events:
                self._release("destroy an event", self.module.cudaEventDestroy(event))

    def _call(self, action: str, returned: tuple[Any, ...]) -> Any:
        """The results of a call without its status.

        Raises:
            EngineMemoryError: if the device ran out of memory.
            EngineError: for any other failure.
        """
        status, *results = returned
        if status != self.module.cudaError_t.cudaSuccess:
            out_of_memory = status == self.module.cudaError_t.cudaErrorMemoryAllocation
            error = EngineMemoryError if out_of_memory else EngineError
            raise error(f"CUDA failed to {action}: {self._describe(status)}")
        return results[0] if len(results) == 1 else tuple(results) if results else None

    def _release(self, action: str, returned: tuple[Any, ...]) -> None:
        if returned[0] != self.module.cudaError_t.cudaSuccess:
            _logger.warning("CUDA failed to %s: %s", action, self._describe(returned[0]))

    def _describe(self, status: Any) -> str:
        texts = [call(status)[1] for call in (self.module.cudaGetErrorString, self.module.cudaGetErrorName)]
        text, name = (part.decode(errors="replace") if isinstance(part, bytes) else str(part) for part in texts)
        return f"{text} ({name})"
