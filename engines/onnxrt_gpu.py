"""ONNX Runtime on an NVIDIA GPU: its providers for CUDA, TensorRT and TensorRT-RTX.

ONNX Runtime likes to help itself: where a provider cannot start, or lacks an operator, it goes on with the CPU and at
most logs that. Here the provider that was asked for is the one that runs, or opening fails.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import Array, Engine
from .device import DLPACK_CPU, DLPACK_CUDA, dlpack_capsule
from .errors import EngineError, EngineUnavailableError, translated
from .kind import CUDA, DECOMPOSED, NATIVE, EngineArguments
from .onnxrt import DTYPES, OnnxRuntimeEngine, OnnxRuntimeOptions, load_sdk
from .trt.cuda import cuda_devices, no_device
from .trt.kind import TENSORRT_PRECISIONS, CudaKind

_logger = logging.getLogger("latentrt.engines.onnxrt_gpu")

# Both distributions of ONNX Runtime install the same folder, so the one that is installed last wins.
_INSTALL_GPU = (
    'install one that has it with: pip install "latentrt[cuda]" and then '
    "pip install --force-reinstall --no-deps onnxruntime-gpu"
)
_RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_PLUGGING = threading.Lock()
_DLPACK = {"cpu": DLPACK_CPU, "cuda": DLPACK_CUDA}

# Operators that take a step's time. Integer arithmetic on shapes belongs on the CPU, and ONNX Runtime puts it there.
_HEAVY = frozenset(
    {
        *("Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "Softmax", "Resize", "Gelu"),
        *("Attention", "MultiHeadAttention", "GroupNormalization", "GroupNorm", "InstanceNormalization"),
        "LayerNormalization",
    }
)


@dataclass(frozen=True)
class Provider:
    """A way of ONNX Runtime to run on a GPU.

    Attributes:
        name: ONNX Runtime's name of it.
        others: Providers that may run operators that it lacks, on the same GPU.
        options: Its settings.
        install: How to get an ONNX Runtime that has it.
        plugin: Python module that brings it to an ONNX Runtime that lacks it; empty where there is none.
        memory: ONNX Runtime's name of the memory that it computes in.
    """

    name: str
    others: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    install: str = _INSTALL_GPU
    plugin: str = ""
    memory: str = "cuda"


PROVIDERS: Mapping[str, Provider] = {
    # TF32 rounds the inputs of fp32 products to 10 bits of mantissa, and is on by default. fp32 means fp32.
    "onnxruntime-cuda": Provider("CUDAExecutionProvider", options={"use_tf32": "0"}),
    "onnxruntime-tensorrt": Provider("TensorrtExecutionProvider", ("CUDAExecutionProvider",)),
    "onnxruntime-tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        install="install it with: pip install onnxruntime-ep-nv-tensorrt-rtx",
        plugin=_RTX_PLUGIN,
    ),
}
"""Providers by the name of the engine."""


class OrtArray:
    """A tensor in memory of ONNX Runtime, complete when handed out; see :class:`latentrt.engines.device.DeviceArray`.

    ONNX Runtime writes each output into memory of its own, which goes back to it when the last array of it is gone.
    So an array keeps its values for as long as it is held, and a run never writes into what it reads.

    Args:
        value: ONNX Runtime's ``OrtValue``.
        place: ONNX Runtime's name of the memory (``"cuda"`` or ``"cpu"``), and the device's number.
        session: The session whose memory it is, which must outlive it; ``None`` if it belongs to none.
    """

    def __init__(self, value: Any, place: tuple[str, int], session: Any = None) -> None:
        self.value = value
        self.place = place
        self.shape: tuple[int, ...] = tuple(value.shape())
        # numpy has no bfloat16; its name is all that the checks need.
        name = DTYPES.get(value.data_type(), value.data_type())
        self.dtype: Any = name if name == "bfloat16" else np.dtype(name)
        self._session = session

    def __repr__(self) -> str:
        return f"OrtArray({self.dtype}{list(self.shape)} on {self.place[0]}:{self.place[1]})"

    def numpy(self) -> NDArray[Any]:
        """A copy in the host's memory.

        Raises:
            EngineError: if the copy fails, or numpy has no such element type.
        """
        if self.dtype == "bfloat16":
            raise EngineError("numpy has no bfloat16; take the array through DLPack, as torch.from_dlpack does")
        with translated(f"{self!r} could not be copied to the host"):
            host: NDArray[Any] = self.value.numpy()
        return host if host.flags.owndata else host.copy()  # of the CPU's memory ONNX Runtime gives a view

    def __dlpack__(self, **options: Any) -> object:
        """A DLPack capsule of the same memory. Whatever stream the taker names, there is nothing to wait for.

        Raises:
            BufferError: if a copy or another device is asked for.
        """
        # ONNX Runtime's own capsule does not hold the session, and releases for inference have long had none.
        if options.get("copy") or options.get("dl_device") not in (None, self.__dlpack_device__()):
            raise BufferError(f"{self!r} can only be handed over where it is, without a copy")
        return dlpack_capsule(self.value.data_ptr(), self.shape, str(self.dtype), self.__dlpack_device__(), self)

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack's number of the kind of device, and the device's own number."""
        return _DLPACK[self.place[0]], self.place[1]


