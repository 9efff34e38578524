"""What this package uses of the SDKs exists in them: held against NVIDIA's modules and the stubs made from them."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import latentrt.engines.trt
from latentrt.engines.trt import plan, refit

PACKAGE = Path(latentrt.engines.trt.__file__).parent
BOTH = {
    "Builder": [
        "build_serialized_network",
        "create_builder_config",
        "create_network",
        "create_optimization_profile",
    ],
    "BuilderFlag": ["REFIT", "TF32", "VERSION_COMPATIBLE", "WEIGHT_STREAMING"],
    "DataType": ["name"],
    "ExecutionContextAllocationStrategy": ["USER_MANAGED"],
    "HardwareCompatibilityLevel": ["AMPERE_PLUS"],
    "IBuilderConfig": [
        "add_optimization_profile",
        "builder_optimization_level",
        "clear_flag",
        "create_timing_cache",
        "hardware_compatibility_level",
        "progress_monitor",
        "set_flag",
        "set_memory_pool_limit",
        "set_timing_cache",
    ],
    "ICudaEngine": [
        "create_execution_context",
        "create_runtime_config",
        "get_device_memory_size_for_profile_v2",
        "get_tensor_dtype",
        "get_tensor_location",
        "get_tensor_mode",
        "get_tensor_name",
        "get_tensor_profile_shape",
        "get_tensor_shape",
        "num_io_tensors",
        "num_optimization_profiles",
        "refittable",
        "streamable_weights_size",
        "weight_streaming_budget_v2",
    ],
    "IExecutionContext": [
        "execute_async_v3",
        "get_tensor_shape",
        "infer_shapes",
        "set_device_memory",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_tensor_address",
        "update_device_memory_size_for_shapes",
    ],
    "ILogger": ["Severity", "log"],
    "INetworkDefinition": ["get_input", "get_layer", "num_inputs", "num_layers"],
    "IRuntimeConfig": ["set_execution_context_allocation_strategy"],
    "IOptimizationProfile": ["set_shape"],
    "ILayer": ["type"],
    "IProgressMonitor": ["phase_finish", "phase_start", "step_complete"],
    "ITensor": ["name", "shape"],
    "ITimingCache": ["serialize"],
    "LayerType": ["__members__"],
    "MemoryPoolType": ["WORKSPACE"],
    "NetworkDefinitionCreationFlag": ["STRONGLY_TYPED"],
    "OnnxParser": ["get_error", "num_errors", "parse_from_file"],
    "ParserError": ["desc", "node", "node_name", "node_operator"],
    "Refitter": [
        "get_all_weights",
        "get_missing_weights",
        "get_weights_prototype",
        "refit_cuda_engine",
        "set_named_weights",
    ],
    "Runtime": ["deserialize_cuda_engine", "engine_host_code_allowed"],
    "TensorIOMode": ["INPUT"],
    "TensorLocation": ["DEVICE"],
    "Weights": ["dtype", "size"],
}
ONLY_RTX = {
    "ComputeCapability": ["__members__"],
    "DynamicShapesKernelSpecializationStrategy": ["EAGER"],
    "IAttention": ["decomposable"],
    "IAttentionInputLayer": ["attention"],
    "IBuilderConfig": ["num_compute_capabilities", "set_compute_capability"],
    "IRuntimeCache": ["deserialize", "serialize"],
    "IRuntimeConfig": [
        "create_runtime_cache",
        "dynamic_shapes_kernel_specialization_strategy",
        "set_runtime_cache",
    ],
}
CALLED = {
    "context.py": {"self._context": ["IExecutionContext"]},
    "plan.py": {
        "engine": ["ICudaEngine"],
        "self._runtime": ["Runtime"],
        "config": ["IRuntimeConfig"],
        "cache": ["IRuntimeCache"],
        "self._cache": ["IRuntimeCache"],
    },
    "refit.py": {"refitter": ["Refitter"], "prototype": ["Weights"]},
    "build.py": {"config": ["IBuilderConfig"], "timings": ["ITimingCache"]},
}
"""File -> name of a variable there -> classes that its attributes must be of."""

SEVERITIES = ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO"]


def _stubs() -> dict[str, set[str]] | None:
    """Classes and their members in ``tensorrt-stubs``, read line by line: not all of the file is valid Python."""
    marker = importlib.util.find_spec("tensorrt_stubs")
    if marker is None or marker.origin is None:
        return None
    members: dict[str, set[str]] = {}
    names: set[str] = set()
    text = (Path(marker.origin).parents[1] / "tensorrt_bindings" / "tensorrt.pyi").read_text(encoding="utf-8")
    for line in text.splitlines():
        if match := re.match(r"class (\w+)", line):
            names = members.setdefault(match[1], set())
        elif match := re.match(r"    (?:def |class )?(\w+)[:(]", line):
            names.add(match[1])
    return members


def test_tables_are_complete() -> None:
    """Every class that the package takes from an SDK's module is in the tables above."""
    used = {
        node.attr
        for path in PACKAGE.glob("*.py")
        if path.name != "cudart.py"  # whose module is CUDA
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in ("module", "sdk.module", "self.module", "self._sdk.module")
    }
    assert {"Builder", "TensorLocation", "Runtime"} <= used
    assert used - {"__version__"} <= BOTH.keys() | ONLY_RTX.keys()


