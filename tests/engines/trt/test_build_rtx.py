"""Real plans of tiny graphs, built with TensorRT-RTX on whatever machine this is; no GPU is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from latentrt.engines.errors import EngineError, EngineUnavailableError, TensorMismatchError
from latentrt.engines.records import EngineRecord, engine_key, file_sha256
from latentrt.engines.store import EngineStore
from latentrt.engines.trt import (
    BuildOptions,
    Profile,
    Sdk,
    ShapeRange,
    TensorRTEngine,
    build,
    build_plan,
    build_target,
    load_sdk,
)
from latentrt.engines.trt.cuda import CudaDevice, cuda_devices
from latentrt.engines.trt.progress import TOTAL

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is an optional extra")

WriteGraph = Callable[..., Path]
PROFILE = Profile({"x": ShapeRange((1, 4, 8, 8), (2, 4, 16, 16), (4, 4, 32, 32))})


@pytest.fixture
def sdk() -> Sdk:
    return load_sdk("tensorrt-rtx")


def test_plan_is_the_sdks(sdk: Sdk, graph: Path, output: Path) -> None:
    """The plan is, byte for byte, what the SDK's own calls give for a strongly typed network without TF32."""
    build_plan(sdk, graph, output, PROFILE)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse(graph.read_bytes())
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 4, 8, 8), (2, 4, 16, 16), (4, 4, 32, 32))
    config.add_optimization_profile(profile)
    assert output.read_bytes() == bytes(builder.build_serialized_network(network, config))


def test_what_decides_a_plan_changes_it(sdk: Sdk, write_graph: WriteGraph, output: Path) -> None:
    """Precision of the graph, weights, profile, and target each give another plan."""
    graph = write_graph("graph.onnx")
    larger = Profile({"x": ShapeRange((1, 4, 8, 8), (2, 4, 32, 32), (4, 4, 64, 64))})
    plans = set()
    for source, profile, options in [
        (graph, PROFILE, BuildOptions()),
        (write_graph("half.onnx", element=TensorProto.FLOAT16), PROFILE, BuildOptions()),
        (write_graph("other.onnx", seed=1), PROFILE, BuildOptions()),
        (graph, larger, BuildOptions()),
        (graph, PROFILE, BuildOptions(compute_capabilities=("sm_86", "sm_89"))),
    ]:
        build_plan(sdk, source, output, profile, options=options)
        plans.add(output.read_bytes())
    assert len(plans) == 5


def test_external_weights_are_found(sdk: Sdk, write_graph: WriteGraph, output: Path) -> None:
    """Weights in a file beside the graph give the plan that weights inside it give."""
    build_plan(sdk, write_graph("graph.onnx"), output, PROFILE)
    inside = output.read_bytes()
    how = {"save_as_external_data": True, "location": "graph.data", "size_threshold": 0}
    external = write_graph("external.onnx", **how)
    build_plan(sdk, external, output, PROFILE)
    assert output.read_bytes() == inside
    (external.parent / "graph.data").unlink()
    with pytest.raises(EngineError, match=r"cannot use external.onnx: .*weight0"):
        build_plan(sdk, external, output, PROFILE)


def test_attention_without_a_fused_kernel(sdk: Sdk, tmp_path: Path, output: Path) -> None:
    """An Attention operator whose heads no fused kernel serves (size 4) is decomposed; the SDK alone refuses it."""
    shape = ["batch", 2, 16, 4]
    q, k, v, y = (onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in "qkvy")
    attention = onnx.helper.make_node("Attention", ["q", "k", "v"], ["y"], name="attention")
    graph = onnx.helper.make_graph([attention], "attention", [q, k, v], [y])
    path = tmp_path / "attention.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10), path)
    heads = ShapeRange((1, 2, 16, 4), (1, 2, 16, 4), (2, 2, 16, 4))
    build_plan(sdk, path, output, Profile(dict.fromkeys("qkv", heads)))
    assert output.stat().st_size > 0


def _unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[2].op_type = "Frobnicate"


def test_unknown_operator_is_named(sdk: Sdk, write_graph: WriteGraph, output: Path) -> None:
    """An operator that the SDK does not know is named with its node."""
    with pytest.raises(EngineError, match=r"cannot use graph.onnx: node 'conv_1' \(Frobnicate\): "):
        build_plan(sdk, write_graph("graph.onnx", edit=_unknown_operator), output, PROFILE)
    assert os.listdir(output.parent) == []


