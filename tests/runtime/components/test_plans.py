"""Which plan of a bundle is opened: one that is of its graphs, for this GPU and for the SDK that is installed."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentrt.engines.errors import BundleIntegrityError, EngineUnavailableError
from latentrt.engines.records import EngineRecord, engine_key
from latentrt.engines.store import EngineStore
from latentrt.engines.trt import BuildOptions, TensorRTEngine
from latentrt.engines.trt.cuda import CudaDevice
from latentrt.runtime import Bundle
from latentrt.runtime.components import plans
from latentrt.runtime.components.engine_choice import EngineSettings, make_engine
from latentrt.runtime.components.plans import find_plan, fits_gpu

VERSION = "1.2.3.4"


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    """A bundle whose U-Net has the forms opset20-fp32 and, with the same file, opset23-fp16."""
    manifest = Bundle.open(tiny_bundle).manifest
    unet = manifest.components["unet"]
    graph = unet.graphs["opset20-fp32"]
    unet = dataclasses.replace(unet, graphs={"opset20-fp32": graph, "opset23-fp16": graph})
    changed = dataclasses.replace(manifest, components={**manifest.components, "unet": unet})
    (tiny_bundle / "bundle.json").write_text(changed.to_json())
    return Bundle.open(tiny_bundle)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[CudaDevice]:
    """The machine's GPUs; a test may change them. The SDK is TensorRT-RTX of VERSION."""
    devices = [CudaDevice("NVIDIA Test", "sm_90")]
    monkeypatch.setattr(plans, "cuda_devices", lambda: tuple(devices))
    monkeypatch.setattr(plans, "load_sdk", lambda name: SimpleNamespace(version=VERSION, title=f"SDK {VERSION}"))
    return devices


def add(bundle: Bundle, created: str = "2026-01-01T00:00:00+00:00", **changes: Any) -> EngineRecord:
    """Put a plan into the bundle as a build does, under the key of its facts."""
    graph = bundle.manifest.components["unet"].graphs["opset20-fp32"]
    files = bundle.manifest.files
    facts: dict[str, Any] = {
        "engine": "tensorrt-rtx",
        "precision": "fp32",
        "profile": {"sample": ((1, 4, 8, 8), (2, 4, 8, 8), (2, 4, 8, 8))},
        "sdk": "tensorrt_rtx",
        "sdk_version": VERSION,
        "target": "sm_80+",
        "flags": BuildOptions().as_flags(),
    } | changes
    key = engine_key(
        graph=files[graph.file].sha256, weights={name: files[name].sha256 for name in graph.external}, **facts
    )
    store = EngineStore(bundle.engines_directory)
    store.add(key, lambda path: path.write_bytes(b"plan") and None, component="unet", file="unet.plan", **facts)
    text = store.root / key / "engine.json"
    text.write_text(json.dumps(json.loads(text.read_text()) | {"created": created}))
    record = store.find(key)
    assert record is not None
    return record


def test_the_plan_of_the_present_graph(bundle: Bundle) -> None:
    """It is found, and the engine opens its file."""
    record = add(bundle)
    plan = find_plan(bundle, "tensorrt-rtx", "unet")
    assert plan.record == record
    engine = make_engine(bundle, "unet", EngineSettings("tensorrt-rtx"))
    assert isinstance(engine, TensorRTEngine)
    assert engine.plan.parent.name == record.key
    assert (engine.engine, engine.target) == ("tensorrt-rtx", "sm_80+")


@pytest.mark.parametrize("changed", ["graph", "weights"])
def test_a_plan_of_older_graphs_is_not_opened(bundle: Bundle, changed: str) -> None:
    """When the graph or its weights have changed since, the plan is stale, and the sentence says so."""
    add(bundle)
    graph = bundle.manifest.components["unet"].graphs["opset20-fp32"]
    name = graph.file if changed == "graph" else graph.external[0]
    entry = dataclasses.replace(bundle.manifest.files[name], sha256="0" * 64)
    manifest = dataclasses.replace(bundle.manifest, files={**bundle.manifest.files, name: entry})
    newer = Bundle(bundle.path, manifest)
    with pytest.raises(EngineUnavailableError, match="were built from other graphs than the bundle has now; build one"):
        find_plan(newer, "tensorrt-rtx", "unet")


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "fp16"},
        {"target": "sm_90"},
        {"profile": {"sample": [[1, 4, 8, 8], [2, 4, 8, 8], [64, 4, 8, 8]]}},
        {"flags": {"tf32": True}},
    ],
    ids=["precision", "target", "profile", "flags"],
)
def test_a_record_that_claims_other_facts(bundle: Bundle, change: dict[str, Any]) -> None:
    """A record that was changed by hand no longer gives its key, and the plan is not opened."""
    record = add(bundle)
    text = bundle.engines_directory / record.key / "engine.json"
    text.write_text(json.dumps(json.loads(text.read_text()) | change))
    with pytest.raises(EngineUnavailableError, match="were built from other graphs"):
        find_plan(bundle, "tensorrt-rtx", "unet")


