"""A make-believe GPU: the CUDA runtime on host memory, and the run-time half of either TensorRT SDK on top of it.

Work that is put into a stream is done when somebody waits for the stream, not before, as on a GPU that is slow: memory
that is read too early, freed too early, or overwritten while it is needed shows in the results. New and freed memory
is full of NaN.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

Compute = Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]
GARBAGE = 0xFF


class CudaError(enum.IntEnum):
    cudaSuccess = 0  # noqa: N815
    cudaErrorInvalidValue = 1  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorIllegalAddress = 700  # noqa: N815
    cudaErrorStreamCaptureInvalidated = 901  # noqa: N815


class Handle(int):
    """A stream, graph or event."""


class FakeCuda:
    """Has what ``latentrt`` uses of ``cuda.bindings.runtime``.

    Attributes:
        total: Bytes of device memory.
        calls: How often each function was called.
        failures: Name of a function -> the status it returns in place of doing anything.
    """

    cudaError_t = CudaError  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815
    cudaStreamNonBlocking = 1  # noqa: N815
    cudaHostAllocDefault = 0  # noqa: N815

    def __init__(self, total: int = 1 << 30) -> None:
        self.total = total
        self.calls: Counter[str] = Counter()
        self.failures: dict[str, CudaError] = {}
        self.device: dict[int, tuple[Any, int]] = {}
        self.pinned: dict[int, tuple[Any, int]] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {0: []}
        self.capturing: dict[int, list[Callable[[], None]]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.executables: dict[int, list[Callable[[], None]]] = {}
        self.events: dict[int, float] = {}
        self.fault: CudaError | None = None
        self._next = 1000
        self._lock = threading.RLock()

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not (name.startswith("cuda") and callable(value)) or isinstance(value, type):
            return value

        def call(*arguments: Any) -> Any:
            with self._lock:
                self.calls[name] += 1
                if name in self.failures:
                    return self.failures[name], None
            return value(*arguments)

        return call

    @property
    def leaks(self) -> dict[str, int]:
        """What exists now, by kind; empty where all was given back."""
        streams = {key: value for key, value in self.streams.items() if key}
        kinds = {"device": self.device, "pinned": self.pinned, "streams": streams, "graphs": self.graphs}
        kinds |= {"executables": self.executables, "events": self.events}
        return {name: len(each) for name, each in kinds.items() if each}

    @property
    def used(self) -> int:
        with self._lock:
            return sum(size for _, size in self.device.values())

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        """Put work into a stream, or into the graph that is captured from it."""
        with self._lock:
            self.capturing.get(int(stream), self.streams[int(stream)]).append(work)

    def view(self, address: int, nbytes: int, places: Mapping[int, tuple[Any, int]] | None = None) -> Any:
        """Bytes of device memory, which must be allocated; raises Fault otherwise."""
        with self._lock:
            for start, (_, size) in (self.device if places is None else places).items():
                if start <= address and address + nbytes <= start + size:
                    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
        raise Fault

    def _handle(self) -> Handle:
        self._next += 1
        return Handle(self._next)

    def _allocate(self, nbytes: int, places: dict[int, tuple[Any, int]]) -> int:
        buffer = ctypes.create_string_buffer(nbytes + 256)
        address = -(-ctypes.addressof(buffer) // 256) * 256
        ctypes.memset(address, GARBAGE, nbytes)
        with self._lock:
            places[address] = buffer, nbytes
        return address

    def _free(self, address: int, places: dict[int, tuple[Any, int]]) -> tuple[CudaError]:
        with self._lock:
            if address not in places:
                return (CudaError.cudaErrorInvalidValue,)
            _, size = places.pop(address)
            ctypes.memset(address, GARBAGE, size)
        return (CudaError.cudaSuccess,)

    def cudaSetDevice(self, ordinal: int) -> Any:  # noqa: N802
        return (CudaError.cudaSuccess,)

    def cudaMemGetInfo(self) -> Any:  # noqa: N802
        return CudaError.cudaSuccess, self.total - self.used, self.total

    def cudaMalloc(self, nbytes: int) -> Any:  # noqa: N802
        if self.used + nbytes > self.total:
            return CudaError.cudaErrorMemoryAllocation, None
        return CudaError.cudaSuccess, self._allocate(nbytes, self.device)

    def cudaFree(self, address: int) -> Any:  # noqa: N802
        return self._free(address, self.device)

    def cudaHostAlloc(self, nbytes: int, flags: int) -> Any:  # noqa: N802
        return CudaError.cudaSuccess, self._allocate(nbytes, self.pinned)

    def cudaFreeHost(self, address: int) -> Any:  # noqa: N802
        return self._free(address, self.pinned)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:  # noqa: N802
        assert flags == self.cudaStreamNonBlocking
        handle = self._handle()
        self.streams[handle] = []
        return CudaError.cudaSuccess, handle

    def cudaStreamDestroy(self, stream: int) -> Any:  # noqa: N802
        assert not self.streams.pop(int(stream)), "a stream was destroyed with work in it"
        return (CudaError.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> Any:  # noqa: N802
        assert int(stream) not in self.capturing
        with self._lock:
            work, self.streams[int(stream)] = self.streams[int(stream)], []
        for each in work:
            if self.fault is None:
                try:
                    each()
                except Fault:
                    self.fault = CudaError.cudaErrorIllegalAddress
        return (self.fault or CudaError.cudaSuccess,)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> Any:  # noqa: N802
        kinds = self.cudaMemcpyKind
        if kind == kinds.cudaMemcpyHostToDevice and stream:
            self.view(source, nbytes, self.pinned)  # else the copy would not be asynchronous

        def copy() -> None:
            if kind != kinds.cudaMemcpyHostToDevice:
                self.view(source, nbytes)
            if kind != kinds.cudaMemcpyDeviceToHost:
                self.view(target, nbytes)
            ctypes.memmove(target, source, nbytes)

        self.enqueue(stream, copy)
        return (CudaError.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> Any:  # noqa: N802
        assert not self.streams[int(stream)], "work was under way"
        self.capturing[int(stream)] = []
        return (CudaError.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> Any:  # noqa: N802
        handle = self._handle()
        self.graphs[handle] = self.capturing.pop(int(stream))
        return CudaError.cudaSuccess, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> Any:  # noqa: N802
        handle = self._handle()
        self.executables[handle] = list(self.graphs[graph])
        return CudaError.cudaSuccess, handle

    def cudaGraphDestroy(self, graph: int) -> Any:  # noqa: N802
        del self.graphs[graph]
        return (CudaError.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: int) -> Any:  # noqa: N802
        del self.executables[graph]
        return (CudaError.cudaSuccess,)

    def cudaGraphLaunch(self, graph: int, stream: int) -> Any:  # noqa: N802
        for work in self.executables[graph]:
            self.enqueue(stream, work)
        return (CudaError.cudaSuccess,)

    def cudaEventCreate(self) -> Any:  # noqa: N802
        handle = self._handle()
        self.events[handle] = 0.0
        return CudaError.cudaSuccess, handle

    def cudaEventRecord(self, event: int, stream: int) -> Any:  # noqa: N802
        self.enqueue(stream, lambda: self.events.__setitem__(event, time.perf_counter()))
        return (CudaError.cudaSuccess,)

    def cudaEventSynchronize(self, event: int) -> Any:  # noqa: N802
        for stream in list(self.streams):
            if stream not in self.capturing:
                self.cudaStreamSynchronize(stream)
        return (CudaError.cudaSuccess,)

    def cudaEventElapsedTime(self, start: int, end: int) -> Any:  # noqa: N802
        return CudaError.cudaSuccess, 1e3 * (self.events[end] - self.events[start])

    def cudaEventDestroy(self, event: int) -> Any:  # noqa: N802
        del self.events[event]
        return (CudaError.cudaSuccess,)

    def cudaGetErrorString(self, status: CudaError) -> Any:  # noqa: N802
        return CudaError.cudaSuccess, status.name.removeprefix("cudaError").lower().encode()

    def cudaGetErrorName(self, status: CudaError) -> Any:  # noqa: N802
        return CudaError.cudaSuccess, status.name.encode()

    def cudaDriverGetVersion(self) -> Any:  # noqa: N802
        return CudaError.cudaSuccess, 13000

    def cudaRuntimeGetVersion(self) -> Any:  # noqa: N802
        return CudaError.cudaSuccess, 13000


class Fault(Exception):  # noqa: N818
    """A kernel touched memory that is not allocated."""


Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Name -> element type and shape, -1 where it is dynamic."""


