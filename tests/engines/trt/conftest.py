"""A make-believe SDK that records what is asked of it, and tiny ONNX graphs for the real one."""

from __future__ import annotations

import enum
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from latentrt.engines.trt import Sdk, TensorRTEngine
from latentrt.engines.trt.cudart import Cuda


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
        self.answers: dict[str, Any] = {"add_optimization_profile": 0}  # of the builder's configuration
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
        self.BuilderFlag = SimpleNamespace(
            **{flag: flag for flag in ("TF32", "VERSION_COMPATIBLE", "REFIT", "WEIGHT_STREAMING")}
        )
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
                    answer = module.answers.get(name, True)
                    return answer(*arguments) if callable(answer) else answer

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


@pytest.fixture
def cuda(fake_gpu: Any) -> Cuda:
    """CUDA's runtime on a make-believe GPU, without a plan."""
    return Cuda(fake_gpu.FakeCuda())


class Gpu:
    """A make-believe GPU with either SDK, and a small plan to run on it.

    The plan computes ``y = scale * x + shift + sum(text)`` and ``picked = y[rows]``, for x of 1 to 4 rows of 8 to 16
    columns, or of 16 to 64.
    """

    def __init__(self, sdk: Sdk, fakes: Any, directory: Path) -> None:
        self.sdk, self.module, self.fakes, self.directory = sdk, sdk.module, fakes, directory
        self.cuda = fakes.FakeCuda()
        fakes.add_runtime(self.module, self.cuda, rtx=sdk.name == "tensorrt-rtx")

    def plan(self, name: str = "unet", **changes: Any) -> Path:
        """Write a plan; ``changes`` are fields of :class:`fake_gpu.FakePlan`."""

        def ranges(columns: tuple[int, int, int]) -> dict[str, Any]:
            x = [(batch, n) for batch, n in zip((1, 2, 4), columns, strict=True)]
            return {"x": x, "rows": [(1,), (2,), (8,)]}

        def compute(feeds: Any, weights: Any) -> Any:
            y = weights["scale"] * feeds["x"] + weights["shift"] + feeds["text"].sum()
            return {"y": y, "picked": y[feeds["rows"]].astype(np.float16)}

        fields: dict[str, Any] = {
            "inputs": {"x": ("float32", (-1, -1)), "text": ("float32", (1, 3)), "rows": ("int64", (-1,))},
            "outputs": {"y": ("float32", (-1, -1)), "picked": ("float16", (-1, -1))},
            "profiles": [ranges((8, 8, 16)), ranges((16, 32, 64))],
            "compute": compute,
            "output_shapes": lambda shapes: {
                "y": shapes["x"],
                "picked": (*shapes["rows"], shapes["x"][1]),
            },
            "weights": {"scale": np.float32([2]), "shift": np.float32([1])},
            "activations": lambda shapes: 1000 * shapes["x"][0] * shapes["x"][1],
        }
        path = self.directory / f"{name}.plan"
        path.write_bytes(f"plan of {name}".encode() * 100)
        self.module.plans[path.read_bytes()] = self.fakes.FakePlan(**{**fields, **changes})
        return path

    def engine(self, plan: Path | None = None, **arguments: Any) -> TensorRTEngine:
        """An engine for a plan, not open yet."""
        return TensorRTEngine(plan or self.plan(), engine=self.sdk.name, target="sm_80+", **arguments)

    def feeds(self, rows: int = 2, columns: int = 8, seed: int = 0) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        return {
            "x": rng.standard_normal((rows, columns), np.float32),
            "text": rng.standard_normal((1, 3), np.float32),
            "rows": np.array([rows - 1, 0]),
        }

    @staticmethod
    def expected(feeds: Any, scale: float = 2, shift: float = 1) -> Any:
        return np.float32(scale) * feeds["x"] + np.float32(shift) + feeds["text"].sum()

    def check(self, outputs: Any, feeds: Any, **weights: float) -> None:
        """Hold outputs of a run against what the plan computes of ``feeds``."""
        np.testing.assert_allclose(outputs["y"].numpy(), self.expected(feeds, **weights), rtol=1e-6)
        np.testing.assert_array_equal(outputs["picked"].numpy(), outputs["y"].numpy()[feeds["rows"]].astype(np.float16))


@pytest.fixture
def gpu(fake: Sdk, fake_gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Either SDK on a make-believe GPU. Whatever a test does, all that it took is given back in the end."""
    made = Gpu(fake, fake_gpu, tmp_path)
    with fake_gpu.installed(monkeypatch, made.module, made.cuda, fake.name):
        yield made
    if made.cuda.leaks:
        gc.collect()  # else not, for it takes longer than the tests
    assert made.cuda.leaks == {}


@pytest.fixture
def engine(gpu: Gpu) -> Iterator[TensorRTEngine]:
    """An open engine of the small plan."""
    with gpu.engine() as opened:
        yield opened


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


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where a build is to write its plan: in a folder with nothing else."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "unet.plan"
