"""LoRAs that are put on at run time: always on the bundle's own weights, and never under a request."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from latentrt.engines.errors import BundleError, EngineClosedError, InvalidRequestError, SourceError
from latentrt.exporter.adapters.lora import LoraFiles
from latentrt.exporter.adapters.registry import open_model
from latentrt.exporter.source.opening import open_source
from latentrt.runtime import Bundle, Pipeline, Result, StepInfo
from latentrt.runtime.cli import main
from latentrt.runtime.components.lora_weights import LAYERS_FILE, changed_weights, target_of
from latentrt.runtime.families import family_of
from latentrt.runtime.images.png import read_parameters
from latentrt.runtime.lora.reading import LoraFile, Loras, read_lora

FORM = "opset20-fp32"
OPTIONS: dict[str, Any] = {"steps": 2, "seed": 3, "width": 32, "height": 24, "sampler": "euler"}


@pytest.fixture(scope="module")
def files(tiny: Any, lora_files: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two LoRAs for U-Net and text encoder, in different layouts."""
    source, folder = open_source(tiny.source("sd1")), tmp_path_factory.mktemp("loras")
    return (
        lora_files.write(lora_files.peft(source), folder / "a.safetensors"),
        lora_files.write(lora_files.kohya(source, seed=2), folder / "b.safetensors"),
    )


@pytest.fixture(scope="module")
def bundle(tiny: Any) -> Path:
    """The tiny SD 1.x bundle, not to be changed."""
    return Path(tiny.bundle("sd1"))


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture
def pipe(bundle: Path) -> Iterator[Pipeline]:
    """The bundle opened, as it is."""
    with Pipeline.load(bundle, "onnxruntime") as opened:
        yield opened


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


def test_each_starts_from_the_bundles_own_weights(pipe: Pipeline, bundle: Path, files: tuple[Path, Path]) -> None:
    """A, then B, then both, then none: bit for bit the pictures of each alone, of U-Net and text encoder together."""
    a, b = files
    base = draw(pipe)
    seen = [base]
    for loras in ([(a, 0.8)], [(b, -0.5)], [(a, 0.8), (b, -0.5)]):
        pipe.set_loras(loras)
        seen.append(draw(pipe))
        np.testing.assert_array_equal(seen[-1], drawn_alone(bundle, loras))
        assert [(lora.path, lora.scale) for lora in pipe.loras] == [(str(path), scale) for path, scale in loras]
    pipe.set_loras([])
    np.testing.assert_array_equal(draw(pipe), base)
    assert len({pictures.tobytes() for pictures in seen}) == 4


@pytest.mark.parametrize("settings", [{"loop": "plain"}, {"low_memory": True}], ids=["plain", "low-memory"])
def test_every_way_to_run_takes_them(
    pipe: Pipeline, bundle: Path, files: tuple[Path, Path], settings: dict[str, Any]
) -> None:
    """The whole denoiser, and components in turns, draw the same as stages that stay open."""
    pipe.set_loras([(files[0], 0.8)])
    difference = np.abs(drawn_alone(bundle, [(files[0], 0.8)], **settings).astype(int) - draw(pipe))
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
    pipe: Pipeline, bundle: Path, files: tuple[Path, Path], matrices: tuple[Path, Path]
) -> None:
    """With exchangeable weights no session is opened anew, but for other convolutions, and pictures are as exact."""
    a, b = matrices
    with Pipeline.load(bundle, "onnxruntime", switchable=True) as switchable:
        base, engines = draw(switchable), dict(switchable.engines)
        np.testing.assert_array_equal(draw(pipe), base)
        for loras in ([(a, 0.8)], [(b, -0.5)], [(a, 0.8), (b, -0.5)], [(files[0], 0.8)], [(a, 0.8)]):
            switchable.set_loras(loras)
            opened = {name: getattr(each, "engine", each) for name, each in switchable.engines.items()}
            assert {name for name in opened if opened[name] is not engines[name]} == (
                {"unet_step"} if loras[0][0] == files[0] else set()
            )
            pictures = draw(switchable)
            np.testing.assert_array_equal(pictures, drawn_alone(bundle, loras, switchable=True))
            pipe.set_loras(loras)
            assert np.abs(draw(pipe).astype(int) - pictures).max() <= 1
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
def test_switching_that_is_not_there(bundle: Path, engine: str, options: dict[str, Any], message: str) -> None:
    """Where weights cannot stay exchangeable, that is said when the bundle is loaded."""
    with pytest.raises(InvalidRequestError, match=message):
        Pipeline.load(bundle, engine, switchable=True, **options)


