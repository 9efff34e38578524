"""Components that take turns in memory: the same pictures with no more than one of them open."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines.errors import EngineClosedError, EngineError, EngineUnavailableError
from latentrt.engines.onnxrt import OnnxRuntimeEngine
from latentrt.runtime import Pipeline
from latentrt.runtime.cli import main

OPTIONS: dict[str, Any] = {"steps": 2, "seed": 7, "images": 2, "guidance": 4.0, "negative_prompt": "a leaf"}


class Watch:
    """What is open of all engines of ONNX Runtime, and in which order they were opened."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.opened: list[str] = []
        self.most = 0
        self.fails_in = ""


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    first, close, run = OnnxRuntimeEngine._open, OnnxRuntimeEngine._close, OnnxRuntimeEngine._run

    def opened(self: OnnxRuntimeEngine) -> Any:
        result = first(self)
        watch.opened.append(self.label.split()[0])
        watch.open.append(self.label)
        watch.most = max(watch.most, len(watch.open))
        return result

    def closed(self: OnnxRuntimeEngine) -> None:
        watch.open.remove(self.label)
        close(self)

    def ran(self: OnnxRuntimeEngine, feeds: Any) -> Any:
        if self.label.split()[0] == watch.fails_in:
            raise EngineError("out of luck")
        return run(self, feeds)

    monkeypatch.setattr(OnnxRuntimeEngine, "_open", opened)
    monkeypatch.setattr(OnnxRuntimeEngine, "_close", closed)
    monkeypatch.setattr(OnnxRuntimeEngine, "_run", ran)
    return watch


@pytest.fixture
def pipe(tiny_bundles: dict[str, Path], watch: Watch) -> Iterator[Pipeline]:
    """SD 1.x, with its components in turns."""
    with Pipeline.load(tiny_bundles["sd1"], "onnxruntime", low_memory=True) as opened:
        assert watch.open == []
        watch.opened.clear()
        yield opened
    assert watch.open == []


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("loop", ["fused", "plain"])
def test_pictures_are_bit_for_bit_the_same(tiny: Any, watch: Watch, kind: str, loop: str) -> None:
    """Every family and both loops draw the same bits, with one component open at most, and none afterwards."""
    path = tiny.bundle(kind)
    with Pipeline.load(path, "onnxruntime", loop=loop) as usual:
        expected = [usual("a red apple", **OPTIONS), *usual.batch(["a rocket", "a cat"], **OPTIONS)]
    watch.most = 0
    with Pipeline.load(path, "onnxruntime", loop=loop, low_memory=True) as pipe:
        received = [pipe("a red apple", **OPTIONS), *pipe.batch(["a rocket", "a cat"], **OPTIONS)]
        assert (watch.open, watch.most) == ([], 1)
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_array_equal(one.latents, other.latents)
        np.testing.assert_array_equal(one.images, other.images)


def test_each_component_is_opened_once(pipe: Pipeline, watch: Watch) -> None:
    """A request opens each component once, whatever number of texts and steps; what is cached is not opened for."""
    pipe.batch(["a red apple", "a rocket"], **OPTIONS)
    assert watch.opened == ["text_encoder", "unet_prompt", "unet_schedule", "unet_step", "vae_decoder"]
    watch.opened.clear()
    pipe("a rocket", **OPTIONS)
    assert watch.opened == ["unet_schedule", "unet_step", "vae_decoder"]


@pytest.mark.parametrize("component", ["text_encoder", "unet_schedule", "unet_step", "vae_decoder"])
def test_an_error_leaves_nothing_open(pipe: Pipeline, watch: Watch, component: str) -> None:
    """Wherever a request fails, all is closed after it, and the next one is served."""
    watch.fails_in = component
    with pytest.raises(EngineError, match="out of luck"):
        pipe("a red apple", **OPTIONS)
    assert watch.open == []
    watch.fails_in = ""
    assert pipe("a red apple", **OPTIONS).images.shape == (2, 32, 32, 3)


def test_what_is_wrong_with_numbers_leaves_nothing_open(pipe: Pipeline, watch: Watch) -> None:
    """Values that are not finite fail outside of any engine; all is closed then, too."""
    with pytest.raises(EngineError, match="not finite"):
        pipe.decode(np.full((1, 4, 16, 16), np.nan, np.float32))
    assert watch.open == []