@dataclass(eq=False)
class FakePlan:
    """What a plan's file stands for.

    Attributes:
        inputs: Its inputs.
        outputs: Its outputs.
        profiles: Input name -> (smallest, usual, largest) shape, for each profile.
        compute: Outputs of inputs and weights.
        output_shapes: Outputs' shapes of inputs' shapes.
        weights: Name -> values.
        activations: Bytes of scratch memory for inputs' shapes.
    """

    inputs: Tensors
    outputs: Tensors
    profiles: list[dict[str, Any]]
    compute: Compute
    output_shapes: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, tuple[int, ...]]]
    weights: dict[str, Any] = field(default_factory=dict)
    activations: Callable[[Mapping[str, tuple[int, ...]]], int] = lambda shapes: 4096
    refittable: bool = False
    streamable: int = 0
    host_inputs: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()


_TYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
    "float8": "FP8",
    "bfloat16": "BF16",
}


def add_runtime(module: Any, cuda: FakeCuda, *, rtx: bool) -> Any:
    """Give a make-believe SDK what a session uses.

    ``module.plans`` maps contents of files to :class:`FakePlan`; ``module.failures`` names calls that fail, with the
    reason that is logged; ``module.compiled`` lists what was compiled at run time; ``module.slow`` is how many seconds
    a run takes.
    """
    module.plans = {}
    module.failures = {}
    module.compiled = []
    module.opened = Counter()
    module.slow = 0.0
    module.capturable = True
    module.TensorIOMode = enum.Enum("TensorIOMode", ["INPUT", "OUTPUT"])
    module.TensorLocation = enum.Enum("TensorLocation", ["DEVICE", "HOST"])
    module.DataType = enum.Enum("DataType", list(_TYPES.values()))
    module.ExecutionContextAllocationStrategy = enum.Enum("Strategy", ["STATIC", "USER_MANAGED"])
    module.DynamicShapesKernelSpecializationStrategy = enum.Enum("Specialization", ["LAZY", "EAGER"])

    def fails(name: str) -> bool:
        if name not in module.failures:
            return False
        reason = module.failures[name]
        if isinstance(reason, BaseException):
            raise reason
        module.log.log(module.ILogger.Severity.ERROR, reason)
        return True

    class RuntimeCache:
        def __init__(self) -> None:
            self.kernels: set[str] = set()

        def deserialize(self, blob: bytes) -> bool:
            if not blob.startswith(b"kernels "):
                return False
            self.kernels = set(blob.decode().split()[1:])
            return True

        def serialize(self) -> memoryview:
            if fails("serialize"):
                raise RuntimeError("no memory")
            return memoryview(f"kernels {' '.join(sorted(self.kernels))}".encode())

    class Config:
        __slots__ = ("strategy",) + (("cache", "dynamic_shapes_kernel_specialization_strategy") if rtx else ())

        def __init__(self) -> None:
            if rtx:
                self.cache = None

        def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
            self.strategy = strategy

        if rtx:

            def create_runtime_cache(self) -> RuntimeCache:
                return RuntimeCache()

            def set_runtime_cache(self, cache: RuntimeCache) -> bool:
                self.cache = cache
                return not fails("set_runtime_cache")

    class Engine:
        def __init__(self, plan: FakePlan, size: int) -> None:
            self._plan = plan
            self._names = [*plan.inputs, *plan.outputs]
            self._weights = dict(plan.weights)
            self.num_io_tensors = len(self._names)
            self.num_optimization_profiles = len(plan.profiles)
            self.refittable = plan.refittable
            self.streamable_weights_size = plan.streamable
            self.weight_streaming_budget_v2 = plan.streamable
            status, address = cuda.cudaMalloc(size)
            assert status == CudaError.cudaSuccess
            weakref.finalize(self, cuda.cudaFree, address)

        def get_tensor_name(self, index: int) -> str:
            return self._names[index]

        def get_tensor_mode(self, name: str) -> Any:
            return module.TensorIOMode.INPUT if name in self._plan.inputs else module.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return module.DataType[_TYPES[(self._plan.inputs | self._plan.outputs)[name][0]]]

        def get_tensor_location(self, name: str) -> Any:
            return module.TensorLocation.HOST if name in self._plan.host_inputs else module.TensorLocation.DEVICE

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return (self._plan.inputs | self._plan.outputs)[name][1]

        def get_tensor_profile_shape(self, name: str, index: int) -> Any:
            return [list(shape) for shape in self._plan.profiles[index][name]]

        def get_device_memory_size_for_profile_v2(self, index: int) -> int:
            fixed = {name: shape for name, (_, shape) in self._plan.inputs.items()}
            largest = {name: shapes[2] for name, shapes in self._plan.profiles[index].items()}
            return self._plan.activations(fixed | largest)

        def create_runtime_config(self) -> Config:
            return Config()

        def create_execution_context(self, config: Config) -> Any:
            assert config.strategy == module.ExecutionContextAllocationStrategy.USER_MANAGED
            module.opened["context"] += 1
            return None if fails("create_execution_context") else Context(self, config)

    class Context:
        def __init__(self, engine: Engine, config: Config) -> None:
            self._engine, self._plan, self._config = engine, engine._plan, config
            self._profile = 0
            self._shapes = {n: shape for n, (_, shape) in self._plan.inputs.items() if -1 not in shape}
            self._addresses: dict[str, int] = {}
            self._memory = (0, 0)

        def set_optimization_profile_async(self, index: int, stream: int) -> bool:
            self._profile = index
            return not fails("set_optimization_profile_async")

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            ranges = self._plan.profiles[self._profile].get(name)
            if ranges is not None:
                low, _, high = ranges
                assert all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)), "outside of the profile"
            self._shapes[name] = shape
            return not fails("set_input_shape")

        def infer_shapes(self) -> list[str]:
            if fails("infer_shapes"):
                return ["somewhere"]
            if rtx:
                kernel = repr(sorted(self._shapes.items())).replace(" ", "")
                cache = self._config.cache.kernels if self._config.cache is not None else set()
                if kernel not in cache:
                    module.compiled.append(kernel)
                    cache.add(kernel)
            return [name for name in self._plan.inputs if name not in self._shapes]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self._plan.output_shapes(self._shapes)[name]

        def update_device_memory_size_for_shapes(self) -> int:
            self._memory = (0, 0)
            return self._plan.activations(self._shapes)

        def set_tensor_address(self, name: str, address: int) -> bool:
            assert address % 256 == 0
            self._addresses[name] = address
            return not fails("set_tensor_address")

        def set_device_memory(self, address: int, size: int) -> None:
            if fails("set_device_memory"):
                raise RuntimeError("refused")
            self._memory = address, size

        def execute_async_v3(self, stream: int) -> bool:
            if fails("execute_async_v3"):
                return False
            if stream in cuda.capturing and not module.capturable:
                module.log.log(module.ILogger.Severity.ERROR, "this plan cannot be captured")
                return False
            need = self._plan.activations(self._shapes)
            assert need == 0 or self._memory[1] >= need
            shapes = self._shapes | dict(self._plan.output_shapes(self._shapes))
            addresses, memory, plan = dict(self._addresses), self._memory, self._plan
            weights, token = self._engine._weights, np.frombuffer(np.random.default_rng().bytes(8), np.uint8)

            def array(name: str) -> Any:
                dtype = (plan.inputs | plan.outputs)[name][0]
                count = int(np.prod(shapes[name])) * np.dtype(dtype).itemsize
                return cuda.view(addresses[name], count).view(dtype).reshape(shapes[name])

            def work() -> None:
                scratch = cuda.view(memory[0], 8) if need else token.copy()
                scratch[:] = token
                results = plan.compute({name: array(name).copy() for name in plan.inputs}, weights)
                time.sleep(module.slow)
                for name in plan.outputs:
                    array(name)[...] = results[name]
                if not np.array_equal(scratch, token):
                    raise Fault  # somebody else used the arena meanwhile

            cuda.enqueue(stream, work)
            return True

    class Runtime:
        def __init__(self, log: Any) -> None:
            module.log = log
            self.engine_host_code_allowed = False
            module.runtime = self

        def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
            module.opened["plan"] += 1
            if fails("deserialize_cuda_engine"):
                return None
            return Engine(module.plans[content], len(content))

    class Weights:
        def __init__(self, kind: Any, address: int, count: int) -> None:
            self.dtype, self.address, self.size = kind, address, count

    class Refitter:
        def __init__(self, engine: Engine, log: Any) -> None:
            self._engine = engine
            self._set: dict[str, Weights] = {}

        def get_all_weights(self) -> list[str]:
            return list(self._engine._weights)

        def get_weights_prototype(self, name: str) -> Any:
            values = self._engine._weights[name]
            return Weights(module.DataType[_TYPES[str(values.dtype)]], 0, values.size)

        def set_named_weights(self, name: str, weights: Weights) -> bool:
            self._set[name] = weights
            return not fails("set_named_weights")

        def get_missing_weights(self) -> list[str]:
            merged = self._engine._plan.merged
            return [name for name in merged if name not in self._set] if self._set.keys() & set(merged) else []

        def refit_cuda_engine(self) -> bool:
            assert not any(cuda.streams.values()), "the engine has work under way"
            for number, (name, weights) in enumerate(self._set.items()):
                if number and fails("refit_cuda_engine"):
                    return False  # some are in place
                old = self._engine._weights[name]
                values = np.empty_like(old)
                ctypes.memmove(values.ctypes.data, weights.address, values.nbytes)
                self._engine._weights[name] = values
            return not fails("refit_cuda_engine")

    module.Runtime, module.Refitter, module.Weights = Runtime, Refitter, Weights
    return module


