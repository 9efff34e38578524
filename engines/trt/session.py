"""Plans of TensorRT and TensorRT-RTX, opened and run on an NVIDIA GPU."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..base import Array, BaseEngine, Engine, TensorSpec
from ..device import DeviceArray
from ..errors import EngineClosedError, EngineUnavailableError, InvalidRequestError, TensorMismatchError
from .cuda import CudaDevice, cuda_devices
from .cudart import Cuda, load_cuda
from .memory import Arena, CudaArray, MemoryNeeds
from .plan import Plan, SessionOptions
from .sdk import load_sdk


class TensorRTEngine(BaseEngine):
    """A plan of TensorRT or TensorRT-RTX on an NVIDIA GPU.

    :meth:`run` takes numpy arrays, and arrays that an engine on the same device handed out, and hands out arrays on
    the device. It returns when the device is done. It may be called from many threads at once: each run has an
    execution context to itself, so that inputs are made ready while another run computes. The computing itself is
    one run after the other, since all share the memory of the activations, and one run of an image model fills a GPU.

    Args:
        plan: The plan's file.
        engine: ``"tensorrt-rtx"`` or ``"tensorrt"``.
        target: GPU architectures that the plan was built for, from its record, e.g. ``"sm_80+"``.
        signature: Inputs and outputs as the graph has them, for the names of their dynamic dimensions; without it a
            length that inputs share is not checked before the SDK does.
        options: How to run it.
        arena: Memory of the activations, to share with other plans; ``None`` makes one of its own.
        label: Name of the engine in messages.
        weights: Put in place of the plan's own when it is opened, see :meth:`refit`.
    """

    on_device = True

    def __init__(
        self,
        plan: Path,
        *,
        engine: str,
        target: str,
        signature: tuple[Iterable[TensorSpec], Iterable[TensorSpec]] | None = None,
        options: SessionOptions | None = None,
        arena: Arena | None = None,
        label: str | None = None,
        weights: Mapping[str, Array] | None = None,
    ) -> None:
        super().__init__(label or f"{plan.name} ({engine})")
        self._other_weights = dict(weights or {})
        self.plan = plan
        self.engine = engine
        self.target = target
        self.options = options or SessionOptions()
        self.arena = arena or Arena()
        self.device_seconds: list[float] | None = None
        """Set it to a list, and every run appends the device's time for the plan itself (by CUDA events)."""
        self._signature = signature
        self._gate = _Gate()
        self._plan: Plan | None = None

    @property
    def memory(self) -> MemoryNeeds:
        """Device memory that the plan takes."""
        return self._opened_plan().needs

    @property
    def graph_runs(self) -> tuple[int, int]:
        """CUDA graphs that were captured, and runs that replayed one, by the contexts that there are now."""
        return self._opened_plan().graph_runs

    @property
    def weights(self) -> dict[str, tuple[str, int]]:
        """Weights that :meth:`refit` takes: name -> element type and number of values; empty if the plan takes none."""
        with self._gate.shared():
            return self._opened_plan().weights

    def bind(self, feeds: Mapping[str, Array]) -> None:
        """Copy ``feeds`` to the device, where they stay for this thread's runs until bound again.

        A tensor of the same shape and type as the one bound before takes its place in memory, so that CUDA graphs
        stay valid.

        Raises:
            TensorMismatchError: for a name that is no input, or an array of another device.
            EngineError: if CUDA fails.
        """
        inputs = self.inputs
        if unknown := [name for name in feeds if name not in inputs]:
            super().bind({unknown[0]: feeds[unknown[0]]})  # raises
        with self._gate.shared():
            plan = self._opened_plan()
            plan.cuda.use()
            own: dict[str, CudaArray] = self._local.__dict__.setdefault("own", {})
            placed = {}
            arrays: Mapping[str, Any] = feeds  # of device arrays too
            for name, array in arrays.items():
                if isinstance(array, np.ndarray):
                    own[name] = placed[name] = plan.upload(array, own.get(name))
                else:
                    placed[name] = self._on_this_device(name, array, plan.cuda)
                    own.pop(name, None)
            super().bind(cast(dict[str, Array], placed))

    def refit(self, weights: Mapping[str, Array]) -> None:
        """Put other weights in place of the plan's own, for all threads.

        The plan's own weights are the starting point each time: after ``refit(a)``, ``refit(b)`` gives what
        ``refit(b)`` alone gives, and ``refit({})`` gives the plan as it was built. Where weights of an earlier call
        have to go, the plan is read from its file again. Waits for the runs that are under way; those that come
        meanwhile wait.

        Args:
            weights: Name of an initializer of the graph -> values in its shape and element type.

        Raises:
            InvalidRequestError: if the plan was not built for it (``BuildOptions(refittable=True)``) or has no such
                weights. Nothing has changed then.
            TensorMismatchError: if size or element type differ. Nothing has changed then.
            EngineError: if the SDK fails. The plan has its own weights then.
        """
        self._require_open()
        with self._gate.exclusive():
            plan = self._opened_plan()
            plan.cuda.use()
            plan.refit(weights)

    def _open(self) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
        device = self._device()
        sdk = load_sdk(self.engine)
        cuda = Cuda(load_cuda(), self.options.device)
        cuda.use()
        plan = Plan(sdk, cuda, self.plan, self.label, device, self.options, self.arena, self._signature)
        if self._other_weights:
            try:
                plan.refit(self._other_weights)
            except BaseException:
                plan.close()
                raise
        self._plan = plan
        return plan.inputs, plan.outputs

    def _device(self) -> CudaDevice:
        devices = cuda_devices()
        if not devices:
            raise EngineUnavailableError(
                f"{self.label} cannot be opened, no CUDA device was found: the plan was built for {self.target}; "
                "run it on a machine with an NVIDIA GPU and its driver, or use the engine onnxruntime"
            )
        if self.options.device >= len(devices):
            raise EngineUnavailableError(
                f"{self.label} cannot be opened on device {self.options.device}: there are {len(devices)}, "
                "numbered from 0"
            )
        device = devices[self.options.device]
        if not runs_on(self.target, device.architecture):
            raise EngineUnavailableError(
                f"{self.label} was built for {self.target} and cannot run on {device.name} ({device.architecture}); "
                "build the bundle again for it, or use the engine onnxruntime"
            )
        return device

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        bound: dict[str, CudaArray] = self._local.__dict__.get("bound", {})
        with self._gate.shared():
            plan = self._opened_plan()
            plan.cuda.use()
            ready: dict[str, Any] = {
                name: array if isinstance(array, np.ndarray) else self._on_this_device(name, array, plan.cuda)
                for name, array in feeds.items()
            }
            stays = {name: array for name, array in bound.items() if ready.get(name) is array}
            return plan.run(ready, stays, self.device_seconds)

    def _on_this_device(self, name: str, array: object, cuda: Cuda) -> CudaArray:
        if isinstance(array, CudaArray) and array.cuda.ordinal == cuda.ordinal:
            return array
        kind = f"{type(array).__name__} of another device" if isinstance(array, DeviceArray) else type(array).__name__
        raise TensorMismatchError(
            f"{self.label}: input {name!r} is a {kind}, expected a numpy array or an array on cuda:{cuda.ordinal}"
        )

    def _opened_plan(self) -> Plan:
        plan = self._plan
        if plan is None:
            raise EngineClosedError(f"{self.label} is not open; call open() first, or use it in a with statement")
        return plan

    def _close(self) -> None:
        with self._gate.exclusive():
            plan, self._plan = self._plan, None
            if plan is not None:
                plan.close()