@dataclass(frozen=True)
class OnnxRuntimeGpuOptions:
    """Settings of a session on a GPU.

    Attributes:
        device: Number of the GPU, as CUDA counts.
        device_outputs: Leave outputs on the GPU, as :class:`OrtArray`; otherwise they come as numpy arrays.
    """

    device: int = 0
    device_outputs: bool = True


class OnnxRuntimeGpuEngine(OnnxRuntimeEngine):
    """One ONNX graph in an ONNX Runtime session on an NVIDIA GPU.

    Bound inputs go to the GPU once and stay there; so do outputs, unless the options say otherwise.
    They may be fed again, and are not copied then: a loop's state never leaves the GPU. :meth:`run` returns when the
    GPU is done. Many threads may call it at once; each run has a binding and outputs of its own.

    Arrays that were handed out stay valid after :meth:`close`, and hold the session's memory until they are gone.

    Args:
        path: The graph; see :class:`~latentrt.engines.onnxrt.OnnxRuntimeEngine`.
        engine: A key of :data:`PROVIDERS`.
        options: Settings.
        label: Name of the engine in messages.
        weights: See :class:`~latentrt.engines.onnxrt.OnnxRuntimeEngine`.
    """

    def __init__(
        self,
        path: Path,
        engine: str,
        options: OnnxRuntimeGpuOptions | None = None,
        label: str | None = None,
        weights: Mapping[str, Array] | None = None,
    ) -> None:
        super().__init__(path, OnnxRuntimeOptions(), label or f"{path.parent.name} ({engine})", weights)
        self.engine = engine
        self.gpu_options = options or OnnxRuntimeGpuOptions()
        self._ort: Any = None
        self._place = ("cpu", 0)

    def _make_session(self, ort: ModuleType, settings: Any) -> Any:
        provider = PROVIDERS[self.engine]
        plugged = require_provider(ort, self.engine)
        # Recorded at no cost, and the only way to learn what fell back to the CPU.
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if plugged:
            devices = [each for each in ort.get_ep_devices() if each.ep_name == plugged]
            settings.add_provider_for_devices(devices[self.gpu_options.device : self.gpu_options.device + 1], {})
            session = ort.InferenceSession(str(self.path), settings, enable_fallback=0)
            wanted = plugged
        else:
            _preload(ort)
            chosen = {"device_id": str(self.gpu_options.device)}
            chain = [(provider.name, {**chosen, **provider.options}), *((other, chosen) for other in provider.others)]
            session = ort.InferenceSession(str(self.path), settings, providers=chain, enable_fallback=0)
            wanted = provider.name
        if wanted not in session.get_providers():
            raise EngineUnavailableError(
                f"{self.label}: ONNX Runtime could not start {wanted} and took {', '.join(session.get_providers())}; "
                "libraries of CUDA, cuDNN or TensorRT in the versions that it was built for are missing: "
                "install them, or use the engine onnxruntime"
            )
        if on_cpu := _heavy_on_cpu(session):
            raise EngineUnavailableError(
                f"{self.label}: {wanted} lacks {', '.join(on_cpu)} of this graph, which would run on the CPU; "
                "update onnxruntime-gpu, build the bundle for another opset, or use the engine onnxruntime"
            )
        place = (provider.memory, self.gpu_options.device)
        resident = not plugged or self._reaches(ort, place)
        self._ort, self._place = ort, place if resident else ("cpu", 0)
        self.on_device = resident and self.gpu_options.device_outputs
        return session

    def _reaches(self, ort: ModuleType, place: tuple[str, int]) -> bool:
        """Whether ONNX Runtime itself can put arrays into the memory of a plugin, and get them back.

        It can from 1.23 on, if the plugin shares its memory. Otherwise inputs and outputs are copied at every run.
        """
        probe = np.arange(3, dtype=np.float32)
        try:
            with translated("ONNX Runtime cannot reach the plugin's memory"):
                found = OrtArray(ort.OrtValue.ortvalue_from_numpy(probe, *place), place).numpy()
            if not np.array_equal(found, probe):
                raise EngineError("ONNX Runtime gets other values from the plugin's memory than it put there")
        except EngineError as error:
            reason = str(error)  # a log that kept the exception would keep the session with it
            _logger.warning(
                "%s copies its state at every run, with the same results but slower: %s", self.label, reason
            )
            return False
        return True

    def bind(self, feeds: Mapping[str, Array]) -> None:
        """Keep ``feeds`` on the GPU as inputs of this thread's following runs; a name bound again is replaced.

        Raises:
            TensorMismatchError: for a name that is no input.
        """
        super().bind(feeds)  # refuses unknown names before anything is copied
        with translated(f"{self.label} could not keep its inputs"):
            kept: Any = {name: self._kept(array) for name, array in feeds.items()}
        super().bind(kept)

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        session = self._running_session()
        with translated(f"{self.label} failed"):
            binding = session.io_binding()
            for name, array in feeds.items():
                binding.bind_ortvalue_input(name, self._resident(array))
            # Every output in new memory from ONNX Runtime's arena, never in that of an earlier run: see OrtArray.
            place = self._place if self.gpu_options.device_outputs else ("cpu", 0)
            for name in self._output_names:
                binding.bind_output(name, *place)
            binding.synchronize_inputs()
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            found: Any = [OrtArray(value, place, session) for value in binding.get_outputs()]
        if not self.on_device:
            found = [array.numpy() for array in found]
        return dict(zip(self._output_names, found, strict=True))

    def _kept(self, array: Any) -> OrtArray:
        """The array in the session's memory."""
        if isinstance(array, OrtArray) and array.place == self._place:
            return array
        return OrtArray(self._resident(array), self._place)

    def _resident(self, array: Any) -> Any:
        """An ``OrtValue`` in the session's memory: the array's own where it is there already, else a copy."""
        if isinstance(array, OrtArray) and array.place == self._place:
            return array.value
        if not isinstance(array, np.ndarray):  # another engine's array, or another device's
            array = array.numpy()
        return self._ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"), *self._place)


