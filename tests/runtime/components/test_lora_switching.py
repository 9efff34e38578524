"""LoRAs that are switched at run time: always on the bundle's own weights, and never under a request."""

from __future__ import annotations

import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.engines.errors import EngineClosedError, InvalidRequestError
from latentrt.exporter.source.opening import open_source
from latentrt.runtime import Pipeline, Result, StepInfo
from latentrt.runtime.components import lora_switching
from latentrt.runtime.lora.reading import Loras

FORM = "opset20-fp32"


OPTIONS: dict[str, Any] = {"steps": 2, "seed": 3, "width": 32, "height": 24, "sampler": "euler"}


def draw(pipe: Pipeline, **options: Any) -> NDArray[np.uint8]:
    return pipe("a red apple", **{**OPTIONS, **options}).images


def drawn_alone(bundle: Path, loras: Loras, **settings: Any) -> NDArray[np.uint8]:
    with Pipeline.load(bundle, "onnxruntime", loras=loras, **settings) as pipe:
        return draw(pipe)


def finish(stream: Generator[StepInfo, None, Result]) -> Result:
    """What a stream returns at its end."""
    while True:
        try:
            next(stream)
        except StopIteration as stop:
            result: Result = stop.value
            return result


def test_each_starts_from_the_bundles_own_weights(fresh: Pipeline, sd1: Path, lora_pair: tuple[Path, Path]) -> None:
    """A, then B, then both, then none: bit for bit the pictures of each alone, of U-Net and text encoder together."""
    a, b = lora_pair
    base = draw(fresh)
    seen = [base]
    for loras in ([(a, 0.8)], [(b, -0.5)], [(a, 0.8), (b, -0.5)]):
        fresh.set_loras(loras)
        seen.append(draw(fresh))
        np.testing.assert_array_equal(seen[-1], drawn_alone(sd1, loras))
        assert [(lora.path, lora.scale) for lora in fresh.loras] == [(str(path), scale) for path, scale in loras]
    fresh.set_loras([])
    np.testing.assert_array_equal(draw(fresh), base)
    assert len({pictures.tobytes() for pictures in seen}) == 4


@pytest.mark.parametrize("settings", [{"loop": "plain"}, {"low_memory": True}], ids=["plain", "low-memory"])
def test_every_way_to_run_takes_them(
    fresh: Pipeline, sd1: Path, lora_pair: tuple[Path, Path], settings: dict[str, Any]
) -> None:
    """The whole denoiser, and components in turns, draw the same as stages that stay open."""
    fresh.set_loras([(lora_pair[0], 0.8)])
    difference = np.abs(drawn_alone(sd1, [(lora_pair[0], 0.8)], **settings).astype(int) - draw(fresh))
    assert difference.max() <= (0 if "low_memory" in settings else 1)


