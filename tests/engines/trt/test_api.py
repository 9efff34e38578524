"""What this package uses of the SDKs exists in them: held against NVIDIA's modules and the stubs made from them."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import latentrt.engines.trt

BOTH = {
    "Builder": [
        "build_serialized_network",
        "create_builder_config",
        "create_network",
        "create_optimization_profile",
    ],
    "BuilderFlag": ["TF32", "VERSION_COMPATIBLE"],
    "HardwareCompatibilityLevel": ["AMPERE_PLUS"],
    "IBuilderConfig": [
        "add_optimization_profile",
        "builder_optimization_level",
        "clear_flag",
        "hardware_compatibility_level",
        "progress_monitor",
        "set_flag",
        "set_memory_pool_limit",
    ],
    "ILogger": ["Severity", "log"],
    "INetworkDefinition": ["get_input", "get_layer", "num_inputs", "num_layers"],
    "IOptimizationProfile": ["set_shape"],
    "ILayer": ["type"],
    "IProgressMonitor": ["phase_finish", "phase_start", "step_complete"],
    "ITensor": ["name", "shape"],
    "LayerType": ["__members__"],
    "MemoryPoolType": ["WORKSPACE"],
    "NetworkDefinitionCreationFlag": ["STRONGLY_TYPED"],
    "OnnxParser": ["get_error", "num_errors", "parse_from_file"],
    "ParserError": ["desc", "node", "node_name", "node_operator"],
}
ONLY_RTX = {
    "ComputeCapability": ["__members__"],
    "IAttention": ["decomposable"],
    "IAttentionInputLayer": ["attention"],
    "IBuilderConfig": ["num_compute_capabilities", "set_compute_capability"],
}
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
        for path in Path(latentrt.engines.trt.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("module", "sdk.module", "self.module")
    }
    assert "Builder" in used
    assert used - {"__version__"} <= BOTH.keys() | ONLY_RTX.keys()


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