def find_provider(ort: ModuleType, engine: str) -> str:
    """Make sure that ONNX Runtime has the provider of an engine.

    Returns:
        The name under which a plugin has brought the provider; empty where it is part of ONNX Runtime.

    Raises:
        EngineUnavailableError: naming the package to install.
    """
    provider = PROVIDERS[engine]
    if provider.name in ort.get_available_providers():
        return ""
    with _PLUGGING:  # registering twice is an error
        plugged = _plug_in(ort, provider.plugin) if provider.plugin else ""
    if not plugged:
        raise EngineUnavailableError(
            f"ONNX Runtime {ort.__version__} as installed has no {provider.name}; {provider.install}"
        )
    return plugged


def require_provider(ort: ModuleType, engine: str) -> str:
    """Make sure that ONNX Runtime has the provider of an engine, and that there is a GPU for it.

    Returns:
        As :func:`find_provider`.

    Raises:
        EngineUnavailableError: naming the package to install, or the engine to choose.
    """
    plugged = find_provider(ort, engine)
    if not cuda_devices():
        raise EngineUnavailableError(no_device(engine))
    return plugged


@functools.cache
def _plug_in(ort: ModuleType, plugin: str) -> str:
    """Register a plugin with ONNX Runtime, once a process; returns its provider's name, or nothing without it."""
    try:
        module = importlib.import_module(plugin)
    except ImportError:
        return ""
    if not hasattr(ort, "register_execution_provider_library"):  # before 1.23
        return ""
    name = str(module.get_ep_name())
    with translated(f"ONNX Runtime could not load {plugin}"):
        ort.register_execution_provider_library(name, module.get_library_path())
    return name


@functools.cache
def _preload(ort: ModuleType) -> None:
    """Let ONNX Runtime find the CUDA and cuDNN that came as Python packages, once a process."""
    if hasattr(
        ort, "preload_dlls"
    ):  # from 1.21 on; it prints what it does not find, which may be in the system's place
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


def _heavy_on_cpu(session: Any) -> list[str]:
    """Operators that take time and were left to the CPU; ONNX Runtime before 1.24 does not record them."""
    assignment = getattr(session, "get_provider_graph_assignment_info", None)
    if assignment is None:
        return []
    nodes = [n for part in assignment() if part.ep_name == "CPUExecutionProvider" for n in part.get_nodes()]
    return sorted({node.op_type for node in nodes} & _HEAVY)


@dataclass(frozen=True)
class OnnxRuntimeGpuKind(CudaKind):
    """One of ONNX Runtime's providers for NVIDIA GPUs."""

    def version(self) -> str:
        """Version of an ONNX Runtime that has the provider."""
        ort = load_sdk()
        find_provider(ort, self.name)
        return str(ort.__version__)

    def make(self, arguments: EngineArguments) -> Engine:
        """The engine of one component."""
        label = f"{arguments.component} ({self.name})"
        return OnnxRuntimeGpuEngine(arguments.path, self.name, label=label, weights=arguments.weights)


GPU_KINDS = (
    # The CUDA provider has no kernel for GroupNormalization, had none for Attention until 2026, and lacks some of other
    # operators' newest versions; what it lacks goes to the CPU. So it takes the decomposed graph, whose operators it
    # has had for years. That graph is of operator set 20, in which ONNX has no convolution of bf16.
    OnnxRuntimeGpuKind(
        "onnxruntime-cuda", "ONNX Runtime CUDA", "cuda", CUDA, ("fp32", "fp16"), DECOMPOSED, priority=30
    ),
    OnnxRuntimeGpuKind("onnxruntime-tensorrt", "ONNX Runtime TensorRT", "cuda", CUDA, TENSORRT_PRECISIONS, NATIVE),
    OnnxRuntimeGpuKind("onnxruntime-tensorrt-rtx", "ONNX Runtime TensorRT-RTX", "", CUDA, TENSORRT_PRECISIONS, NATIVE),
)
"""ONNX Runtime's providers. Those for TensorRT build at the first request."""