def runs_on(target: str, architecture: str) -> bool:
    """Whether a plan built for ``target`` (``"sm_90"``, ``"sm_80+"``, ``"sm_86,sm_89"``) runs on an architecture."""
    if oldest := re.fullmatch(r"sm_([0-9]{2,3})\+", target):
        return int(architecture[3:]) >= int(oldest[1])
    return architecture in target.split(",")


def share_arena(engines: Iterable[Engine]) -> None:
    """Let all plans among ``engines``, none of which is open yet, use one arena for their activations.

    Raises:
        InvalidRequestError: if one is open.
    """
    arenas: dict[int, Arena] = {}
    for engine in engines:
        if isinstance(engine, TensorRTEngine):
            if engine._opened:
                raise InvalidRequestError(f"{engine.label} is open already; share the arena before opening it")
            engine.arena = arenas.setdefault(engine.options.device, Arena())


class _Gate:
    """Lets many in together, or one alone. Whoever waits to be alone goes before those that come later."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0
        self._alone = False
        self._waiting = 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._alone and not self._waiting)
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._condition:
            self._waiting += 1
            try:
                self._condition.wait_for(lambda: not self._alone and not self._inside)
                self._alone = True
            finally:
                self._waiting -= 1
                self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self._alone = False
                self._condition.notify_all()