@pytest.mark.parametrize("file", CALLED)
def test_attributes_are_in_the_tables(file: str) -> None:
    """Every attribute that a session takes from an object of an SDK is in the tables above."""
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    for name, owners in CALLED[file].items():
        used = {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == name
        }
        assert used, f"{file} uses no {name}"
        known = {each for owner in owners for table in (BOTH, ONLY_RTX) for each in table.get(owner, [])}
        assert used <= known


def test_cuda_has_what_is_used() -> None:
    """Every name taken from cuda-python exists there; functions whose calls need no device return a status first."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is an optional extra")
    tree = ast.parse((PACKAGE / "cudart.py").read_text(encoding="utf-8"))
    used = {
        ast.unparse(node).removeprefix("self.module.")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("self.module.")
    }
    assert {"cudaMalloc", "cudaMemcpyKind.cudaMemcpyDeviceToDevice", "cudaGraphLaunch"} <= used
    missing = []
    for name in used:
        found = runtime
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None:
            missing.append(name)
    assert missing == []
    status, text = runtime.cudaGetErrorName(runtime.cudaError_t.cudaErrorMemoryAllocation)
    assert (status, text) == (runtime.cudaError_t.cudaSuccess, b"cudaErrorMemoryAllocation")


def test_the_fake_cuda_is_like_the_real_one(fake_gpu: Any) -> None:
    """Functions of the make-believe CUDA take as many arguments as cuda-python's."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is an optional extra")
    fakes = {name: each for name, each in vars(fake_gpu.FakeCuda).items() if inspect.isfunction(each)}
    for name, function in fakes.items():
        if name.startswith("cuda"):
            signature = getattr(runtime, name).__doc__.splitlines()[0]
            inside = signature[signature.index("(") + 1 : signature.rindex(")")]
            expected = len([part for part in inside.split(",") if part.strip()])
            assert len(inspect.signature(function).parameters) - 1 == expected, signature


def test_element_types_are_the_sdks() -> None:
    """The names of element types that sessions and refits translate exist in both SDKs."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is an optional extra")
    names = {*plan._DTYPES, *refit._DTYPES}
    assert names <= trt.DataType.__members__.keys()
    stubs = _stubs()
    assert stubs is None or names <= stubs["DataType"]
    values = np.arange(6, dtype=np.float16)
    weights = trt.Weights(trt.DataType.HALF, values.ctypes.data, values.size)
    assert (weights.size, weights.dtype.name, weights.nbytes) == (6, "HALF", 12)
    np.testing.assert_array_equal(weights.numpy(), values)


def test_rtx_has_what_is_used() -> None:
    """Every attribute that a build uses exists in tensorrt_rtx."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is an optional extra")
    missing = [
        f"{owner}.{name}"
        for table in (BOTH, ONLY_RTX)
        for owner, names in table.items()
        for name in names
        if not hasattr(getattr(trt, owner, None), name)
    ]
    assert missing == []
    assert [name for name in SEVERITIES if not hasattr(trt.ILogger.Severity, name)] == []


def test_tensorrt_has_what_is_used() -> None:
    """Every attribute that a build for TensorRT uses exists in the stubs of TensorRT 10.13."""
    stubs = _stubs()
    if stubs is None:
        pytest.skip("tensorrt-stubs is not installed")
    missing = [f"{owner}.{name}" for owner, names in BOTH.items() for name in names if name not in stubs[owner]]
    assert missing == []
