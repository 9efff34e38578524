"""Building plans from ONNX files, with TensorRT or TensorRT-RTX.

Networks are strongly typed: every tensor has the type that the ONNX graph gives it, so precision is chosen where
the graph is made, and no builder flag changes it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import check_flag, check_integer, show
from ..errors import (
    EngineError,
    EngineUnavailableError,
    InvalidRequestError,
    LatentRTError,
    OutputError,
    TensorMismatchError,
)
from .caches import read_cache, write_cache
from .cuda import cuda_devices
from .profile import Profile
from .progress import TOTAL, BuildMonitor, Progress, interrupt_stops
from .sdk import Sdk, failure, sdk_errors, sdk_log

_logger = logging.getLogger("latentrt.engines.trt")

_TIMING_CACHE = "timing cache"
_ARCHITECTURE = re.compile(r"sm_([0-9]{2,3})")


@dataclass(frozen=True)
class BuildOptions:
    """How to build a plan; all of it is part of the engine's key.

    Attributes:
        workspace_bytes: Limit of the scratch memory that a layer may use; None leaves it to the SDK.
        optimization_level: 0 (fastest build) to 5 (fastest plan); None is the SDK's default, 3.
        tf32: Let float32 products round their inputs to 10 bits of mantissa. Off by default: fp32 means fp32.
        compute_capabilities: TensorRT-RTX only: architectures to build for, e.g. ``("sm_86", "sm_89")``. Empty means
            all from ``sm_80`` on (https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html).
        hardware_compatible: TensorRT only: let the plan run on every architecture from ``sm_80`` on, perhaps slower.
        version_compatible: TensorRT only: let the plan run in later versions of the same major version. The plan then
            holds code for the host, which ``SessionOptions(allow_host_code=True)`` lets it run.
        refittable: Let a session put other weights in place of the plan's. Needs a GPU with either SDK, and gives up
            optimisations that look at the weights.
        weight_streaming: Let a session hold a part of the weights on the GPU only.
    """

    workspace_bytes: int | None = None
    optimization_level: int | None = None
    tf32: bool = False
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatible: bool = False
    version_compatible: bool = False
    refittable: bool = False
    weight_streaming: bool = False

    def __post_init__(self) -> None:
        # Kept as Python's own numbers: they go into the engine's key as JSON.
        for name, least, most in (("workspace_bytes", 1, None), ("optimization_level", 0, 5)):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_integer(name, value, least, most))
        for name in ("tf32", "hardware_compatible", "version_compatible", "refittable", "weight_streaming"):
            object.__setattr__(self, name, check_flag(name, getattr(self, name)))
        for architecture in self.compute_capabilities:
            if not isinstance(architecture, str) or not _ARCHITECTURE.fullmatch(architecture):
                raise InvalidRequestError(f"{show(architecture)} is no compute capability; expected one such as sm_89")

    def as_flags(self) -> dict[str, int | bool | None]:
        """The options that an engine's key needs besides its target."""
        return {
            "workspace_bytes": self.workspace_bytes,
            "optimization_level": self.optimization_level,
            "tf32": self.tf32,
            "hardware_compatible": self.hardware_compatible,
            "version_compatible": self.version_compatible,
            "refittable": self.refittable,
            "weight_streaming": self.weight_streaming,
        }


def build_target(sdk: Sdk, options: BuildOptions) -> str:
    """GPU architectures that a plan built here with these options runs on, e.g. ``"sm_90"``, or ``"sm_80+"`` and later.

    Raises:
        InvalidRequestError: if the options are not this SDK's.
        EngineUnavailableError: if the SDK builds for this machine's GPU, or needs one for an option, and there is none.
    """
    if sdk.builds_without_gpu:
        for name in ("hardware_compatible", "version_compatible"):
            if getattr(options, name):
                raise InvalidRequestError(f"{sdk.title} has no option {name}; leave it out, or build with tensorrt")
        # TensorRT-RTX 1.7 fails deep inside its compiler otherwise, with a message that names no cause.
        if options.refittable and not cuda_devices():
            raise EngineUnavailableError(
                f"{sdk.title} builds refittable plans only where there is a GPU, and no CUDA device was found; "
                "build on a machine with an NVIDIA GPU, or leave refittable out"
            )
        return ",".join(_architectures(options)) or "sm_80+"
    if options.compute_capabilities:
        raise InvalidRequestError(
            f"{sdk.title} builds for the GPU of this machine only; leave compute capabilities out, or use tensorrt-rtx"
        )
    devices = cuda_devices()
    if not devices:
        raise EngineUnavailableError(
            f"{sdk.title} builds on the GPU that a plan is for, and no CUDA device was found; build on a machine with "
            "an NVIDIA GPU, or use tensorrt-rtx, which needs none to build"
        )
    return "sm_80+" if options.hardware_compatible else devices[0].architecture