def test_openvino_takes_them(pipe: Pipeline, bundle: Path, files: tuple[Path, Path]) -> None:
    """Compiled anew with other constants it draws what ONNX Runtime draws, and itself again without them."""
    pipe.set_loras([(files[0], 0.8)])
    with Pipeline.load(bundle, "openvino", engine_cache="off") as other:
        base = draw(other)
        other.set_loras([(files[0], 0.8)])
        assert np.abs(draw(other).astype(int) - draw(pipe)).max() <= 2
        other.set_loras([])
        np.testing.assert_array_equal(draw(other), base)


def test_weights_are_those_that_are_fused_at_build(tiny: Any, bundle: Path, files: tuple[Path, Path]) -> None:
    """To rounding, for linear layers, which a graph holds transposed, and convolutions; no other weight is changed."""
    opened = Bundle.open(bundle)
    loras = [LoraFile(files[0], 0.8), LoraFile(files[1], -0.5)]
    family = family_of(opened.manifest)
    graphs = {name: opened.graph(name, FORM) for name in ("text_encoder", "unet", "unet_prompt", "unet_step")}
    changed = changed_weights(opened, family, graphs, [read_lora(target_of(opened, family), each) for each in loras])
    fused = open_model(open_source(tiny.source("sd1")), [LoraFiles(tuple(loras))])
    before = open_source(tiny.source("sd1"))
    for part in ("text_encoder", "unet"):
        own, plain = fused.load(part).state_dict(), before.load(part).state_dict()
        expected = {name for name in own if not torch.equal(own[name], plain[name])}
        assert {name.removesuffix(".T").partition(".")[2] for name in changed[part]} == expected
        for name, values in changed[part].items():
            weight = own[name.removesuffix(".T").partition(".")[2]].numpy()
            np.testing.assert_allclose(values.T if name.endswith(".T") else values, weight, rtol=1e-5, atol=1e-6)
    stages = changed["unet_prompt"].keys() | changed["unet_step"].keys()
    assert stages | {n for n in changed["unet"] if "time_emb_proj" in n} == changed["unet"].keys()


def test_a_request_under_way_finishes_as_it_began(pipe: Pipeline, bundle: Path, files: tuple[Path, Path]) -> None:
    """Streams and runs keep their weights when others are put on; runs with different ones advance together."""
    loras = [[], [(files[0], 0.8)], [(files[1], 0.5)]]
    expected = [drawn_alone(bundle, each) for each in loras]
    stream = pipe.stream("a red apple", **OPTIONS)
    next(stream)
    runs = []
    for each in loras:
        pipe.set_loras(each)
        runs.append(pipe.start("a red apple", **OPTIONS))
        if len(runs) == 2:
            pipe.advance(runs[:1])
    np.testing.assert_array_equal(finish(stream).images, expected[0])
    while running := [run for run in runs if not run.done]:
        pipe.advance(running)
    for run, pictures in zip(runs, expected, strict=True):
        np.testing.assert_array_equal(pipe.finish(run), pictures)
    assert [len(run.request.loras) for run in runs] == [0, 1, 1]


