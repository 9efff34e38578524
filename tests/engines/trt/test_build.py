"""Builds with a make-believe SDK: what is asked of it, its failures, and ``progress``. No SDK is needed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentrt.engines.errors import (
    EngineError,
    EngineUnavailableError,
    InvalidRequestError,
    OutputError,
    TensorMismatchError,
)
from latentrt.engines.trt import BuildOptions, Profile, Sdk, ShapeRange, build, build_plan, build_target
from latentrt.engines.trt.progress import TOTAL

PROFILE = Profile({"x": ShapeRange((1, 4, 8, 8), (1, 4, 16, 16), (2, 4, 32, 32))})


def test_plan_is_written(fake: Sdk, graph: Path, output: Path) -> None:
    """A build parses the file itself, in a strongly typed network, with the profile, and writes the plan."""
    build_plan(fake, graph, output, PROFILE)
    assert output.read_bytes() == b"a plan"
    assert os.listdir(output.parent) == ["unet.plan"]
    assert fake.module.called("parse_from_file") == [(str(graph),)]
    bit = 0 if fake.name == "tensorrt-rtx" else 1
    assert fake.module.called("create_network") == [(1 << bit,)]
    assert fake.module.called("set_shape") == [("x", (1, 4, 8, 8), (1, 4, 16, 16), (2, 4, 32, 32))]
    assert len(fake.module.called("add_optimization_profile")) == 1


def test_sdk_without_the_strongly_typed_flag(fake: Sdk, graph: Path, output: Path) -> None:
    """An SDK that no longer has the flag gets a network without flags."""
    del fake.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    build_plan(fake, graph, output, PROFILE)
    assert fake.module.called("create_network") == [(0,)]


def test_defaults_switch_tf32_off(fake: Sdk, graph: Path, output: Path) -> None:
    """By default TF32 is cleared and nothing else is touched."""
    build_plan(fake, graph, output, PROFILE)
    assert fake.module.called("clear_flag") == [("TF32",)]
    assert [name for name, _ in fake.module.called("set")] == ["progress_monitor"]
    for name in ("set_flag", "set_memory_pool_limit", "set_compute_capability"):
        assert fake.module.called(name) == []


def test_options_reach_the_sdk(fake: Sdk, graph: Path, output: Path) -> None:
    """Options that both SDKs have are set on the builder's configuration."""
    options = BuildOptions(workspace_bytes=1 << 30, optimization_level=5, tf32=True)
    build_plan(fake, graph, output, PROFILE, options=options)
    assert fake.module.called("set_memory_pool_limit") == [("WORKSPACE", 1 << 30)]
    assert ("builder_optimization_level", 5) in fake.module.called("set")
    assert fake.module.called("set_flag") == [("TF32",)]


@pytest.mark.parametrize("fake", ["tensorrt-rtx"], indirect=True)
def test_compute_capabilities(fake: Sdk, graph: Path, output: Path) -> None:
    """TensorRT-RTX is told each architecture once, oldest first, whatever their order."""
    options = BuildOptions(compute_capabilities=("sm_120", "sm_89", "sm_120"))
    assert build_target(fake, options) == "sm_89,sm_120"
    build_plan(fake, graph, output, PROFILE, options=options)
    assert ("num_compute_capabilities", 2) in fake.module.called("set")
    assert fake.module.called("set_compute_capability") == [("SM89", 0), ("SM120", 1)]
    with pytest.raises(InvalidRequestError, match="cannot build for sm_90; expected some of sm_75, sm_89, sm_120"):
        build_plan(fake, graph, output, PROFILE, options=BuildOptions(compute_capabilities=("sm_90",)))


@pytest.mark.parametrize("fake", ["tensorrt"], indirect=True)
def test_compatibility(fake: Sdk, graph: Path, output: Path) -> None:
    """TensorRT is told to build for other architectures and later versions."""
    options = BuildOptions(hardware_compatible=True, version_compatible=True)
    assert build_target(fake, options) == "sm_80+"
    build_plan(fake, graph, output, PROFILE, options=options)
    assert ("hardware_compatibility_level", "AMPERE_PLUS") in fake.module.called("set")
    assert fake.module.called("set_flag") == [("VERSION_COMPATIBLE",)]


def test_options_of_the_other_sdk_are_refused(fake: Sdk, graph: Path, output: Path) -> None:
    """An option that this SDK does not have is refused, never passed over."""
    other = {
        "tensorrt": [BuildOptions(compute_capabilities=("sm_89",))],
        "tensorrt-rtx": [BuildOptions(hardware_compatible=True), BuildOptions(version_compatible=True)],
    }
    for options in other[fake.name]:
        with pytest.raises(InvalidRequestError, match="leave"):
            build_plan(fake, graph, output, PROFILE, options=options)
    assert fake.module.calls == []