def build_plan(
    sdk: Sdk,
    graph: Path,
    output: Path,
    profile: Profile,
    *,
    options: BuildOptions | None = None,
    on_progress: Progress | None = None,
    timing_cache: Path | None = None,
) -> None:
    """Build the plan of an ONNX graph.

    Ctrl-C stops the build at the SDK's next step, and KeyboardInterrupt is raised. On any failure ``output`` is as
    it was before.

    Args:
        sdk: From :func:`load_sdk`.
        graph: ONNX file; external weights are looked for beside it. It must be trusted, or checked, beforehand.
        output: Where the plan goes, in one rename.
        profile: Shapes of the dynamic inputs.
        options: None for the defaults.
        on_progress: Called as :data:`Progress` says, in this thread or the SDK's; an exception of it stops the build.
        timing_cache: TensorRT only: file of kernels' timings, read and extended, so that the next build is faster. A
            damaged one is named in a warning and made anew. TensorRT-RTX times nothing when it builds.

    Raises:
        InvalidRequestError: if the options are not this SDK's.
        EngineUnavailableError: if the SDK builds for this machine's GPU, and there is none.
        TensorMismatchError: if the profile does not fit the graph's inputs.
        EngineError: if the SDK cannot parse the graph (naming the node) or build the plan.
        OutputError: if the plan cannot be written.
    """
    options = options or BuildOptions()
    build_target(sdk, options)  # refuses what cannot be built here
    if not graph.is_file():
        raise EngineError(f"there is no ONNX file at {graph}; export the model first")
    monitor = BuildMonitor(sdk.module, on_progress)
    with interrupt_stops(monitor):
        monitor.report("Parsing the graph", 0)
        _build(sdk, graph, output, profile, options, monitor, None if sdk.compiles_at_runtime else timing_cache)
        monitor.report("Done", TOTAL)
    monitor.check()


def _build(
    sdk: Sdk,
    graph: Path,
    output: Path,
    profile: Profile,
    options: BuildOptions,
    monitor: BuildMonitor,
    timing_cache: Path | None,
) -> None:
    with sdk_errors(sdk, "start a build"):
        builder = sdk.module.Builder(sdk_log(sdk).handle)
        # The position of this flag differs between SDKs; a TensorRT that no longer has it knows no other networks.
        strong = getattr(sdk.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if strong is None else 1 << int(strong))
        parser = sdk.module.OnnxParser(network, sdk_log(sdk).handle)
        config = builder.create_builder_config()
    with sdk_errors(sdk, f"parse {graph.name}") as errors:
        if not parser.parse_from_file(str(graph)):
            raise EngineError(f"{sdk.title} cannot use {graph.name}: {_parser_errors(parser, errors)}")
    monitor.check()
    with sdk_errors(sdk, "configure the build"):
        _let_attention_decompose(sdk, network)
        _configure(sdk, config, options)
        _add_profile(sdk, builder, network, config, profile)
        config.progress_monitor = monitor.handle
        timings: Any = None if timing_cache is None else _read_timings(sdk, config, timing_cache)
    try:
        with sdk_errors(sdk, f"build a plan of {graph.name}") as errors:
            plan = builder.build_serialized_network(network, config)
            if plan is None:
                raise failure(sdk, f"build a plan of {graph.name}", errors)
    except EngineError:
        monitor.check()  # a build that was stopped fails too, and for no reason worth telling
        raise
    monitor.check()
    if timing_cache is not None:
        with sdk_errors(sdk, f"save the timing cache {timing_cache}"):
            write_cache(timing_cache, bytes(timings.serialize()), _TIMING_CACHE)
    monitor.report("Writing the plan", TOTAL - 1)
    _write(output, lambda file: file.write(plan), monitor)


def _read_timings(sdk: Sdk, config: Any, path: Path) -> Any:
    """Give the build the timings of earlier ones; returns the cache that it extends."""
    saved = read_cache(path, _TIMING_CACHE)
    timings = config.create_timing_cache(saved)
    # Never with timings of another GPU: they would choose kernels that are slow on this one.
    if timings is not None and config.set_timing_cache(timings, False):
        return timings
    _logger.warning("the %s %s is of another GPU or version and is made anew", _TIMING_CACHE, path)
    timings = config.create_timing_cache(b"")
    if timings is None or not config.set_timing_cache(timings, False):
        raise EngineError(f"{sdk.title} refused an empty timing cache; build without one")
    return timings