def test_a_stream_that_is_dropped_leaves_nothing_open(pipe: Pipeline, watch: Watch) -> None:
    """A cancelled request closes what it had open."""
    stream = pipe.stream("a red apple", **OPTIONS)
    next(stream)
    assert watch.open == ["unet_step (onnxruntime)"]
    stream.close()
    assert watch.open == []


def test_runs_in_turns(pipe: Pipeline, watch: Watch, tiny_bundles: dict[str, Path]) -> None:
    """Runs that are taken further by hand keep the step open between their steps, and finish closes everything."""
    run = pipe.start("a red apple", **OPTIONS)
    assert watch.open == []
    while not run.done:
        pipe.advance([run])
    assert watch.opened == ["text_encoder", "unet_prompt", "unet_schedule", "unet_step"]
    pictures = pipe.finish(run)
    assert watch.open == []
    with Pipeline.load(tiny_bundles["sd1"], "onnxruntime") as usual:
        np.testing.assert_array_equal(pictures, usual("a red apple", **OPTIONS).images)


def test_threads_wait_for_each_other(pipe: Pipeline, watch: Watch) -> None:
    """Requests from several threads get their own pictures, still with one component open at most."""
    expected = [pipe(f"a red apple {number}", steps=2, seed=number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        received = list(pool.map(lambda number: pipe(f"a red apple {number}", steps=2, seed=number), range(4)))
    assert watch.most == 1
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_array_equal(one.images, other.images)


def test_a_closed_pipeline_opens_nothing(pipe: Pipeline, watch: Watch) -> None:
    """After close a request is refused, and an engine does not open itself again."""
    pipe.close()
    with pytest.raises(EngineClosedError):
        pipe("a red apple")
    with pytest.raises(EngineClosedError):
        pipe.engines["vae_decoder"].run({"latent_sample": np.zeros((1, 4, 8, 8), np.float32)})
    assert watch.opened == []


def test_an_engine_that_does_not_start_is_found_when_loading(
    tiny_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One component is opened on trial, so that loading fails rather than the first request, and auto can go on."""

    def missing(self: OnnxRuntimeEngine) -> Any:
        raise EngineUnavailableError("ONNX Runtime is broken")

    monkeypatch.setattr(OnnxRuntimeEngine, "_open", missing)
    with pytest.raises(EngineUnavailableError, match="ONNX Runtime is broken"):
        Pipeline.load(tiny_bundles["sd1"], "onnxruntime", low_memory=True)
    with Pipeline.load(tiny_bundles["sd1"], low_memory=True) as pipe:
        assert pipe.engine_choice.name == "openvino"
        assert pipe.engine_choice.passed_over["onnxruntime"] == "ONNX Runtime is broken"
        assert pipe("a red apple", steps=1).images.shape == (1, 32, 32, 3)


def test_the_command_line(tiny_bundles: dict[str, Path], tmp_path: Path) -> None:
    """--low-memory writes the same file, byte for byte."""
    for name, option in (("o", []), ("p", ["--low-memory"])):
        command = ["generate", str(tiny_bundles["sd1"]), "a red apple", "--output", str(tmp_path / f"{name}.png")]
        assert main([*command, "--steps", "1", "--seed", "7", *option]) == 0
    assert (tmp_path / "o.png").read_bytes() == (tmp_path / "p.png").read_bytes()


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_peak_is_lower(emoji_bundle: Path) -> None:
    """The emoji model's peak in memory is lower by what its other components take."""
    code = (
        "import sys\n"
        "from latentrt.runtime import Pipeline\n"
        "with Pipeline.load(sys.argv[1], 'onnxruntime', threads=1, low_memory=bool(int(sys.argv[2]))) as pipe:\n"
        "    pipe('a red apple', steps=1, seed=7)\n"
        "(line,) = [line for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
        "print(line.split()[1])\n"
    )
    peaks = [
        int(subprocess.check_output([sys.executable, "-c", code, emoji_bundle, flag], env=os.environ))
        for flag in ("0", "1")
    ]
    print(f"peak of the emoji model: {peaks[0] / 1024:.0f} MiB, with low_memory {peaks[1] / 1024:.0f} MiB")
    assert peaks[1] < peaks[0] - 5 * 1024