def test_switching_while_others_draw(pipe: Pipeline, files: tuple[Path, Path]) -> None:
    """Whatever a thread draws meanwhile, it is the picture of the LoRAs that its result names."""
    expected = {(): draw(pipe).tobytes()}
    for file in files:
        pipe.set_loras([file])
        expected[tuple(lora.sha256 for lora in pipe.loras)] = draw(pipe).tobytes()
    wrong, stop = [], threading.Event()

    def work() -> None:
        while not stop.is_set():
            result = pipe("a red apple", **OPTIONS)
            if result.images.tobytes() != expected[tuple(lora.sha256 for lora in result.request.loras)]:
                wrong.append(result)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for loras in ([files[0]], [], [files[1]]):
        pipe.set_loras(loras)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_request_may_name_its_own(pipe: Pipeline, files: tuple[Path, Path]) -> None:
    """They are for that request alone; the next without any has those of the pipeline."""
    base = draw(pipe)
    own = pipe("a red apple", **OPTIONS, loras=[[str(files[0]), 0.8]])
    assert [lora.scale for lora in own.request.loras] == [0.8]
    np.testing.assert_array_equal(draw(pipe), base)
    assert pipe.loras == ()
    engine = pipe._runners.aside.engines["unet_step"] if pipe._runners.aside else None
    np.testing.assert_array_equal(draw(pipe, loras=[(files[0], 0.8)]), own.images)
    assert pipe._runners.aside is not None
    assert pipe._runners.aside.engines["unet_step"] is engine, "kept, not opened again"
    pipe.set_loras([(files[0], 0.8)])
    np.testing.assert_array_equal(draw(pipe), own.images)
    np.testing.assert_array_equal(draw(pipe, loras=[]), base)
    np.testing.assert_array_equal(draw(pipe, loras=[(files[1], 0)]), base)


def test_only_what_changes_is_opened_anew(tiny: Any, pipe: Pipeline, lora_files: Any, tmp_path: Path) -> None:
    """Engines of components that a LoRA leaves alone stay; closing closes those of earlier LoRAs too."""
    source = open_source(tiny.source("sd1"))
    unet = {name: tensor for name, tensor in lora_files.peft(source).items() if name.startswith("unet.")}
    before = dict(pipe.engines)
    pipe.set_loras([lora_files.write(unet, tmp_path / "unet.safetensors")])
    assert {name for name in before if pipe.engines[name] is not before[name]} == {"unet_prompt", "unet_step"} | (
        {"unet_schedule"} & before.keys()
    )
    stream = pipe.stream("a red apple", **OPTIONS)
    next(stream)
    pipe.set_loras([])
    pipe.close()
    with pytest.raises(EngineClosedError):
        next(stream)


KEY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def pair(down: int = 32, **others: Any) -> dict[str, Any]:
    return {f"{KEY}.lora_A.weight": torch.ones(2, down), f"{KEY}.lora_B.weight": torch.ones(32, 2), **others}


