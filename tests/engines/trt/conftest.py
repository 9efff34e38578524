"""A make-believe SDK that records what is asked of it, and tiny ONNX graphs for the real one."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from latentrt.engines.trt import Sdk


class FakeModule(ModuleType):
    """Has the attributes of ``tensorrt`` and ``tensorrt_rtx`` that a build uses.

    ``calls`` lists what was called, ``build`` may be replaced by another behaviour of a build.
    """

    def __init__(self, name: str, strongly_typed: int | None, capabilities: list[str]) -> None:
        super().__init__(name)
        self.__version__ = "10.99.1"
        self.calls: list[tuple[Any, ...]] = []
        self.parser_errors: list[SimpleNamespace] = []
        self.inputs = [SimpleNamespace(name="x", shape=(-1, 4, -1, -1)), SimpleNamespace(name="fixed", shape=(1,))]
        self.build: Callable[[Any, Any], Any] = self._build
        self.profile_index = 0
        module = self

        class Severity(enum.IntEnum):
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        class ILogger:
            pass

        ILogger.Severity = Severity  # type: ignore[attr-defined]
        self.ILogger = ILogger
        self.IProgressMonitor = type("IProgressMonitor", (), {})
        members = {} if strongly_typed is None else {"STRONGLY_TYPED": strongly_typed}
        self.NetworkDefinitionCreationFlag = SimpleNamespace(**members)
        self.BuilderFlag = SimpleNamespace(TF32="TF32", VERSION_COMPATIBLE="VERSION_COMPATIBLE")
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="WORKSPACE")
        self.HardwareCompatibilityLevel = SimpleNamespace(AMPERE_PLUS="AMPERE_PLUS")
        self.layers: list[SimpleNamespace] = []
        self.LayerType = SimpleNamespace(CONVOLUTION="CONVOLUTION")
        if capabilities:
            self.ComputeCapability = SimpleNamespace(__members__={name: name for name in capabilities})

        class Config:
            def __setattr__(self, name: str, value: object) -> None:
                module.calls.append(("set", name, value))
                object.__setattr__(self, name, value)

            def __getattr__(self, name: str) -> Any:
                def call(*arguments: object) -> Any:
                    module.calls.append((name, *arguments))
                    return module.profile_index if name == "add_optimization_profile" else True

                return call

        class Builder:
            def __init__(self, logger: Any) -> None:
                module.logger = logger

            def create_network(self, flags: int) -> Any:
                module.calls.append(("create_network", flags))
                return SimpleNamespace(
                    num_inputs=len(module.inputs),
                    get_input=module.inputs.__getitem__,
                    num_layers=len(module.layers),
                    get_layer=module.layers.__getitem__,
                )

            def create_builder_config(self) -> Any:
                return Config()

            def create_optimization_profile(self) -> Any:
                return SimpleNamespace(set_shape=lambda *arguments: module.calls.append(("set_shape", *arguments)))

            def build_serialized_network(self, network: Any, config: Any) -> Any:
                return module.build(network, config)

        class OnnxParser:
            def __init__(self, network: Any, logger: Any) -> None:
                self.num_errors = len(module.parser_errors)
                self.get_error = module.parser_errors.__getitem__

            def parse_from_file(self, path: str) -> bool:
                module.calls.append(("parse_from_file", path))
                return not module.parser_errors

        self.Builder = Builder
        self.OnnxParser = OnnxParser

    def _build(self, network: Any, config: Any) -> bytes:
        return b"a plan"

    def called(self, name: str) -> list[tuple[Any, ...]]:
        """Arguments of every call of ``name``."""
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sdk]:
    """Either SDK, make-believe, on a machine with a make-believe H100."""
    from latentrt.engines.trt import build
    from latentrt.engines.trt.cuda import CudaDevice

    monkeypatch.setattr(build, "cuda_devices", lambda: (CudaDevice("H100", "sm_90"),))
    # The flag's position is as in tensorrt_rtx 1.7 and tensorrt 10.13.
    if request.param == "tensorrt-rtx":
        yield Sdk("tensorrt-rtx", FakeModule("tensorrt_rtx", 0, ["NONE", "CURRENT", "SM75", "SM89", "SM120"]))
    else:
        yield Sdk("tensorrt", FakeModule("tensorrt", 1, []))


def _convolutions(element: int, seed: int) -> onnx.ModelProto:
    """Three convolutions of ``x[batch, 4, height, width]``, each followed by Relu."""
    rng = np.random.default_rng(seed)
    dtype = helper.tensor_dtype_to_np_dtype(element)
    weights, nodes, name = [], [], "x"
    for i in range(3):
        weights.append(numpy_helper.from_array(rng.standard_normal((4, 4, 3, 3)).astype(dtype), f"weight{i}"))
        nodes.append(helper.make_node("Conv", [name, f"weight{i}"], [f"conv{i}"], name=f"conv_{i}", pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"conv{i}"], [f"relu{i}"], name=f"relu_{i}"))
        name = f"relu{i}"
    shape = ["batch", 4, "height", "width"]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", element, shape)],
        [helper.make_tensor_value_info(name, element, shape)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


WriteGraph: TypeAlias = Callable[..., Path]


@pytest.fixture
def write_graph(tmp_path: Path) -> WriteGraph:
    """Writes a small graph to a file: ``write_graph(name, element=..., seed=..., edit=..., **how_to_save)``."""

    def write(
        name: str,
        *,
        element: int = TensorProto.FLOAT,
        seed: int = 0,
        edit: Callable[[onnx.ModelProto], object] = lambda model: None,
        **how: Any,
    ) -> Path:
        model = _convolutions(element, seed)
        edit(model)
        onnx.save(model, tmp_path / name, **how)
        return tmp_path / name

    return write


@pytest.fixture
def graph(write_graph: WriteGraph) -> Path:
    """File of a small float32 graph with the dynamic input ``x[batch, 4, height, width]``."""
    return write_graph("graph.onnx")