def _mixed_types(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def test_types_are_not_mended(sdk: Sdk, write_graph: WriteGraph, output: Path) -> None:
    """A graph that mixes float16 and float32 in one operator is an error: the network is strongly typed."""
    with pytest.raises(EngineError, match=r"graph.onnx: .*type"):
        build_plan(sdk, write_graph("graph.onnx", edit=_mixed_types), output, PROFILE)


@pytest.mark.parametrize("content", [b"", b"no ONNX at all"], ids=["empty", "text"])
def test_file_that_is_no_graph(sdk: Sdk, tmp_path: Path, output: Path, content: bytes) -> None:
    """A file that is no ONNX graph is an error that names it."""
    (tmp_path / "broken.onnx").write_bytes(content)
    with pytest.raises(EngineError, match=r"broken\.onnx"):
        build_plan(sdk, tmp_path / "broken.onnx", output, Profile({}))
    assert os.listdir(output.parent) == []


def test_truncated_graph(sdk: Sdk, graph: Path, output: Path) -> None:
    """A truncated ONNX file is an error that names it."""
    graph.write_bytes(graph.read_bytes()[:500])
    with pytest.raises(EngineError, match=r"cannot use graph\.onnx: .*Failed to parse"):
        build_plan(sdk, graph, output, PROFILE)


def test_failure_of_the_build_has_the_sdks_reason(sdk: Sdk, graph: Path, output: Path) -> None:
    """A workspace too small for any tactic fails with the SDK's words."""
    with pytest.raises(EngineError, match=r"failed to build a plan of graph.onnx: .*workspace"):
        build_plan(sdk, graph, output, PROFILE, options=BuildOptions(workspace_bytes=1))
    assert os.listdir(output.parent) == []


def test_profile_of_another_graph(sdk: Sdk, graph: Path, output: Path) -> None:
    """The real network's shapes are what the profile is held against."""
    with pytest.raises(TensorMismatchError, match=r"\(-1, 4, -1, -1\)"):
        build_plan(sdk, graph, output, Profile({"x": ShapeRange((1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8))}))


def test_progress_is_reported(sdk: Sdk, graph: Path, output: Path) -> None:
    """A real build reports many phases, rising to the end."""
    reports: list[tuple[str, int, int]] = []
    build_plan(sdk, graph, output, PROFILE, on_progress=lambda *report: reports.append(report))
    done = [number for _, number, _ in reports]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, TOTAL)
    assert len(set(done)) > 10
    assert len({phase for phase, _, _ in reports}) > 5


