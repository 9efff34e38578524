"""Files of timings and of compiled kernels: read, written, damaged, of another machine. The GPU is make-believe."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentrt.engines.errors import EngineError
from latentrt.engines.trt import BuildOptions, Profile, Sdk, SessionOptions, ShapeRange, build_plan
from latentrt.engines.trt.caches import read_cache, write_cache

PROFILE = Profile({"x": ShapeRange((1, 4, 8, 8), (1, 4, 16, 16), (2, 4, 32, 32))})
RTX = pytest.mark.parametrize("fake", ["tensorrt-rtx"], indirect=True)
TENSORRT = pytest.mark.parametrize("fake", ["tensorrt"], indirect=True)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# --- the files


def test_a_cache_is_read_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is written is read back, alone in its directory; no file is no warning."""
    path = tmp_path / "c.cache"
    assert read_cache(path, "cache") == b""
    for body in (b"", b"kernels", bytes(100_000)):
        write_cache(path, body, "cache")
        assert read_cache(path, "cache") == body
    assert os.listdir(tmp_path) == ["c.cache"]
    assert warnings(caplog) == []


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: c[:20], lambda c: b"", lambda c: c[:-1] + b"?"])
def test_a_damaged_cache_is_named(tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A file that is cut short or changed counts as none, with a warning that names it."""
    path = tmp_path / "c.cache"
    write_cache(path, b"kernels", "runtime cache")
    path.write_bytes(damage(path.read_bytes()))
    assert read_cache(path, "runtime cache") == b""
    assert warnings(caplog) == [f"the runtime cache {path} is damaged and is made anew"]


def test_a_cache_that_cannot_be_reached(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Reading and writing go on without the file, with a warning each."""
    (tmp_path / "c.cache").mkdir()
    assert read_cache(tmp_path / "c.cache", "cache") == b""
    write_cache(tmp_path / "absent" / "c.cache", b"kernels", "cache")
    read, written = warnings(caplog)
    assert "cannot be read" in read
    assert "cannot be written: No such file" in written


# --- kernels that TensorRT-RTX compiled


def open_and_run(gpu: Any, plan: Path, columns: int = 8, **options: Any) -> int:
    """How many kernels were compiled."""
    gpu.module.compiled.clear()
    with gpu.engine(plan, options=SessionOptions(**options)) as engine:
        engine.run(gpu.feeds(2, columns))
    return len(gpu.module.compiled)


@RTX
def test_kernels_are_compiled_once(gpu: Any) -> None:
    """The second start finds the kernels of the first beside the plan; new shapes are added."""
    plan = gpu.plan()
    assert open_and_run(gpu, plan) == 1
    assert sorted(os.listdir(gpu.directory)) == ["unet.plan", "unet.plan.sm_90.cache"]
    assert open_and_run(gpu, plan) == 0
    assert open_and_run(gpu, plan, columns=16) == 1
    assert open_and_run(gpu, plan) == open_and_run(gpu, plan, columns=16) == 0


@RTX
def test_kernels_are_saved_while_it_runs(gpu: Any) -> None:
    """A service that is killed has its kernels saved: they are written after the first run with new shapes."""
    plan = gpu.plan()
    file = plan.with_name("unet.plan.sm_90.cache")
    with gpu.engine(plan) as engine:
        assert not file.exists()
        engine.run(gpu.feeds())
        first = file.read_bytes()
        stamp = file.stat().st_mtime_ns
        engine.run(gpu.feeds())
        assert file.stat().st_mtime_ns == stamp
        engine.run(gpu.feeds(2, 16))
        assert file.read_bytes() != first


@RTX
def test_a_damaged_runtime_cache(gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It is named in a warning, made anew, and sound from then on."""
    plan = gpu.plan()
    open_and_run(gpu, plan)
    file = plan.with_name("unet.plan.sm_90.cache")
    file.write_bytes(file.read_bytes()[:-3])
    assert open_and_run(gpu, plan) == 1
    assert warnings(caplog) == [f"the runtime cache {file} is damaged and is made anew"]
    assert open_and_run(gpu, plan) == 0


@RTX
def test_a_runtime_cache_of_another_driver(gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What the SDK does not take is named in a warning and made anew."""
    plan = gpu.plan()
    file = plan.with_name("unet.plan.sm_90.cache")
    write_cache(file, b"of another driver", "runtime cache")
    assert open_and_run(gpu, plan) == 1
    assert warnings(caplog) == [f"the runtime cache {file} is of another GPU, driver or version and is made anew"]
    assert open_and_run(gpu, plan) == 0


@RTX
def test_a_runtime_cache_that_cannot_be_saved(gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Runs do not fail for it: a warning says what happened."""
    gpu.module.failures["serialize"] = "no memory"
    assert open_and_run(gpu, gpu.plan()) == 1
    assert all("save the runtime cache of unet.plan" in warning for warning in warnings(caplog))
    assert warnings(caplog)


@RTX
def test_without_a_runtime_cache(gpu: Any) -> None:
    """Switched off, nothing is written."""
    plan = gpu.plan()
    assert open_and_run(gpu, plan, runtime_cache=False) == open_and_run(gpu, plan, runtime_cache=False) == 1
    assert os.listdir(gpu.directory) == ["unet.plan"]


@RTX
def test_kernels_are_specialised_at_once(gpu: Any) -> None:
    """No kernel is exchanged for another behind the back of a request, or of a captured graph."""
    with gpu.engine() as engine:
        config = engine._opened_plan()._config
        strategy = gpu.module.DynamicShapesKernelSpecializationStrategy
        assert config.dynamic_shapes_kernel_specialization_strategy == strategy.EAGER


@RTX
def test_a_cache_that_the_sdk_refuses(gpu: Any) -> None:
    """It is an error of opening."""
    gpu.module.failures["set_runtime_cache"] = "no"
    with pytest.raises(EngineError, match=r"refused a runtime cache for unet.plan"):
        gpu.engine().open()


@TENSORRT
def test_tensorrt_compiles_nothing_at_run_time(gpu: Any) -> None:
    """There is no runtime cache, and no file of one."""
    open_and_run(gpu, gpu.plan())
    assert os.listdir(gpu.directory) == ["unet.plan"]


# --- timings of TensorRT's builds


def timings(fake: Sdk, known: bytes = b"of this GPU") -> list[bytes]:
    """Let the make-believe SDK keep timings. Returns a list of what each build was given."""
    given: list[bytes] = []

    def create(blob: bytes) -> Any:
        given.append(bytes(blob))
        return SimpleNamespace(blob=bytes(blob), serialize=lambda: memoryview(known + b" and more"))

    fake.module.answers["create_timing_cache"] = create
    fake.module.answers["set_timing_cache"] = lambda cache, ignore: not cache.blob or cache.blob.startswith(known)
    return given


@TENSORRT
def test_timings_are_kept(fake: Sdk, graph: Path, tmp_path: Path) -> None:
    """The second build is given the timings of the first, and a mismatch is never ignored."""
    given, file = timings(fake), tmp_path / "timings"
    for _ in range(2):
        build_plan(fake, graph, tmp_path / "unet.plan", PROFILE, timing_cache=file)
    assert given == [b"", b"of this GPU and more"]
    assert [ignore for _, ignore in fake.module.called("set_timing_cache")] == [False, False]


@TENSORRT
@pytest.mark.parametrize("damaged", [True, False])
def test_timings_that_are_no_use(
    fake: Sdk, graph: Path, tmp_path: Path, damaged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Damaged ones, and those of another GPU, are named in a warning and made anew."""
    given, file = timings(fake), tmp_path / "timings"
    write_cache(file, b"of another GPU", "timing cache")
    if damaged:
        file.write_bytes(file.read_bytes()[:-1])
    build_plan(fake, graph, tmp_path / "unet.plan", PROFILE, timing_cache=file)
    reason = "damaged" if damaged else "of another GPU or version"
    assert warnings(caplog) == [f"the timing cache {file} is {reason} and is made anew"]
    assert given[-1] == b""
    assert read_cache(file, "timing cache") == b"of this GPU and more"


@TENSORRT
def test_timings_that_are_refused_empty(fake: Sdk, graph: Path, tmp_path: Path) -> None:
    """An SDK that takes no timing cache at all is an error."""
    timings(fake)
    fake.module.answers["set_timing_cache"] = False
    with pytest.raises(EngineError, match="refused an empty timing cache"):
        build_plan(fake, graph, tmp_path / "unet.plan", PROFILE, timing_cache=tmp_path / "timings")


@RTX
def test_tensorrt_rtx_times_nothing(fake: Sdk, graph: Path, tmp_path: Path) -> None:
    """It is given no timings, and no file is made."""
    build_plan(fake, graph, tmp_path / "unet.plan", PROFILE, timing_cache=tmp_path / "timings")
    assert fake.module.called("create_timing_cache") == []
    assert not (tmp_path / "timings").exists()


# --- options of builds that sessions need


def test_options_for_sessions(fake: Sdk, graph: Path, tmp_path: Path) -> None:
    """Refitting and weight streaming are flags of the build, and part of the key."""
    options = BuildOptions(refittable=True, weight_streaming=True)
    build_plan(fake, graph, tmp_path / "unet.plan", PROFILE, options=options)
    assert fake.module.called("set_flag") == [("REFIT",), ("WEIGHT_STREAMING",)]
    assert options.as_flags() == BuildOptions().as_flags() | {"refittable": True, "weight_streaming": True}