@pytest.mark.parametrize(
    "options",
    [
        {"workspace_bytes": 0},
        {"optimization_level": 6},
        {"optimization_level": -1},
        {"compute_capabilities": ("8.9",)},
        {"compute_capabilities": ("current",)},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    """Options out of range are refused when they are made."""
    with pytest.raises(InvalidRequestError, match="expected"):
        BuildOptions(**options)


def test_target_and_missing_gpu(fake: Sdk, graph: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT builds for the GPU that is here and says so where there is none; TensorRT-RTX needs none."""
    expected = {"tensorrt": "sm_90", "tensorrt-rtx": "sm_80+"}
    assert build_target(fake, BuildOptions()) == expected[fake.name]
    monkeypatch.setattr(build, "cuda_devices", lambda: ())
    if fake.name == "tensorrt-rtx":
        build_plan(fake, graph, output, PROFILE)
        assert output.exists()
    else:
        with pytest.raises(EngineUnavailableError, match="no CUDA device was found; build on a machine with"):
            build_plan(fake, graph, output, PROFILE)
        assert not output.exists()


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({}, r"'x' has the dynamic shape \(-1, 4, -1, -1\), and the profile has no entry"),
        ({"y": ShapeRange((1,), (1,), (1,))}, "names an input 'y', the graph has x, fixed"),
        ({"x": ShapeRange((1, 4), (1, 4), (1, 4))}, "change the profile"),
        ({"x": ShapeRange((1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8))}, "change the profile"),
        ({"x": ShapeRange((1, 4, 8, 8), (1, 4, 8, 8), (1, 5, 8, 8))}, "change the profile"),
    ],
    ids=["missing", "unknown", "rank", "static", "static range"],
)
def test_profile_must_fit_the_graph(
    fake: Sdk, graph: Path, output: Path, profile: dict[str, ShapeRange], message: str
) -> None:
    """A profile that does not fit the graph's inputs is refused before the build starts."""
    fake.module.build = lambda network, config: pytest.fail("the build was started")
    with pytest.raises(TensorMismatchError, match=message):
        build_plan(fake, graph, output, Profile(profile))


def test_refused_profile(fake: Sdk, graph: Path, output: Path) -> None:
    """A profile that the SDK refuses is an error, not a build without it."""
    fake.module.answers["add_optimization_profile"] = -1
    with pytest.raises(EngineError, match="refused the optimisation profile"):
        build_plan(fake, graph, output, PROFILE)


def _parser_error(node: int, name: str, operator: str, reason: str) -> SimpleNamespace:
    return SimpleNamespace(
        node=lambda: node, node_name=lambda: name, node_operator=lambda: operator, desc=lambda: reason
    )


def test_parser_errors_name_the_node(fake: Sdk, graph: Path, output: Path) -> None:
    """What the parser cannot use is named: node, operator, reason, and how many more there are."""
    fake.module.parser_errors = [_parser_error(7, "conv_1", "Conv", "bad\n pads"), _parser_error(8, "", "Relu", "bad")]
    with pytest.raises(EngineError, match=r"cannot use graph.onnx: node 'conv_1' \(Conv\): bad pads \(and 1 more\)$"):
        build_plan(fake, graph, output, PROFILE)
    fake.module.parser_errors = [_parser_error(8, "", "Relu", "bad")]
    with pytest.raises(EngineError, match=r"node 8 \(Relu\): bad$"):
        build_plan(fake, graph, output, PROFILE)
    fake.module.parser_errors = [_parser_error(-1, "", "", "no model")]
    with pytest.raises(EngineError, match=r"graph.onnx: no model$"):
        build_plan(fake, graph, output, PROFILE)


def test_missing_graph(fake: Sdk, tmp_path: Path, output: Path) -> None:
    """A graph that is not there is named."""
    with pytest.raises(EngineError, match=r"no ONNX file at .*absent\.onnx"):
        build_plan(fake, tmp_path / "absent.onnx", output, PROFILE)


def test_failed_build_keeps_the_old_plan(fake: Sdk, graph: Path, output: Path) -> None:
    """A build that fails tells the SDK's reason, and leaves an older plan as it was."""
    output.write_bytes(b"old")

    def fail(network: Any, config: Any) -> None:
        fake.module.logger.log(fake.module.ILogger.Severity.ERROR, "no tactics within the workspace limit")

    fake.module.build = fail
    with pytest.raises(EngineError, match=r"failed to build a plan of graph.onnx: no tactics within the workspace"):
        build_plan(fake, graph, output, PROFILE)
    assert output.read_bytes() == b"old"
    assert os.listdir(output.parent) == ["unet.plan"]


def test_unwritable_output(fake: Sdk, graph: Path, tmp_path: Path) -> None:
    """A directory that does not exist is named."""
    with pytest.raises(OutputError, match="cannot write the plan"):
        build_plan(fake, graph, tmp_path / "absent" / "unet.plan", PROFILE)


def _phases(config: Any) -> list[bool]:
    """Two nested phases, as an SDK reports them; returns what its steps were answered."""
    monitor = config.progress_monitor
    monitor.phase_start("Building", None, 2)
    answers = [monitor.step_complete("Building", 0)]
    monitor.phase_start("Timing", "Building", 4)
    answers += [monitor.step_complete("Timing", step) for step in range(4)]
    monitor.phase_finish("Timing")
    answers.append(monitor.step_complete("Building", 1))
    monitor.phase_finish("Building")
    return answers


def test_progress_of_nested_phases_is_one_number(fake: Sdk, graph: Path, output: Path) -> None:
    """Steps of an inner phase count as parts of a step of the outer one, and the number never decreases."""
    reports: list[tuple[str, int, int]] = []
    fake.module.build = lambda network, config: (_phases(config), b"a plan")[1]
    build_plan(fake, graph, output, PROFILE, on_progress=lambda *report: reports.append(report))
    assert {total for _, _, total in reports} == {TOTAL}
    assert [done for _, done, _ in reports] == sorted(done for _, done, _ in reports)
    timing = [done for phase, done, _ in reports if phase == "Timing"]
    assert timing[:5] == [500, 625, 750, 875, 999]
    assert reports[0] == ("Parsing the graph", 0, TOTAL)
    assert reports[-1] == ("Done", TOTAL, TOTAL)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError("in the callback")], ids=["ctrl-c", "error"])
def test_exception_in_the_callback_stops_the_build(fake: Sdk, graph: Path, output: Path, error: BaseException) -> None:
    """What the callback raises never enters the SDK: the build is stopped, then it is raised, and nothing is left."""
    answers: list[bool] = []

    def stopped(network: Any, config: Any) -> None:
        answers.extend(_phases(config))
        fake.module.logger.log(fake.module.ILogger.Severity.ERROR, "build cancelled")

    def on_progress(phase: str, done: int, total: int) -> None:
        if phase == "Timing" and done > 600:
            raise error

    fake.module.build = stopped
    with pytest.raises(type(error)) as caught:
        build_plan(fake, graph, output, PROFILE, on_progress=on_progress)
    assert caught.value is error
    assert answers == [True, False, False, False, False, False]
    assert os.listdir(output.parent) == []


@pytest.fixture
def python_handles_interrupts() -> Iterator[None]:
    """Python's own handler of SIGINT, which a process that was started in the background lacks."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_interrupts")
def test_interrupt_stops_the_build(fake: Sdk, graph: Path, output: Path) -> None:
    """SIGINT during a build stops it at the next step and then raises; the handler before it is restored."""
    answers: list[bool] = []

    def interrupted(network: Any, config: Any) -> bytes:
        signal.raise_signal(signal.SIGINT)
        answers.extend(_phases(config))
        return b"a plan all the same"

    fake.module.build = interrupted
    with pytest.raises(KeyboardInterrupt):
        build_plan(fake, graph, output, PROFILE)
    assert answers == [False] * 6
    assert os.listdir(output.parent) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_own_interrupt_handlers_stay(fake: Sdk, graph: Path, output: Path) -> None:
    """An application's own handler of SIGINT is left in place."""
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        fake.module.build = lambda network, config: (signal.raise_signal(signal.SIGINT), b"a plan")[1]
        build_plan(fake, graph, output, PROFILE)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]
    assert output.read_bytes() == b"a plan"


@pytest.mark.parametrize("fake", ["tensorrt-rtx"], indirect=True)
def test_refittable_without_a_gpu(fake: Sdk, graph: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX, which needs no GPU otherwise, needs one for that, and it is said before the build."""
    monkeypatch.setattr(build, "cuda_devices", lambda: ())
    with pytest.raises(
        EngineUnavailableError, match=r"refittable plans only where there is a GPU, .* leave refittable"
    ):
        build_plan(fake, graph, output, PROFILE, options=BuildOptions(refittable=True))
    assert fake.module.calls == []