@pytest.mark.parametrize("at", [0, 300, 700])
def test_keyboard_interrupt_from_the_callback(
    sdk: Sdk, graph: Path, output: Path, at: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """KeyboardInterrupt raised by the callback stops a real build silently and leaves nothing; the next one works."""

    def on_progress(phase: str, done: int, total: int) -> None:
        if done >= at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(sdk, graph, output, PROFILE, on_progress=on_progress)
    assert os.listdir(output.parent) == []
    assert capfd.readouterr() == ("", "")
    build_plan(sdk, graph, output, PROFILE)
    assert output.stat().st_size > 0


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with SIGINT ignored
from pathlib import Path
from latentrt.engines.trt import Profile, ShapeRange, build_plan, load_sdk
from latentrt.engines.store import EngineStore
graph, root = map(Path, sys.argv[1:])
shapes = ShapeRange((1, 4, 8, 8), (2, 4, 16, 16), (4, 4, 32, 32))
def slowly(phase, done, total):
    print(phase, flush=True)
    if done >= 300:
        time.sleep(0.2)
def write(path):
    build_plan(load_sdk("tensorrt-rtx"), graph, path, Profile({"x": shapes}), on_progress=slowly)
fields = dict(engine="tensorrt-rtx", component="c", file="c.plan", precision="fp32", profile={})
fields |= dict(sdk="tensorrt-rtx", sdk_version="1", target="sm_80+")
print(EngineStore(root).add("0" * 24, write, **fields).sha256)
"""


def test_ctrl_c_stops_the_build_of_a_process(graph: Path, tmp_path: Path) -> None:
    """SIGINT in the middle of a build ends the process with KeyboardInterrupt, and the bundle is as it was."""
    command = [sys.executable, "-c", SLOW, str(graph), str(tmp_path / "engines")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Optimizing"):
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert stderr.strip().splitlines()[-1] == "KeyboardInterrupt"
    assert not (tmp_path / "engines").exists()


def _engine(sdk: Sdk, graph: Path, store: EngineStore, precision: str, profile: Profile) -> tuple[EngineRecord, bool]:
    """The engine of a graph, and whether it had to be built: what a build command does."""
    options = BuildOptions()
    description = {
        "engine": sdk.name,
        "sdk": sdk.name,
        "sdk_version": sdk.version,
        "precision": precision,
        "profile": profile.as_shapes(),
        "target": build_target(sdk, options),
    }
    key = engine_key(graph=file_sha256(graph), weights={}, flags=options.as_flags(), **description)
    if (found := store.find(key)) is not None:
        return found, False
    write = lambda path: build_plan(sdk, graph, path, profile, options=options)  # noqa: E731
    return store.add(key, write, component="unet", file="unet.plan", **description), True


def test_second_build_reuses_the_first(sdk: Sdk, write_graph: WriteGraph, tmp_path: Path) -> None:
    """The same engine is built once; other weights, another precision and another profile are built anew."""
    store = EngineStore(tmp_path / "engines")
    graph = write_graph("graph.onnx")
    first, built = _engine(sdk, graph, store, "fp32", PROFILE)
    assert built
    assert _engine(sdk, graph, store, "fp32", PROFILE) == (first, False)
    half = write_graph("half.onnx", element=TensorProto.FLOAT16)
    larger = Profile({"x": ShapeRange((1, 4, 8, 8), (2, 4, 16, 16), (4, 4, 64, 64))})
    assert _engine(sdk, half, store, "fp16", PROFILE)[1]
    assert _engine(sdk, graph, store, "fp32", larger)[1]
    assert _engine(sdk, write_graph("graph.onnx", seed=1), store, "fp32", PROFILE)[1]
    assert len(store.records(verify_hash=True)) == 4


def test_two_processes_build_one_key(graph: Path, tmp_path: Path) -> None:
    """Two processes that build the same key at once both end well, with one sound engine between them."""
    command = [sys.executable, "-c", SLOW.replace("0.2", "0"), str(graph), str(tmp_path / "engines")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    (record,) = EngineStore(tmp_path / "engines").records(verify_hash=True)
    assert printed == [record.sha256] * 2
    assert os.listdir(tmp_path / "engines") == [record.key]


def test_weight_streaming_builds(sdk: Sdk, graph: Path, output: Path) -> None:
    """A plan whose weights can be streamed builds without a GPU, and is another plan."""
    build_plan(sdk, graph, output, PROFILE)
    plain = output.read_bytes()
    build_plan(sdk, graph, output, PROFILE, options=BuildOptions(weight_streaming=True))
    assert output.read_bytes() != plain


@pytest.mark.skipif(bool(cuda_devices()), reason="this machine has a GPU")
def test_refittable_plans_need_a_gpu(sdk: Sdk, graph: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU they are refused in one sentence, and that is right: the SDK itself fails."""
    options = BuildOptions(refittable=True)
    with pytest.raises(EngineUnavailableError, match="builds refittable plans only where there is a GPU"):
        build_plan(sdk, graph, output, PROFILE, options=options)
    monkeypatch.setattr(build, "cuda_devices", lambda: (CudaDevice("H100", "sm_90"),))
    with pytest.raises(EngineError, match="failed to build a plan"):
        build_plan(sdk, graph, output, PROFILE, options=options)
    assert os.listdir(output.parent) == []


@pytest.mark.skipif(not cuda_devices(), reason="this machine has no GPU")
def test_refittable_plans_build_on_a_gpu(sdk: Sdk, graph: Path, output: Path) -> None:
    """With a GPU they build."""
    build_plan(sdk, graph, output, PROFILE, options=BuildOptions(refittable=True))
    assert output.stat().st_size > 0


@pytest.mark.skipif(bool(cuda_devices()), reason="this machine has a GPU")
def test_built_plan_cannot_be_opened_here(sdk: Sdk, graph: Path, output: Path) -> None:
    """On this machine without a GPU the plan is built, and opening it says why it cannot be run."""
    build_plan(sdk, graph, output, PROFILE)
    engine = TensorRTEngine(output, engine=sdk.name, target=build_target(sdk, BuildOptions()))
    with pytest.raises(EngineUnavailableError, match="no CUDA device was found"):
        engine.open()