def test_flags_that_are_not_recorded_are_the_defaults(bundle: Bundle) -> None:
    """A record without flags gives the key that the builder's defaults give."""
    record = add(bundle)
    text = bundle.engines_directory / record.key / "engine.json"
    text.write_text(json.dumps(json.loads(text.read_text()) | {"flags": None}))
    assert find_plan(bundle, "tensorrt-rtx", "unet").record.key == record.key


def test_of_several_plans(bundle: Bundle, gpu: list[CudaDevice]) -> None:
    """Precision comes first, then the plan made for just this GPU, then the newest."""
    add(bundle)
    newer = add(bundle, "2026-01-02T00:00:00+00:00", profile={})
    exact = add(bundle, target="sm_90")
    add(bundle, "2026-01-03T00:00:00+00:00", engine="tensorrt", sdk="tensorrt")
    assert find_plan(bundle, "tensorrt-rtx", "unet").record.key == exact.key
    gpu[0] = CudaDevice("NVIDIA Test", "sm_89")
    assert find_plan(bundle, "tensorrt-rtx", "unet").record.key == newer.key
    assert find_plan(bundle, "tensorrt-rtx", "unet", "fp16").form == "opset23-fp16"


def test_another_precision(bundle: Bundle) -> None:
    """What there is in its place is named, and never taken."""
    add(bundle)
    with pytest.raises(EngineUnavailableError, match=r"plan of unet at bf16, it has fp16, fp32; .* --precision bf16"):
        find_plan(bundle, "tensorrt-rtx", "unet", "bf16")


def test_another_gpu(bundle: Bundle, gpu: list[CudaDevice]) -> None:
    """A plan for other architectures is not opened; without any GPU that is what is said."""
    add(bundle, target="sm_86,sm_89")
    with pytest.raises(EngineUnavailableError, match="are for sm_86,sm_89, this GPU is sm_90; build one"):
        find_plan(bundle, "tensorrt-rtx", "unet")
    gpu.clear()
    with pytest.raises(EngineUnavailableError, match="no CUDA device was found; use the engine onnxruntime"):
        find_plan(bundle, "tensorrt-rtx", "unet")


def test_another_version_of_the_sdk(bundle: Bundle) -> None:
    """A plan runs in the version that built it, or in a later one if it was built for that."""
    add(bundle, sdk_version="1.2.3.3")
    with pytest.raises(EngineUnavailableError, match=r"are of version 1.2.3.3, SDK 1.2.3.4 is installed; build one"):
        find_plan(bundle, "tensorrt-rtx", "unet")
    flags = BuildOptions(version_compatible=True).as_flags()
    for version, fits in (("1.2.2.0", True), ("1.3.0.0", False), ("2.0.0.0", False)):
        record = add(bundle, sdk_version=version, flags=flags)
        assert plans._fits_version(record, VERSION) is fits
    assert find_plan(bundle, "tensorrt-rtx", "unet").record.sdk_version == "1.2.2.0"


def test_a_damaged_plan_concerns_itself_only(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    """It is named in the log and passed over; a changed one is refused where hashes are asked for."""
    damaged, sound = add(bundle, target="sm_90"), add(bundle)
    (bundle.engines_directory / damaged.key / "engine.json").write_text("{")
    with caplog.at_level(logging.WARNING, logger="latentrt.runtime.components.plans"):
        assert find_plan(bundle, "tensorrt-rtx", "unet").record.key == sound.key
    assert damaged.key in caplog.text
    (bundle.engines_directory / sound.key / "unet.plan").write_bytes(b"nalp")
    make_engine(bundle, "unet", EngineSettings("tensorrt-rtx"))
    with pytest.raises(BundleIntegrityError, match="SHA-256"):
        make_engine(bundle, "unet", EngineSettings("tensorrt-rtx", verify_hash=True))


@pytest.mark.parametrize(
    ("target", "architecture", "fits"),
    [
        ("sm_80+", "sm_80", True),
        ("sm_80+", "sm_120", True),
        ("sm_80+", "sm_75", False),
        ("sm_90", "sm_90", True),
        ("sm_90", "sm_100", False),
        ("sm_86,sm_89", "sm_89", True),
        ("sm_86,sm_120+", "sm_121", True),
        ("sm_86,sm_120+", "sm_90", False),
        ("x86_64", "sm_90", False),
        ("anything+", "sm_90", False),
    ],
)
def test_targets(target: str, architecture: str, fits: bool) -> None:
    """A target names architectures one by one, or the oldest of all that follow."""
    assert fits_gpu(target, architecture) is fits
