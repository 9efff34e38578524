"""Compiled OpenVINO models in a bundle: used where they fit, rebuilt where they do not, and never in the way."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from latentrt.engines import TensorSpec
from latentrt.engines.errors import InvalidRequestError, TensorMismatchError
from latentrt.engines.openvino import cache as ov_cache
from latentrt.engines.openvino import engine as ov
from latentrt.engines.openvino.cache import ModelCache
from latentrt.engines.openvino.engine import OpenVinoEngine, OpenVinoOptions
from latentrt.engines.openvino.rewrite import VERSION
from latentrt.engines.records import file_sha256
from latentrt.engines.store import EngineStore

MODEL = """
<ir_version: 10, opset_import: ["" : 20]>
block (float[batch, 3, height, 8] x, float[batch] scale) => (float[batch, 4, height, 8] y) {
    w = Constant <value = float[4, 3, 1, 1] {0.1, -0.2, 0.3, 0.4, 0.5, -0.6, 0.7, 0.8, 0.9, -1, 1.1, 1.2}> ()
    convolved = Conv(x, w)
    axes = Constant <value = int64[3] {1, 2, 3}> ()
    factor = Unsqueeze(scale, axes)
    scaled = Mul(convolved, factor)
    y = Tanh(scaled)
}
"""
SPECS = (
    (TensorSpec("x", "float32", ("batch", 3, "height", 8)), TensorSpec("scale", "float32", ("batch",))),
    (TensorSpec("y", "float32", ("batch", 4, "height", 8)),),
)
FEEDS = {
    "x": np.random.default_rng(0).standard_normal((2, 3, 4, 8)).astype(np.float32),
    "scale": np.array([0.5, 2], np.float32),
}


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    (tmp_path / "bundle" / "unet").mkdir(parents=True)
    path = tmp_path / "bundle" / "unet" / "model.onnx"
    onnx.save(onnx.parser.parse_model(MODEL), path)
    return path


@pytest.fixture
def cache(graph: Path) -> ModelCache:
    """The cache of the graph, which keeps what is compiled."""
    return ModelCache(EngineStore(graph.parent.parent / "engines"), "unet", file_sha256(graph), {}, keep=True)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Graphs that were read to be compiled, oldest first."""
    read, seen = ov.read_onnx, []

    def reading(path: Path) -> Any:
        seen.append(path)
        return read(path)

    monkeypatch.setattr(ov, "read_onnx", reading)
    return seen


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    with caplog.at_level(logging.WARNING, logger="latentrt.engines.openvino.engine"):
        yield lambda: [record.getMessage() for record in caplog.records]


def run(graph: Path, cache: ModelCache | None, options: OpenVinoOptions | None = None) -> Any:
    with OpenVinoEngine(graph, options, "unet", SPECS, cache) as engine:
        return engine.run(FEEDS)["y"]


def test_a_kept_model_is_opened_without_compiling(graph: Path, cache: ModelCache, compilations: list[Path]) -> None:
    """The second engine reads no graph, computes the same bits, and has the same names and symbols."""
    first = run(graph, cache)
    (record,) = cache.store.records(verify_hash=True)
    assert (record.engine, record.component, record.file, record.precision) == (
        "openvino",
        "unet",
        "unet.blob",
        "fp32",
    )
    assert record.sdk_version == ov.load_sdk().__version__
    assert record.flags == {"shapes": {}, "rewriting": VERSION}
    with OpenVinoEngine(graph, None, "unet", SPECS, dataclasses.replace(cache, keep=False)) as engine:
        np.testing.assert_array_equal(engine.run(FEEDS)["y"], first)
        assert list(engine.inputs.values()) == list(SPECS[0])
        assert engine.run({"x": FEEDS["x"][:1], "scale": FEEDS["scale"][:1]})["y"].shape == (1, 4, 4, 8)
    assert compilations == [graph]


def test_threads_are_given_to_a_kept_model(graph: Path, cache: ModelCache, compilations: list[Path]) -> None:
    """A model that was compiled with the automatic number of threads serves any other."""
    run(graph, cache)
    with OpenVinoEngine(graph, OpenVinoOptions(threads=1), "unet", SPECS, cache) as engine:
        assert engine._compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert len(compilations) == 1


