"""Arrays that ``onnxrt_gpu`` hands out: onnxruntime's own values and bindings, with the CPU for a GPU."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from latentrt.engines import onnxrt_gpu
from latentrt.engines.device import DLPACK_CPU, DLPACK_CUDA, DeviceArray
from latentrt.engines.errors import EngineError
from latentrt.engines.onnxrt_gpu import OnnxRuntimeGpuEngine, OrtArray

X = np.arange(6, dtype=np.float32).reshape(2, 3) / 10
W = np.ones((3, 2), np.float32)
ROWS = np.array([4, 5])


@pytest.fixture
def cpu_as_gpu(fake_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """onnxruntime itself, its bindings and its values, with the CPU in place of a GPU."""
    with fake_gpu.onnxruntime_on_cpu(monkeypatch):
        yield


def test_the_real_binding(step: Path, cpu_as_gpu: None) -> None:
    """Arrays of onnxruntime itself go to others through DLPack, where they are or not at all."""
    with OnnxRuntimeGpuEngine(step, "onnxruntime-cuda") as engine:
        engine.bind({"w": W})
        result: Any = engine.run({"x": X, "rows": ROWS})["y"]
        assert isinstance(result, DeviceArray)
        shared = np.from_dlpack(result)
        np.testing.assert_allclose(shared, np.tanh(X @ W), atol=1e-6)
        assert shared.ctypes.data == result.value.data_ptr() != result.numpy().ctypes.data
        assert result.__dlpack_device__() == (DLPACK_CPU, 0)
        with pytest.raises(BufferError, match=r"OrtArray\(float32\[2, 2\] on cpu:0\) can only be handed over where"):
            result.__dlpack__(dl_device=(DLPACK_CUDA, 0))


def test_a_state_goes_round_in_a_few_buffers(tmp_path: Path, cpu_as_gpu: None) -> None:
    """No run writes into what it reads or into what is held, and memory that nobody holds is used again."""
    model = """
    <ir_version: 10, opset_import: ["" : 20]>
    step (float[n] x) => (float[n] y) { one = Constant<value = float {1.0}> () y = Add(x, one) }
    """
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(model), path)
    state: Any = np.zeros(1 << 12, np.float32)
    with OnnxRuntimeGpuEngine(path, "onnxruntime-cuda") as engine:
        places, alone = [], 30
        for _ in range(alone):
            state = engine.run({"x": state})["y"]
            places.append(state.value.data_ptr())
        assert all(here != there for here, there in itertools.pairwise(places))
        assert 2 <= len(set(places)) <= 4
        held = [state]
        for _ in range(5):
            held.append(engine.run({"x": held[-1]})["y"])
        assert len({each.value.data_ptr() for each in held}) == len(held)
    for number, each in enumerate(held, alone):
        np.testing.assert_array_equal(each.numpy(), np.full(1 << 12, number))


def test_arrays_outlive_their_engine(step: Path, cpu_as_gpu: None) -> None:
    """The session goes with the last of its arrays, whoever holds that."""
    engine = OnnxRuntimeGpuEngine(step, "onnxruntime-cuda").open()
    session = weakref.ref(engine._running_session())
    result: Any = engine.run({"x": X, "w": W, "rows": ROWS})["y"]
    engine.close()
    shared = np.from_dlpack(result)
    del result
    gc.collect()
    assert session() is not None
    np.testing.assert_allclose(shared, np.tanh(X @ W), atol=1e-6)
    del shared
    gc.collect()
    assert session() is None


def test_bfloat16_stays_where_it_is(tmp_path: Path, cpu_as_gpu: None) -> None:
    """numpy has no such type, and the message says so; it may be fed again, and torch takes it."""
    model = """
    <ir_version: 10, opset_import: ["" : 20]>
    step (float[n] x, bfloat16[n] last) => (bfloat16[n] y) { y = Cast<to = 16> (x) }
    """
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(model), path)
    torch = pytest.importorskip("torch", reason="PyTorch is part of an optional extra")
    with OnnxRuntimeGpuEngine(path, "onnxruntime-cuda") as engine:
        feeds: Any = {"x": X[0], "last": OrtArray(_bfloat16(3), ("cpu", 0))}
        for _ in range(2):
            result: Any = engine.run(feeds)["y"]
            feeds["last"] = result
        with pytest.raises(EngineError, match=r"^numpy has no bfloat16; take the array through DLPack"):
            result.numpy()
        assert torch.equal(torch.from_dlpack(result), torch.from_numpy(X[0]).bfloat16())


def _bfloat16(count: int) -> Any:
    values = np.zeros(count, np.uint16)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(values, onnx.TensorProto.BFLOAT16)


def test_operators_on_the_cpu_are_recognised(step: Path) -> None:
    """ONNX Runtime itself tells which operators it gave to the CPU."""
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(str(step), settings, providers=["CPUExecutionProvider"])
    assert onnxrt_gpu._heavy_on_cpu(session) == ["MatMul"]
    assert onnxrt_gpu._heavy_on_cpu(object()) == []
