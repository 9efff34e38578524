"""A plan in memory: read into the SDK, described, refitted, and run by a few execution contexts."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..base import Array, TensorSpec, nbytes
from ..checks import check_flag, check_integer
from ..errors import EngineClosedError, EngineError, EngineUnavailableError, InvalidRequestError, LatentRTError
from .caches import read_cache, write_cache
from .context import Context, PlanProfile, Shapes, choose_profile
from .cuda import CudaDevice
from .cudart import Cuda
from .memory import Arena, CudaArray, MemoryNeeds, Pool
from .refit import check_weights, list_weights, put_weights
from .sdk import Sdk, failure, sdk_errors, sdk_log

_logger = logging.getLogger("latentrt.engines.trt")

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
_CACHE = "runtime cache"


@dataclass(frozen=True)
class SessionOptions:
    """How to run a plan; nothing of it changes the numbers.

    Attributes:
        device: Number of the CUDA device, in the driver's order.
        cuda_graphs: Capture a run when its shapes and addresses come the second time, and replay it from then on:
            one call in place of one a kernel. Not together with a weight streaming budget.
        contexts: Most execution contexts, i.e. threads that prepare a run at the same time, and sets of shapes that
            are kept ready.
        weight_streaming_budget: Bytes of weights to hold on the device; the rest is fetched from the host in every
            run. For plans built with ``BuildOptions(weight_streaming=True)``. ``None`` holds all of them.
        runtime_cache: TensorRT-RTX only: keep the kernels that it compiles for this GPU in a file beside the plan.
        allow_host_code: TensorRT only: let plans that were built ``version_compatible`` run the code for the host that
            is inside them. Only for plans from a source as trusted as a program.
    """

    device: int = 0
    cuda_graphs: bool = True
    contexts: int = 4
    weight_streaming_budget: int | None = None
    runtime_cache: bool = True
    allow_host_code: bool = False

    def __post_init__(self) -> None:
        for name, least in (("device", 0), ("contexts", 1), ("weight_streaming_budget", 0)):
            if (value := getattr(self, name)) is not None or name != "weight_streaming_budget":
                object.__setattr__(self, name, check_integer(name, value, least))
        for name in ("cuda_graphs", "runtime_cache", "allow_host_code"):
            object.__setattr__(self, name, check_flag(name, getattr(self, name)))


class Plan:
    """A plan that is loaded. Reading it is the caller's first call, :meth:`close` the last.

    Args:
        sdk: The SDK.
        cuda: The device, which is the calling thread's.
        path: The plan's file.
        label: Name of the plan in messages.
        device: The device in words.
        options: How to run it.
        arena: Memory of the activations.
        signature: Inputs and outputs as the graph has them, if known.

    Raises:
        EngineUnavailableError: if the plan was built by another version of the SDK, or for another GPU.
        EngineMemoryError: if its weights do not fit.
        EngineError: if it cannot be read, or its tensors are not those of the signature.
        InvalidRequestError: if the options do not suit it.
    """

    def __init__(
        self,
        sdk: Sdk,
        cuda: Cuda,
        path: Path,
        label: str,
        device: CudaDevice,
        options: SessionOptions,
        arena: Arena,
        signature: tuple[Iterable[TensorSpec], Iterable[TensorSpec]] | None,
    ) -> None:
        self._sdk, self.cuda, self._path, self._label = sdk, cuda, path, label
        self._device, self._options, self._arena = device, options, arena
        self._touched: set[str] = set()
        self._idle: list[Context] = []
        self._contexts: list[Context] = []
        self._free = threading.Condition()
        self._cache_file = path.with_name(f"{path.name}.{device.architecture}.cache")
        self._cache: Any = None
        self._saved = b""  # SHA-256 of the file's content
        self._saving = threading.Lock()
        self._runtime: Any = None
        self._engine: Any = None
        self._config: Any = None
        self._load()
        try:
            self.inputs, self.outputs = self._tensors(signature)
            self._profiles = self._describe_profiles()
            self.needs = self._needs()
            _logger.debug("%s: %s", label, self.needs)
        except BaseException:
            self._engine = self._config = self._cache = self._runtime = None
            raise
        self._pool = Pool(cuda, label)
        arena.join(cuda)

    # --- reading the plan

    def _load(self) -> None:
        sdk, options = self._sdk, self._options
        try:
            size = self._path.stat().st_size
            if options.weight_streaming_budget is None:
                # The plan is little more than its weights, which go to the device as they are read.
                self.cuda.require(size, f"the weights of {self._label}", _LESS_WEIGHTS)
            content = self._path.read_bytes()
        except OSError as error:
            raise EngineError(f"{self._label}: cannot read {self._path}: {error.strerror or error}") from error
        with sdk_errors(sdk, f"read {self._path.name}") as errors:
            self._runtime = sdk.module.Runtime(sdk_log(sdk).handle)
            if options.allow_host_code:
                self._runtime.engine_host_code_allowed = True
            engine = self._runtime.deserialize_cuda_engine(content)
            if engine is None:
                raise EngineUnavailableError(
                    f"{failure(sdk, f'read {self._path.name} on {self._device.name}', errors)}; "
                    "build the bundle again with this version of the SDK, for this GPU"
                )
            self._stream_weights(engine)
            self._config = self._make_config(engine)
        self._engine = engine

    def _stream_weights(self, engine: Any) -> None:
        budget = self._options.weight_streaming_budget
        if budget is None:
            return
        streamable = int(engine.streamable_weights_size)
        if not streamable:
            raise InvalidRequestError(
                f"{self._label} was not built for weight streaming; build it with BuildOptions(weight_streaming=True), "
                "or give no budget"
            )
        self.cuda.require(min(budget, streamable), f"the weights of {self._label}", _LESS_WEIGHTS)
        engine.weight_streaming_budget_v2 = min(budget, streamable)

    def _make_config(self, engine: Any) -> Any:
        """Settings of execution contexts, with the kernels that TensorRT-RTX compiled in earlier runs."""
        module = self._sdk.module
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(module.ExecutionContextAllocationStrategy.USER_MANAGED)
        if not self._sdk.compiles_at_runtime:
            return config
        # Kernels for the very shapes are there before the first run. Compiled in the background they would replace
        # general ones at some later run: a request's bits would depend on when it came, and CUDA graphs would keep
        # the slow ones.
        config.dynamic_shapes_kernel_specialization_strategy = module.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._options.runtime_cache:
            cache = config.create_runtime_cache()
            saved = read_cache(self._cache_file, _CACHE)
            if saved and not cache.deserialize(saved):
                _logger.warning(
                    "the %s %s is of another GPU, driver or version and is made anew", _CACHE, self._cache_file
                )
            if not config.set_runtime_cache(cache):
                raise EngineError(f"{self._sdk.title} refused a runtime cache for {self._label}")
            self._cache, self._saved = cache, hashlib.sha256(saved).digest()
        return config

    def _tensors(
        self, signature: tuple[Iterable[TensorSpec], Iterable[TensorSpec]] | None
    ) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        module, engine = self._sdk.module, self._engine
        found: tuple[dict[str, TensorSpec], dict[str, TensorSpec]] = {}, {}
        with sdk_errors(self._sdk, f"describe {self._label}"):
            for index in range(engine.num_io_tensors):
                spec = self._spec(engine, str(engine.get_tensor_name(index)))
                is_input = engine.get_tensor_mode(spec.name) == module.TensorIOMode.INPUT
                found[0 if is_input else 1][spec.name] = spec
        if signature is None:
            return found
        return _named(found[0], signature[0], self._label), _named(found[1], signature[1], self._label)

    def _spec(self, engine: Any, name: str) -> TensorSpec:
        kind = engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise EngineError(f"{self._label}: tensor {name!r} is {kind}, which is not supported")
        if engine.get_tensor_location(name) != self._sdk.module.TensorLocation.DEVICE:
            raise EngineError(f"{self._label}: tensor {name!r} is a shape, read on the host, which is not supported")
        shape = engine.get_tensor_shape(name)
        return TensorSpec(name, _DTYPES[kind], tuple(n if n >= 0 else f"{name}_{i}" for i, n in enumerate(shape)))

    def _describe_profiles(self) -> list[PlanProfile]:
        engine = self._engine
        dynamic = [spec.name for spec in self.inputs.values() if any(isinstance(n, str) for n in spec.shape)]
        profiles = []
        with sdk_errors(self._sdk, f"describe the profiles of {self._label}"):
            for index in range(engine.num_optimization_profiles):
                ranges = {}
                for name in dynamic:
                    low, usual, high = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, index))
                    ranges[name] = low, usual, high
                profiles.append(PlanProfile(index, ranges))
        return profiles or [PlanProfile(0, {})]

    def _needs(self) -> MemoryNeeds:
        engine = self._engine
        with sdk_errors(self._sdk, f"ask for the memory of {self._label}"):
            activations = max(engine.get_device_memory_size_for_profile_v2(each.index) for each in self._profiles)
        io = 0
        for profile in self._profiles:
            lengths: dict[str, int] = {}
            for name, (_, _, largest) in profile.ranges.items():
                pairs = zip(self.inputs[name].shape, largest, strict=True)
                lengths |= {symbol: length for symbol, length in pairs if isinstance(symbol, str)}
            tensors = [*self.inputs.values(), *self.outputs.values()]
            # Without a signature the symbols of outputs are not those of inputs, and outputs are left out.
            known = [spec for spec in tensors if all(isinstance(n, int) or n in lengths for n in spec.shape)]
            io = max(io, sum(nbytes(spec, lengths) for spec in known))
        weights = self._path.stat().st_size
        if self._options.weight_streaming_budget is not None:
            weights = min(weights, self._options.weight_streaming_budget)
        return MemoryNeeds(weights, int(activations), io)

    # --- running

    def run(
        self, feeds: Mapping[str, Any], bound: Mapping[str, CudaArray], seconds: list[float] | None = None
    ) -> dict[str, Any]:
        """Run the plan in a context of its own; see :meth:`Context.run`."""
        feeds = {name: feeds[name] for name in self.inputs}  # in one order, whatever the caller's
        shapes = tuple((name, tuple(array.shape)) for name, array in feeds.items())
        context = self._acquire(shapes)
        new_shapes = context.shapes != shapes
        try:
            results = context.run(feeds, bound, self._profiles, seconds)
        except BaseException:
            # What state it is in is anybody's guess; the next run gets another.
            with self._free:
                self._contexts.remove(context)
                self._free.notify()
            context.close()
            raise
        with self._free:
            self._idle.append(context)
            self._free.notify()
        if new_shapes:
            self._save_cache()
        return results

    def _acquire(self, shapes: Shapes) -> Context:
        """A context that nobody uses: one with these shapes, else a new one, else the one unused for longest."""
        with self._free:
            if not any(context.shapes == shapes for context in self._contexts):
                choose_profile(self._profiles, dict(shapes))  # refuses shapes before a context gets into disorder
            while True:
                for context in reversed(self._idle):
                    if context.shapes == shapes:
                        self._idle.remove(context)
                        return context
                if len(self._contexts) < self._options.contexts:
                    context = self._make_context()
                    self._contexts.append(context)
                    return context
                if self._idle:
                    return self._idle.pop(0)
                self._free.wait()

    def _make_context(self) -> Context:
        engine = self._engine
        if engine is None:
            raise EngineClosedError(f"{self._label} could not be read again after a refit; close it and open it anew")
        return Context(
            self._sdk,
            lambda: engine.create_execution_context(self._config),
            self.outputs,
            self.cuda,
            self._pool,
            self._arena,
            self._label,
            # What is streamed is copied from the host during a run, by means that are the SDK's own business.
            graphs=self._options.cuda_graphs and self._options.weight_streaming_budget is None,
        )

    @property
    def graph_runs(self) -> tuple[int, int]:
        """CUDA graphs captured and runs that replayed one, by the contexts that there are."""
        with self._free:
            return sum(each.captured for each in self._contexts), sum(each.replayed for each in self._contexts)

    def upload(self, array: Array, old: CudaArray | None) -> CudaArray:
        """A copy of ``array`` on the device, in the memory of ``old`` if that has its shape and type."""
        if old is None or (old.shape, old.dtype) != (array.shape, str(array.dtype)):
            old = CudaArray(self.cuda, self._pool.take(array.nbytes), 0, array.shape, str(array.dtype))
        old.write(array)
        return old

    # --- refitting: the caller has the plan to itself

    @property
    def weights(self) -> dict[str, tuple[str, int]]:
        """See :attr:`TensorRTEngine.weights`."""
        engine = self._engine
        return list_weights(self._sdk, engine, self._label) if engine is not None and engine.refittable else {}

    def refit(self, weights: Mapping[str, Array]) -> None:
        """See :meth:`TensorRTEngine.refit`."""
        if self._engine is None:
            self._reload()
        engine = self._engine
        if not engine.refittable:
            raise InvalidRequestError(
                f"{self._label} was not built to be refitted; build it with BuildOptions(refittable=True)"
            )
        check_weights(self._sdk, engine, weights, self._label)
        if self._touched - weights.keys():
            self._reload()
        if not weights:
            return
        self._drop_graphs()
        self._touched |= weights.keys()
        try:
            put_weights(self._sdk, self._engine, weights, self._label)
        except BaseException as error:
            self._reload()  # some of them may be in place
            if isinstance(error, LatentRTError):
                raise type(error)(f"{error}; the plan has its own weights again") from error
            raise

    def _drop_graphs(self) -> None:
        for context in self._contexts:
            context.drop_graphs()

    def _reload(self) -> None:
        """Read the plan anew, for its own weights. The old one goes first: both might not fit."""
        self._save_cache()
        self._close_contexts()
        self._engine = self._config = self._cache = self._runtime = None
        self._touched = set()
        self._load()

    # --- the end

    def _save_cache(self) -> None:
        if self._cache is None:
            return
        with self._saving:
            try:
                with sdk_errors(self._sdk, f"save the {_CACHE} of {self._label}"):
                    content = bytes(self._cache.serialize())
            except EngineError as error:
                _logger.warning("%s", str(error))  # costs time at the next start, and nothing else
                return
            digest = hashlib.sha256(content).digest()
            if digest != self._saved:
                write_cache(self._cache_file, content, _CACHE)
                self._saved = digest

    def _close_contexts(self) -> None:
        for context in self._contexts:
            context.close()
        self._contexts, self._idle = [], []

    def close(self) -> None:
        """Free everything; nobody may run it any more."""
        with contextlib.suppress(EngineError):  # a lost device has been reported by what lost it
            self.cuda.use()
        try:
            self._save_cache()
        finally:
            self._close_contexts()
            self._engine = self._config = self._cache = self._runtime = None
            self._pool.close()
            self._arena.leave()


_LESS_WEIGHTS = (
    "close other programs that use the GPU, build for fp16, or build with weight_streaming and give a budget"
)


def _named(found: Mapping[str, TensorSpec], declared: Iterable[TensorSpec], label: str) -> dict[str, TensorSpec]:
    """The plan's tensors with the graph's names for their dynamic dimensions.

    Raises:
        EngineError: if they are not the graph's tensors.
    """
    named = {}
    for spec in declared:
        there = found.get(spec.name)
        fits = (
            there is not None
            and there.dtype == spec.dtype
            and len(there.shape) == len(spec.shape)
            and all(
                isinstance(length, str) or isinstance(symbol, str) or length == symbol
                for length, symbol in zip(there.shape, spec.shape, strict=True)
            )
        )
        if there is None or not fits:
            raise EngineError(f"{label} has {there or 'no ' + repr(spec.name)}, its graph {spec}; build it again")
        lengths = zip(there.shape, spec.shape, strict=True)
        named[spec.name] = replace(there, shape=tuple(n if isinstance(n, int) else symbol for n, symbol in lengths))
    if extra := sorted(found.keys() - named.keys()):
        raise EngineError(f"{label} has a tensor {extra[0]!r} that its graph does not have; build it again")
    return named