def test_without_keep_nothing_is_written(graph: Path, cache: ModelCache, compilations: list[Path]) -> None:
    """Every opening compiles, and the bundle stays as it was."""
    for _ in range(2):
        run(graph, dataclasses.replace(cache, keep=False))
    assert len(compilations) == 2
    assert not cache.store.root.exists()


@pytest.mark.parametrize(
    "change",
    [{"graph": "0" * 64}, {"weights": {"unet/model.onnx.data": "1" * 64}}],
    ids=["graph", "weights"],
)
def test_another_graph_has_another_model(
    graph: Path, cache: ModelCache, compilations: list[Path], warnings: Any, change: dict[str, Any]
) -> None:
    """What was compiled from an older graph or older weights is not opened, and named in the log."""
    run(graph, cache)
    assert warnings() == []
    (record,) = cache.store.records()
    run(graph, dataclasses.replace(cache, **change))
    assert warnings() == [f"unet: the compiled model {record.key} is stale, it is of another graph; compiling again"]
    assert len(compilations) == 2
    assert len(cache.store.records()) == 2


def test_another_way_of_rewriting_has_another_model(
    graph: Path, cache: ModelCache, compilations: list[Path], warnings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another LatentRT made of the graph is not opened, and named in the log."""
    run(graph, cache)
    (record,) = cache.store.records()
    monkeypatch.setattr(ov_cache, "VERSION", VERSION + 1)
    run(graph, cache)
    (warning,) = warnings()
    assert warning.startswith(f"unet: the compiled model {record.key} is stale, it is of another version of LatentRT")
    assert len(compilations) == 2


def test_another_version_processor_or_size_has_another_model(
    graph: Path, cache: ModelCache, compilations: list[Path], warnings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them alone makes a kept model a stranger; another size is none that is stale."""
    run(graph, cache)
    run(graph, cache, OpenVinoOptions(shapes={"height": 4}))
    assert warnings() == []
    with monkeypatch.context() as patch:
        patch.setattr(ov_cache, "cpu_target", lambda core: "riscv64 Other: FP32")
        run(graph, cache)
    (stale,) = warnings()
    assert "and this is riscv64 Other: FP32; compiling again" in stale
    sdk = ov.load_sdk()
    newer = types.SimpleNamespace(__version__="2099.1.0", Tensor=sdk.Tensor)
    monkeypatch.setattr(ov, "load_sdk", lambda: newer)
    monkeypatch.setattr(ov, "read_onnx", lambda path: compilations.append(path) or ov.load_core().read_model(path))
    run(graph, cache)
    assert len(compilations) == 4
    assert "and this is 2099.1.0; compiling again" in warnings()[1]
    assert len({record.key for record in cache.store.records()}) == 4


@pytest.mark.parametrize("damage", ["truncated", "changed", "record", "format"])
def test_a_damaged_model_is_named_and_replaced(
    graph: Path, cache: ModelCache, compilations: list[Path], warnings: Any, damage: str
) -> None:
    """The log names it, the engine runs as ever, and a sound model is in its place afterwards."""
    expected = run(graph, cache)
    (record,) = cache.store.records()
    blob, text = cache.store.path(record), cache.store.root / record.key / "engine.json"
    content = blob.read_bytes()
    if damage == "truncated":
        blob.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        blob.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "record":
        text.write_text("{")
    else:
        text.write_text(text.read_text().replace('"format_version": 2', '"format_version": 1'))
    np.testing.assert_array_equal(run(graph, dataclasses.replace(cache, keep=False)), expected)
    assert len(warnings()) == 1
    assert record.key in warnings()[0]
    assert warnings()[0].endswith("compiling again")
    np.testing.assert_array_equal(run(graph, cache), expected)
    assert len(cache.store.records(verify_hash=True)) == 1
    np.testing.assert_array_equal(run(graph, cache), expected)
    assert len(compilations) == 3  # the last one found the sound model


def test_a_model_that_openvino_refuses(graph: Path, cache: ModelCache, compilations: list[Path], warnings: Any) -> None:
    """A file whose record is right and whose content is no model is passed over, with a warning."""
    expected = run(graph, cache)
    (record,) = cache.store.records()
    shutil.rmtree(cache.store.root / record.key)
    facts = {each.name: getattr(record, each.name) for each in dataclasses.fields(record)}
    for name in ("size", "sha256", "built_seconds", "created"):
        del facts[name]
    cache.store.add(facts.pop("key"), lambda path: path.write_bytes(b"nonsense") and None, **facts)
    np.testing.assert_array_equal(run(graph, cache), expected)
    assert len(compilations) == 2
    assert f"the compiled model {record.key} cannot be opened" in warnings()[0]
    assert run(graph, cache).shape == expected.shape
    assert len(compilations) == 2  # the sound model is in its place


@pytest.mark.parametrize("obstacle", ["file in the way", "full disk"])
def test_what_cannot_be_kept_still_runs(
    graph: Path, cache: ModelCache, warnings: Any, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    """The engine runs, nothing is left behind, and the log says why nothing was kept."""
    if obstacle == "full disk":

        def full(self: Path, content: bytes) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        cache.store.root.write_text("no directory")
    assert run(graph, cache).shape == (2, 4, 4, 8)
    assert any("was not kept" in message for message in warnings())
    assert obstacle != "full disk" or not cache.store.root.exists()


PROCESS = """
import sys
from pathlib import Path
from latentrt.engines.openvino.engine import OpenVinoEngine
from latentrt.engines.openvino.cache import ModelCache
from latentrt.engines.store import EngineStore
graph = Path(sys.argv[1])
cache = ModelCache(EngineStore(graph.parent.parent / "engines"), "unet", sys.argv[2], {}, keep=True)
with OpenVinoEngine(graph, cache=cache) as engine:
    print(list(engine.outputs))
"""


def test_two_processes_at_once(graph: Path, cache: ModelCache) -> None:
    """Both run, and one sound model is there afterwards."""
    command = [sys.executable, "-c", PROCESS, str(graph), cache.graph]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in running] == ["['y']\n"] * 2
    assert [process.returncode for process in running] == [0, 0]
    assert len(cache.store.records(verify_hash=True)) == 1
    assert len(list(cache.store.root.iterdir())) == 1


def test_fixed_shapes(graph: Path) -> None:
    """A model compiled for one size computes the same, says which size that is, and takes no other."""
    shapes = {"batch": 2, "height": 4}
    with OpenVinoEngine(graph, OpenVinoOptions(shapes=shapes), "unet", SPECS) as engine:
        assert str(engine.inputs["x"]) == "x: float32[2, 3, 4, 8]"
        assert str(engine.outputs["y"]) == "y: float32[2, 4, 4, 8]"
        assert engine._compiled.inputs[0].partial_shape.is_static
        np.testing.assert_allclose(engine.run(FEEDS)["y"], run(graph, None), atol=1e-6)
        with pytest.raises(TensorMismatchError, match=r"has shape \(1, 3, 4, 8\), expected x: float32\[2, 3, 4, 8\]"):
            engine.run({"x": FEEDS["x"][:1], "scale": FEEDS["scale"][:1]})
    with OpenVinoEngine(graph, OpenVinoOptions(shapes={"height": 4}), "unet", SPECS) as engine:
        assert str(engine.inputs["x"]) == "x: float32[batch, 3, 4, 8]"
        assert engine.run({"x": FEEDS["x"][:1], "scale": FEEDS["scale"][:1]})["y"].shape == (1, 4, 4, 8)
    with pytest.raises(InvalidRequestError, match="unet has no length called 'depth'; it has batch, height"):
        OpenVinoEngine(graph, OpenVinoOptions(shapes={"depth": 4}), "unet", SPECS).open()
    for length in (0, True, "4"):
        with pytest.raises(InvalidRequestError, match=r"shapes\['height'\] is .*, expected (a whole number|1 or more)"):
            OpenVinoOptions(shapes={"height": length})