def test_a_file_that_does_not_fit_changes_nothing(
    pipe: Pipeline, files: tuple[Path, Path], lora_files: Any, tmp_path: Path
) -> None:
    """Wrong shapes, NaN, other kinds, a truncated file, a huge header: one sentence, and the LoRAs stay as they are."""
    pipe.set_loras([files[0]])
    before = draw(pipe)
    huge, cut = tmp_path / "huge.safetensors", tmp_path / "cut.safetensors"
    huge.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    cut.write_bytes(files[0].read_bytes()[:-8])
    wrong = {
        "wide": (pair(768), r"\[2, 768\] and \[32, 2\] .* as those of Stable Diffusion 1.x"),
        "nan": (pair(**{f"{KEY}.alpha": torch.tensor(torch.nan)}), "holds NaN"),
        "loha": (pair(**{f"{KEY}.hada_w1_a": torch.ones(2, 2)}), "has LoHa"),
        "lokr": (pair(**{f"{KEY}.lokr_w1": torch.ones(2, 2)}), "has LoKr"),
        "dora": (pair(**{f"{KEY}.lora_magnitude_vector": torch.ones(2)}), "has DoRA"),
        "large": (pair(**{f"{KEY}.alpha": torch.tensor(3e38)}), "the weights of unet.down.* are not finite"),
    }
    cases = [
        (lora_files.write(tensors, tmp_path / f"{name}.safetensors"), text) for name, (tensors, text) in wrong.items()
    ]
    cases += [(huge, "its header claims"), (cut, "is damaged"), (tmp_path / "none.safetensors", "does not exist")]
    for path, message in cases:
        with pytest.raises(SourceError, match=message) as caught:
            pipe.set_loras([(path, 100)])
        assert "\n" not in str(caught.value)
    for loras, message in (
        ("a.safetensors", "loras is a str, expected a list"),
        ([3], "loras has 3, expected a file"),
        ([(files[0], "much")], "expected a file, or"),
        ([(files[0], float("nan"))], "the scale of a.safetensors is nan"),
        ([files[0]] * 101, "101 entries"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            pipe.set_loras(loras)  # type: ignore[arg-type]
    np.testing.assert_array_equal(draw(pipe), before)


def test_half_precision_of_the_brain_kind(pipe: Pipeline, tiny: Any, lora_files: Any, tmp_path: Path) -> None:
    """A file in bf16, which numpy does not have, counts with the numbers that torch reads."""
    rounded = {name: t.bfloat16() for name, t in lora_files.peft(open_source(tiny.source("sd1"))).items()}
    half = lora_files.write(rounded, tmp_path / "half.safetensors")
    full = lora_files.write({name: t.float() for name, t in rounded.items()}, tmp_path / "full.safetensors")
    np.testing.assert_array_equal(draw(pipe, loras=[half]), draw(pipe, loras=[full]))


def test_bundles_that_take_none(copied: Path, files: tuple[Path, Path]) -> None:
    """One without a list of layers, one whose list is damaged, quantised layers, and engines that a caller opened."""
    with Pipeline.load(copied, "onnxruntime") as pipe:
        other = Pipeline(pipe.bundle, pipe.engines)
        with pytest.raises(InvalidRequestError, match=r"load the bundle with Pipeline\.load"):
            other.set_loras([files[0]])
    bundle = Bundle.open(copied)
    family = family_of(bundle.manifest)
    lora = read_lora(target_of(bundle, family), LoraFile(files[0]))
    small = dataclasses.replace(bundle.graph("unet_prompt", FORM), precision="int8")
    with pytest.raises(SourceError, match=r"which is quantised in this bundle; take a higher precision"):
        changed_weights(bundle, family, {"unet_step": small}, [lora])
    path, manifest = copied / LAYERS_FILE, json.loads((copied / "bundle.json").read_text())
    for content in ("[]", "{", '{"unet": {"a": [0]}}', '{"unet": [1]}', '{"unet": {"a": ["b"]}}'):
        path.write_text(content)
        manifest["files"][LAYERS_FILE]["size"] = len(content)
        (copied / "bundle.json").write_text(json.dumps(manifest))
        with pytest.raises(BundleError, match="is not a list of layers"):
            target_of(Bundle.open(copied), family)
    del manifest["files"][LAYERS_FILE]
    (copied / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(
        BundleError, match=r"does not say which layers it has, so no LoRA can be put on; build it again"
    ):
        Pipeline.load(copied, "onnxruntime", loras=[files[0]])


def test_layers_that_cannot_be_told_apart(copied: Path, files: tuple[Path, Path]) -> None:
    """Where weights of two layers are one constant of the graph, none is changed for one of them alone."""
    path = copied / LAYERS_FILE
    parts = json.loads(path.read_text())
    parts["unet"][KEY.removeprefix("unet.")] = None
    path.write_text(json.dumps(parts, separators=(",", ":")))
    manifest = json.loads((copied / "bundle.json").read_text())
    manifest["files"][LAYERS_FILE]["size"] = path.stat().st_size
    (copied / "bundle.json").write_text(json.dumps(manifest))
    bundle = Bundle.open(copied)
    with pytest.raises(SourceError, match=r"attn2.to_k, whose weights are equal to another layer's .* when the bundle"):
        read_lora(target_of(bundle, family_of(bundle.manifest)), LoraFile(files[0]))


def test_the_command_line_puts_them_on(
    pipe: Pipeline, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--lora FILE:SCALE`` draws what the pipeline draws, and the picture and the report say with what."""
    shutil.copyfile(files[0], tmp_path / "style.safetensors")
    options = [f"--{name}={value}" for name, value in OPTIONS.items()]
    loras = ["--lora", f"{tmp_path / 'style.safetensors'}:0.8", "--lora", str(files[1])]
    output = tmp_path / "o.png"
    asked = ["generate", str(pipe.bundle.path), "a red apple", f"--output={output}", "--engine=onnxruntime"]
    assert main([*asked, *options, *loras, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["request"]["loras"]
    assert [(Path(each["path"]).name, each["scale"]) for each in told] == [
        ("style.safetensors", 0.8),
        (files[1].name, 1),
    ]
    parameters = read_parameters(output)
    assert parameters is not None
    assert f"style.safetensors 0.8 {told[0]['sha256'][:12]}; b.safetensors 1 {told[1]['sha256'][:12]}" in parameters
    assert main([*asked, *options, "--lora", str(tmp_path / "none.safetensors")]) == 1
    assert "does not exist" in capsys.readouterr().err
