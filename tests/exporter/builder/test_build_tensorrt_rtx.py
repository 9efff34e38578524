"""Bundles get ``plans`` of TensorRT-RTX, built from a whole (tiny) model; no GPU is needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from latentrt.engines.errors import EngineUnavailableError
from latentrt.engines.records import EngineRecord
from latentrt.engines.store import EngineStore
from latentrt.engines.trt import Range
from latentrt.engines.trt.cuda import cuda_devices
from latentrt.exporter.builder.build import BuildReport, build_bundle
from latentrt.exporter.builder.construction import Construction
from latentrt.exporter.builder.request import BuildRequest
from latentrt.exporter.families.stable_diffusion import StableDiffusion
from latentrt.exporter.progress import Silent
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.cli import main
from latentrt.runtime.pipeline import Pipeline

pytestmark = pytest.mark.heavy
COMPONENTS = tuple(part for name in StableDiffusion.components for part in StableDiffusion().with_stages(name))
COMPILED = tuple(name for name in COMPONENTS if name != "unet")  # its stages are
trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is an optional extra")


@pytest.fixture(scope="module")
def built(
    tiny_sources: dict[str, Path], tiny_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny SD 1.x bundle with fp16 plans for TensorRT-RTX added by the command line."""
    bundle = tmp_path_factory.mktemp("rtx") / "bundle"
    shutil.copytree(tiny_bundles["sd1"], bundle)
    command = ["build-engine", str(tiny_sources["sd1"]), "--output", str(bundle)]
    assert main([*command, "--engine", "tensorrt-rtx", "--precision", "fp16"]) == 0
    return bundle


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy of :func:`built` that a test may change."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def plans(directory: Path) -> dict[Path, tuple[int, int]]:
    """Inode and time of change of everything under ``engines/``."""
    files = (directory / "engines").rglob("*")
    return {path.relative_to(directory): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def rebuild(source: Path, bundle: Path, precision: str = "fp16", **ranges: Range) -> BuildReport:
    request = BuildRequest(source, bundle, ("tensorrt-rtx",), precision, ranges, verify=False)
    return build_bundle(request)


def records(bundle: Path) -> list[EngineRecord]:
    return EngineStore(bundle / "engines").records(verify_hash=True)


def test_plans_and_records(built: Path) -> None:
    """Every component has a plan that the SDK recognises as its own, and a record of what it was built for."""
    found = {record.component: record for record in records(built)}
    assert set(found) == set(COMPILED)
    for record in found.values():
        assert (record.engine, record.precision, record.target) == ("tensorrt-rtx", "fp16", "sm_80+")
        assert record.sdk_version == trt.__version__
        plan = EngineStore(built / "engines").path(record)
        assert plan.stat().st_size == record.size > 10_000
        assert plan.parent.name == record.key
    assert found["unet_prompt"].profile == {"encoder_hidden_states": ((1, 77, 32), (1, 77, 32), (1, 8 * 77, 32))}
    assert found["unet_schedule"].profile == {"timestep": ((1,), (20,), (64,))}
    step = found["unet_step"].profile
    assert step["registers"] == ((1, 1, 4, 16, 16), (1, 2, 4, 16, 16), (1, 8, 4, 16, 16))
    assert step["rows"] == ((1,), (2,), (2,))
    assert found["vae_encoder"].profile == {"sample": ((1, 3, 32, 32),) * 3}


def test_graphs_of_both_engines(built: Path, tiny_bundles: dict[str, Path]) -> None:
    """fp16 graphs for TensorRT-RTX lie beside the fp32 ones for ONNX Runtime, which stayed as they were."""
    bundle = Bundle.open(built, verify_hash=True)
    for name in COMPONENTS:
        assert set(bundle.manifest.components[name].graphs) == {"opset20-fp32", "opset23-fp16"}
        assert bundle.manifest.quality[bundle.graph(name, "opset23-fp16").file] >= 40
        before = (tiny_bundles["sd1"] / bundle.graph(name, "opset20-fp32").file).read_bytes()
        assert bundle.graph_path(name, "opset20-fp32").read_bytes() == before


def test_second_build_reuses_every_plan(tiny_sources: dict[str, Path], bundle: Path) -> None:
    """A build of what is there writes nothing under ``engines/``; a plan that is damaged is built again."""
    before = plans(bundle)
    report = rebuild(tiny_sources["sd1"], bundle)
    assert all(engine.reused for engine in report.engines)
    assert plans(bundle) == before
    damaged = next(record for record in records(bundle) if record.component == "text_encoder")
    (bundle / "engines" / damaged.key / damaged.file).write_bytes(b"x")
    report = rebuild(tiny_sources["sd1"], bundle)
    assert [(built.record.component, built.reused) for built in report.engines] == [
        (name, name != "text_encoder") for name in COMPILED
    ]
    assert {record.key for record in records(bundle)} == {path.name for path in before if len(path.parts) == 2}


def test_another_profile(tiny_sources: dict[str, Path], bundle: Path) -> None:
    """Another size gives new plans for what depends on it, beside the first ones."""
    first = {record.component: record.key for record in records(bundle)}
    report = rebuild(tiny_sources["sd1"], bundle, height=Range(16, 32, 64), batch=Range(1, 1, 2))
    second = {built.record.component: built.record for built in report.engines}
    same = {name for name in COMPILED if second[name].key == first[name]}
    assert same == {"text_encoder", "unet_prompt", "unet_schedule"}
    assert len(records(bundle)) == 6 + 3
    step = second["unet_step"].profile
    assert step["noise"] == ((1, 4, 8, 16), (1, 4, 16, 16), (2, 4, 32, 16))
    assert step["rows"] == ((1,), (2,), (4,))
    assert second["vae_encoder"].profile["sample"] == ((1, 3, 16, 32), (1, 3, 32, 32), (2, 3, 64, 32))


def test_another_precision_and_other_weights(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Precision and weights each decide a plan's key; plans survive as long as their graph does."""
    monkeypatch.setattr(StableDiffusion, "components", ("text_encoder",))
    for name in ("widen_where_needed", "judge"):  # a text encoder alone draws nothing
        monkeypatch.setattr(Construction, name, lambda *_, **__: None)
    output = tmp_path / "bundle"
    half = rebuild(tiny_source, output).engines[0].record
    full = rebuild(tiny_source, output, "fp32").engines[0].record
    assert (half.precision, full.precision) == ("fp16", "fp32")
    assert {record.key for record in records(output)} == {half.key, full.key}
    assert len({half.key, full.key}) == 2

    file = tiny_source / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("fc1.bias"))
    save_file({**tensors, name: tensors[name] + 1}, file)
    other = rebuild(tiny_source, output, "fp32").engines[0].record
    assert other.key not in {half.key, full.key}
    assert [record.key for record in records(output)] == [other.key]  # the plans of the older weights are gone


def test_interrupted_build(tiny_sources: dict[str, Path], bundle: Path) -> None:
    """Ctrl-C while a plan is built keeps the bundle whole, with the plans that it has, and leaves nothing else."""

    class Interrupting(Silent):
        def progress(self, phase: str, done: int, total: int) -> None:
            if done > 0:
                raise KeyboardInterrupt

    before = plans(bundle)
    request = BuildRequest(
        tiny_sources["sd1"], bundle, ("tensorrt-rtx",), "fp16", {"height": Range.fixed(48)}, verify=False
    )
    with pytest.raises(KeyboardInterrupt):
        build_bundle(request, Interrupting())
    assert plans(bundle) == before
    Bundle.open(bundle, verify_hash=True)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_inspect(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``inspect`` lists the plans, as text and as JSON."""
    keys = {record.key for record in records(built)}
    assert main(["inspect", str(built)]) == 0
    text = capsys.readouterr().out
    assert all(key in text for key in keys)
    assert sum("tensorrt-rtx" in line and any(key in line for key in keys) for line in text.splitlines()) == len(keys)
    assert "registers 1x1x4x16x16:1x2x4x16x16:1x8x4x16x16" in text
    assert main(["inspect", str(built), "--json"]) == 0
    engines = json.loads(capsys.readouterr().out)["engines"]
    assert {engine["key"] for engine in engines} == keys
    assert {engine["precision"] for engine in engines} == {"fp16"}


def test_json_of_a_build(tiny_sources: dict[str, Path], bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``build-engine --json`` tells of every plan whether it was reused."""
    command = ["build-engine", str(tiny_sources["sd1"]), "--output", str(bundle), "--engine", "tensorrt-rtx"]
    assert main([*command, "--precision", "fp16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(engine["component"], engine["reused"]) for engine in report["engines"]] == [(n, True) for n in COMPILED]


@pytest.mark.skipif(bool(cuda_devices()), reason="there is a GPU")
def test_opening_without_a_gpu(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plans that cannot run here are refused in one sentence, which names another engine."""
    with pytest.raises(EngineUnavailableError, match=r"no CUDA device was found.*use the engine onnxruntime") as caught:
        Pipeline.load(built, engine="tensorrt-rtx")
    assert "\n" not in str(caught.value)
    assert main(["generate", str(built), "a cat", "--output", "out.png", "--engine", "tensorrt-rtx"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