def _let_attention_decompose(sdk: Sdk, network: Any) -> None:
    """Let every ONNX ``Attention`` that no fused kernel serves be built from simpler operators, rather than fail.

    Fused kernels exist for some head sizes and types only, and which they are depends on the SDK's version.
    """
    boundary = getattr(sdk.module.LayerType, "ATTENTION_INPUT", None)
    if boundary is None:
        return  # TensorRT before 10.14 has no attention layer, its parser makes simpler ones
    for layer in map(network.get_layer, range(network.num_layers)):
        if layer.type == boundary:
            layer.__class__ = sdk.module.IAttentionInputLayer  # the bindings hand out every layer as an ILayer
            layer.attention.decomposable = True


def _configure(sdk: Sdk, config: Any, options: BuildOptions) -> None:
    module = sdk.module
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.tf32:
        config.set_flag(module.BuilderFlag.TF32)
    else:
        config.clear_flag(module.BuilderFlag.TF32)  # the SDKs set it by default
    if options.version_compatible:
        config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
    if options.refittable:
        config.set_flag(module.BuilderFlag.REFIT)
    if options.weight_streaming:
        config.set_flag(module.BuilderFlag.WEIGHT_STREAMING)
    if options.hardware_compatible:
        config.hardware_compatibility_level = module.HardwareCompatibilityLevel.AMPERE_PLUS
    if architectures := _architectures(options):
        known = {name: value for name, value in module.ComputeCapability.__members__.items() if name.startswith("SM")}
        config.num_compute_capabilities = len(architectures)
        for index, architecture in enumerate(architectures):
            member = architecture.replace("_", "").upper()
            if member not in known or not config.set_compute_capability(known[member], index):
                choice = ", ".join(name.lower().replace("sm", "sm_") for name in known)
                raise InvalidRequestError(f"{sdk.title} cannot build for {architecture}; expected some of {choice}")


def _architectures(options: BuildOptions) -> list[str]:
    """Each once, oldest first: their order makes no other plan."""
    return sorted(set(options.compute_capabilities), key=lambda architecture: int(architecture[3:]))


def _add_profile(sdk: Sdk, builder: Any, network: Any, config: Any, profile: Profile) -> None:
    shapes = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
    if unknown := [name for name in profile.shapes if name not in shapes]:
        raise TensorMismatchError(
            f"the profile names an input {unknown[0]!r}, the graph has {', '.join(shapes) or 'none'}"
        )
    for name, shape in shapes.items():
        if -1 not in shape and name not in profile.shapes:
            continue
        if name not in profile.shapes:
            raise TensorMismatchError(
                f"input {name!r} has the dynamic shape {shape}, and the profile has no entry for it"
            )
        low, usual, high = profile.as_shapes()[name]
        fits = len(low) == len(shape) and all(
            size in (-1, smallest) and size in (-1, largest)
            for size, smallest, largest in zip(shape, low, high, strict=True)
        )
        if not fits:
            raise TensorMismatchError(
                f"input {name!r} has shape {shape} (-1 is dynamic), its profile {low} to {high}; change the profile"
            )
    if not profile.shapes:
        return
    described = builder.create_optimization_profile()
    for name, (low, usual, high) in profile.as_shapes().items():
        described.set_shape(name, low, usual, high)
    if config.add_optimization_profile(described) < 0:
        raise EngineError(f"{sdk.title} refused the optimisation profile {profile.as_shapes()}")


def _parser_errors(parser: Any, errors: list[str]) -> str:
    if parser.num_errors == 0:
        return " ".join(errors[0].split()) if errors else "it gave no reason"
    error = parser.get_error(0)
    reason = " ".join(str(error.desc()).split())
    if operator := error.node_operator():
        # Unnamed nodes are named by their number, as the parser itself does.
        reason = f"node {error.node_name() or error.node()!r} ({operator}): {reason}"
    more = parser.num_errors - 1
    return f"{reason} (and {more} more)" if more else reason


def _write(output: Path, write: Callable[[Any], object], monitor: BuildMonitor) -> None:
    """Write a file beside ``output`` and rename it into place."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        monitor.check()
        os.replace(temporary, output)
    except LatentRTError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write the plan {output}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