@pytest.fixture(scope="module")
def matrices(tiny: Any, lora_files: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two LoRAs that change linear layers and convolutions of one by one alone."""
    source, folder = open_source(tiny.source("sd1")), tmp_path_factory.mktemp("matrices")
    found = []
    for name, tensors in (("a", lora_files.peft(source)), ("b", lora_files.kohya(source, seed=2))):
        small = {key: value for key, value in tensors.items() if "conv1" not in key}
        found.append(lora_files.write(small, folder / f"{name}.safetensors"))
    return found[0], found[1]


def test_switching_without_opening(
    fresh: Pipeline, sd1: Path, lora_pair: tuple[Path, Path], matrices: tuple[Path, Path]
) -> None:
    """With exchangeable weights no session is opened anew, but for other convolutions, and pictures are as exact."""
    a, b = matrices
    with Pipeline.load(sd1, "onnxruntime", switchable=True) as switchable:
        base, engines = draw(switchable), dict(switchable.engines)
        np.testing.assert_array_equal(draw(fresh), base)
        for loras in ([(a, 0.8)], [(b, -0.5)], [(a, 0.8), (b, -0.5)], [(lora_pair[0], 0.8)], [(a, 0.8)]):
            switchable.set_loras(loras)
            opened = {name: getattr(each, "engine", each) for name, each in switchable.engines.items()}
            assert {name for name in opened if opened[name] is not engines[name]} == (
                {"unet_step"} if loras[0][0] == lora_pair[0] else set()
            )
            pictures = draw(switchable)
            np.testing.assert_array_equal(pictures, drawn_alone(sd1, loras, switchable=True))
            fresh.set_loras(loras)
            assert np.abs(draw(fresh).astype(int) - pictures).max() <= 1
            assert not np.array_equal(pictures, base)
            np.testing.assert_array_equal(draw(switchable, loras=[]), base)
        runs = [switchable.start("a red apple", **OPTIONS, loras=each) for each in ([], [(b, -0.5)], [(a, 0.8)])]
        for loras in ([(b, 1.0)], [(b, 0.5)], []):  # whose weights may take the place of those that nobody uses
            switchable.set_loras(loras)
        while running := [run for run in runs if not run.done]:
            switchable.advance(running)
        np.testing.assert_array_equal(switchable.finish(runs[0]), base)
        np.testing.assert_array_equal(switchable.finish(runs[2]), pictures)
        np.testing.assert_array_equal(draw(switchable), base)


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        ("onnxruntime", {"low_memory": True}, "switchable keeps engines open, and low_memory closes them; give one"),
        ("openvino", {}, "switchable is for onnxruntime on a CPU, and the engine is openvino"),
    ],
)
def test_switching_that_is_not_there(sd1: Path, engine: str, options: dict[str, Any], message: str) -> None:
    """Where weights cannot stay exchangeable, that is said when the bundle is loaded."""
    with pytest.raises(InvalidRequestError, match=message):
        Pipeline.load(sd1, engine, switchable=True, **options)


def test_openvino_takes_them(fresh: Pipeline, sd1: Path, lora_pair: tuple[Path, Path]) -> None:
    """Compiled anew with other constants it draws what ONNX Runtime draws, and itself again without them."""
    fresh.set_loras([(lora_pair[0], 0.8)])
    with Pipeline.load(sd1, "openvino", engine_cache="off") as other:
        base = draw(other)
        other.set_loras([(lora_pair[0], 0.8)])
        assert np.abs(draw(other).astype(int) - draw(fresh)).max() <= 2
        other.set_loras([])
        np.testing.assert_array_equal(draw(other), base)


def test_a_request_under_way_finishes_as_it_began(fresh: Pipeline, sd1: Path, lora_pair: tuple[Path, Path]) -> None:
    """Streams and runs keep their weights when others are put on; runs with different ones advance together."""
    loras = [[], [(lora_pair[0], 0.8)], [(lora_pair[1], 0.5)]]
    expected = [drawn_alone(sd1, each) for each in loras]
    stream = fresh.stream("a red apple", **OPTIONS)
    next(stream)
    runs = []
    for each in loras:
        fresh.set_loras(each)
        runs.append(fresh.start("a red apple", **OPTIONS))
        if len(runs) == 2:
            fresh.advance(runs[:1])
    np.testing.assert_array_equal(finish(stream).images, expected[0])
    while running := [run for run in runs if not run.done]:
        fresh.advance(running)
    for run, pictures in zip(runs, expected, strict=True):
        np.testing.assert_array_equal(fresh.finish(run), pictures)
    assert [len(run.request.loras) for run in runs] == [0, 1, 1]


def test_switching_while_others_draw(fresh: Pipeline, lora_pair: tuple[Path, Path]) -> None:
    """Whatever a thread draws meanwhile, it is the picture of the LoRAs that its result names."""
    expected = {(): draw(fresh).tobytes()}
    for file in lora_pair:
        fresh.set_loras([file])
        expected[tuple(lora.sha256 for lora in fresh.loras)] = draw(fresh).tobytes()
    wrong, stop = [], threading.Event()

    def work() -> None:
        while not stop.is_set():
            result = fresh("a red apple", **OPTIONS)
            if result.images.tobytes() != expected[tuple(lora.sha256 for lora in result.request.loras)]:
                wrong.append(result)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for loras in ([lora_pair[0]], [], [lora_pair[1]]):
        fresh.set_loras(loras)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_request_may_name_its_own(fresh: Pipeline, lora_pair: tuple[Path, Path]) -> None:
    """They are for that request alone; the next without any has those of the pipeline."""
    base = draw(fresh)
    own = fresh("a red apple", **OPTIONS, loras=[[str(lora_pair[0]), 0.8]])
    assert [lora.scale for lora in own.request.loras] == [0.8]
    np.testing.assert_array_equal(draw(fresh), base)
    assert fresh.loras == ()
    engine = fresh._runners.aside.engines["unet_step"] if fresh._runners.aside else None
    np.testing.assert_array_equal(draw(fresh, loras=[(lora_pair[0], 0.8)]), own.images)
    assert fresh._runners.aside is not None
    assert fresh._runners.aside.engines["unet_step"] is engine, "kept, not opened again"
    fresh.set_loras([(lora_pair[0], 0.8)])
    np.testing.assert_array_equal(draw(fresh), own.images)
    np.testing.assert_array_equal(draw(fresh, loras=[]), base)
    np.testing.assert_array_equal(draw(fresh, loras=[(lora_pair[1], 0)]), base)


def test_only_what_changes_is_opened_anew(tiny: Any, fresh: Pipeline, lora_files: Any, tmp_path: Path) -> None:
    """Engines of components that a LoRA leaves alone stay; closing closes those of earlier LoRAs too."""
    source = open_source(tiny.source("sd1"))
    unet = {name: tensor for name, tensor in lora_files.peft(source).items() if name.startswith("unet.")}
    before = dict(fresh.engines)
    fresh.set_loras([lora_files.write(unet, tmp_path / "unet.safetensors")])
    assert {name for name in before if fresh.engines[name] is not before[name]} == {"unet_prompt", "unet_step"} | (
        {"unet_schedule"} & before.keys()
    )
    stream = fresh.stream("a red apple", **OPTIONS)
    next(stream)
    fresh.set_loras([])
    fresh.close()
    with pytest.raises(EngineClosedError):
        next(stream)


def test_engines_that_open_while_a_pipeline_closes_are_closed(
    fresh: Pipeline, lora_pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever puts a LoRA on meanwhile is told, and nothing stays open."""
    opened: list[Any] = []
    open_engines = lora_switching.open_engines

    def closing(*arguments: Any, **options: Any) -> Any:
        engines = open_engines(*arguments, **options)
        opened.extend(engines.values())
        fresh.close()
        return engines

    monkeypatch.setattr(lora_switching, "open_engines", closing)
    with pytest.raises(EngineClosedError, match="the pipeline is closed"):
        fresh.set_loras([lora_pair[0]])
    assert opened
    for engine in opened:
        with pytest.raises(EngineClosedError):
            _ = engine.inputs