def onnx_plan(path: Any, largest: int = 128, weights: Any = None) -> FakePlan:
    """A plan that computes what ONNX Runtime computes of a graph, for lengths up to ``largest``.

    ``weights`` may be refitted: what was added to them is added to all outputs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    types = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}

    def tensors(nodes: Any) -> Tensors:
        return {n.name: (types[n.type], tuple(d if isinstance(d, int) else -1 for d in n.shape)) for n in nodes}

    own = dict(weights or {})
    inputs, outputs = tensors(session.get_inputs()), tensors(session.get_outputs())
    known: dict[Any, Mapping[str, tuple[int, ...]]] = {}

    def compute(feeds: Mapping[str, Any], weights: Mapping[str, Any]) -> Mapping[str, Any]:
        change = sum(float((values - own[name]).sum()) for name, values in weights.items())
        results = dict(zip(outputs, session.run(list(outputs), dict(feeds)), strict=True))
        return {name: (each + change).astype(each.dtype) for name, each in results.items()} if change else results

    def output_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
        key = tuple(sorted(shapes.items()))
        if key not in known:
            zeros = {name: np.zeros(shapes[name], dtype) for name, (dtype, _) in inputs.items()}
            known[key] = {name: each.shape for name, each in compute(zeros, own).items()}
        return known[key]

    ranges = {
        name: [tuple(size if d < 0 else d for d in shape) for size in (1, 1, largest)]
        for name, (_, shape) in inputs.items()
        if -1 in shape
    }
    return FakePlan(inputs, outputs, [ranges], compute, output_shapes, own, refittable=bool(own), streamable=1 << 20)


def add_plans(path: Any, module: Any, engine: str) -> None:
    """Put plans of all components into a bundle, and what they compute into a make-believe SDK."""
    from latentrt.engines.records import engine_key
    from latentrt.engines.store import EngineStore
    from latentrt.engines.trt import BuildOptions
    from latentrt.runtime.bundle.reader import Bundle

    bundle = Bundle.open(path)
    store, files = EngineStore(bundle.engines_directory), bundle.manifest.files
    for name in bundle.manifest.components:
        graph = bundle.graph(name, "opset20-fp32")
        facts: dict[str, Any] = {
            "engine": engine,
            "precision": "fp32",
            "profile": {},
            "sdk": engine,
            "sdk_version": module.__version__,
            "target": "sm_80+",
            "flags": BuildOptions().as_flags(),
        }
        weights = {file: files[file].sha256 for file in graph.external}
        content = f"plan of {name} for {engine}".encode() * 10
        module.plans[content] = onnx_plan(bundle.graph_path(name, "opset20-fp32"))
        store.add(
            engine_key(graph=files[graph.file].sha256, weights=weights, **facts),
            lambda file, content=content: file.write_bytes(content),
            component=name,
            file=f"{name}.plan",
            **facts,
        )


def make_sdk(cuda: FakeCuda, engine: str) -> Any:
    """A make-believe SDK that runs plans and builds none."""
    module = ModuleType(engine)
    module.__version__ = "10.99.1"  # type: ignore[attr-defined]

    class ILogger:
        Severity = enum.IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])

    module.ILogger = ILogger  # type: ignore[attr-defined]
    return add_runtime(module, cuda, rtx=engine == "tensorrt-rtx")


@contextlib.contextmanager
def installed(monkeypatch: Any, module: Any, cuda: FakeCuda, engine: str) -> Iterator[None]:
    """Let ``latentrt`` find this SDK, this CUDA and an H100."""
    from latentrt.engines.trt import cuda as driver
    from latentrt.engines.trt import kind, sdk, session
    from latentrt.runtime.components import engine_choice, plans

    with monkeypatch.context() as patched:
        for place in (session, plans, kind, engine_choice):
            patched.setattr(place, "cuda_devices", lambda: (driver.CudaDevice("H100", "sm_90"),))
        for place in (session, kind):
            patched.setattr(place, "load_cuda", lambda: cuda)
        for place in (session, plans, kind):
            patched.setattr(place, "load_sdk", lambda name: sdk.Sdk(engine, module))
        yield


@contextlib.contextmanager
def onnxruntime_on_cpu(monkeypatch: Any) -> Iterator[None]:
    """Let the CPU play the GPU of the engine ``onnxruntime-cuda``: sessions, bindings and values are onnxruntime's."""
    import onnxruntime

    from latentrt.engines import onnxrt_gpu
    from latentrt.engines.trt import cuda as driver
    from latentrt.engines.trt import kind
    from latentrt.runtime.components import engine_choice

    real = onnxruntime.InferenceSession

    def session(path: str, settings: Any, **options: Any) -> Any:
        settings.intra_op_num_threads = 1  # small models wait for their threads more than they compute
        return real(path, settings, providers=["CPUExecutionProvider"])  # which takes no number of a device

    on_cpu = onnxrt_gpu.Provider("CPUExecutionProvider", memory="cpu")
    with monkeypatch.context() as patched:
        for place in (onnxrt_gpu, kind, engine_choice):
            patched.setattr(place, "cuda_devices", lambda: (driver.CudaDevice("H100", "sm_90"),))
        patched.setitem(onnxrt_gpu.PROVIDERS, "onnxruntime-cuda", on_cpu)
        patched.setattr(onnxrt_gpu, "_heavy_on_cpu", lambda session: [])
        patched.setattr(onnxruntime, "InferenceSession", session)
        yield
