"""Whole bundles of reduced precision are built and verified, and ``bisect`` finds where they drift."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from latentrt.engines.errors import BundleError, InvalidRequestError, VerificationError
from latentrt.exporter.builder.build import BuildReport, build_bundle
from latentrt.exporter.builder.request import BuildRequest
from latentrt.exporter.graphs.targets import PORTABLE, Form
from latentrt.exporter.model import Model
from latentrt.exporter.passes.quantize import find_layers
from latentrt.exporter.precision import quality
from latentrt.exporter.precision.bisect import find_drift
from latentrt.exporter.precision.calibration import Calibration
from latentrt.exporter.precision.quality import picture_psnr
from latentrt.exporter.source.opening import open_source
from latentrt.exporter.verification.bundle import verify_bundle
from latentrt.runtime import Pipeline
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.cli import main

QUICK = Calibration(("a red apple", "rocket"), steps=4, checked=2, recorded=4)
PICTURES = "pictures/onnxruntime/int8"


@pytest.fixture(scope="module")
def reduced(emoji_source: Path, emoji_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildReport:
    """The emoji model's bundle, extended by INT8 for ONNX Runtime."""
    path = tmp_path_factory.mktemp("reduced") / "bundle"
    shutil.copytree(emoji_bundle, path)
    return build_bundle(BuildRequest(emoji_source, path, precision="int8", calibration=QUICK))


@pytest.mark.heavy
def test_int8_build_is_measured_and_runs(reduced: BuildReport) -> None:
    """The step is quantised, everything else serves as it is, figures are in the manifest, and pictures are close."""
    assert reduced.exported == ("unet/step.opset20-int8.onnx",)
    assert reduced.quality[f"{PICTURES}/psnr_db"] >= quality.GATES["int8"]
    bundle = Bundle.open(reduced.path, verify_hash=True)
    graphs = {name: part.graphs.get("opset20-int8") for name, part in bundle.manifest.components.items()}
    assert graphs.pop("unet") is None  # a whole denoiser is not quantised
    assert {name: graph.precision for name, graph in graphs.items() if graph} == {
        **dict.fromkeys(graphs, "fp32"),
        "unet_step": "int8",
    }
    whole, step = bundle.graph("unet_step", PORTABLE.name), bundle.graph("unet_step", "opset20-int8")
    assert (step.inputs, step.outputs) == (whole.inputs, whole.outputs)
    options = {"steps": 6, "seed": 5}
    with (
        Pipeline.load(reduced.path, "onnxruntime") as reference,
        Pipeline.load(reduced.path, "onnxruntime", precision="int8") as pipe,
    ):
        pictures = [each("sunflower", **options).images[0] for each in (reference, pipe)]  # type: ignore[arg-type]
    assert 20 <= picture_psnr(*pictures) < 60  # two prompts are few to learn from
    with pytest.raises(BundleError, match="no graph of unet for onnxruntime at int8"):
        Pipeline.load(reduced.path, "onnxruntime", precision="int8", loop="plain")


@pytest.mark.heavy
def test_nothing_is_done_twice(reduced: BuildReport, emoji_source: Path) -> None:
    """A second build of the same finds everything there."""
    again = build_bundle(BuildRequest(emoji_source, reduced.path, precision="int8", calibration=QUICK))
    assert again.exported == ()
    assert again.quality == {name: value for name, value in reduced.quality.items() if name.startswith(PICTURES)}


@pytest.mark.heavy
def test_verify_compares_reduced_graphs_and_writes_nothing(reduced: BuildReport, emoji_source: Path) -> None:
    """Every graph is compared once with torch, quantised ones through all their roundings; the bundle is left alone."""
    before = sorted(path.name for path in (reduced.path / "unet").iterdir())
    figures = verify_bundle(Bundle.open(reduced.path), Model(open_source(emoji_source)))
    assert 18 <= figures["unet/step.opset20-int8.onnx"] < 60
    assert figures["unet/step.onnx"] > 80
    assert sorted(path.name for path in (reduced.path / "unet").iterdir()) == before


@pytest.mark.heavy
def test_drift_is_found_where_it_arises(reduced: BuildReport, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first quantised layer nothing differs, behind it values do; those that lose most are quantised."""
    bundle = Bundle.open(reduced.path)
    drifts = find_drift(bundle, "unet_step", "int8")
    quantised = {layer.name for layer in find_layers(ir.load(bundle.graph_path("unet_step", PORTABLE.name)).graph)}
    first = next(place for place, drift in enumerate(drifts) if drift.node in quantised)
    assert all(drift.psnr == float("inf") for drift in drifts[:first])
    assert drifts[first].psnr < 80
    assert drifts[-1].psnr < 60
    worst = sorted(drifts, key=lambda drift: -drift.lost)[:5]
    assert {drift.node for drift in worst} & quantised
    exact = find_drift(bundle, "vae_decoder", "int8", runner="onnxruntime")  # it serves int8 as it is
    assert min(drift.psnr for drift in exact) > 80
    assert main(["verify", str(reduced.path), "--bisect", "unet_step", "--precision", "int8"]) == 0
    assert "operators that lose most by themselves:" in capsys.readouterr().out
    before = sorted(path.name for path in (reduced.path / "unet").iterdir())
    assert not [name for name in before if name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--source SOURCE"),
        (("--bisect", "unet_step"), "--bisect needs --precision"),
        (("--precision", "int8"), "--source SOURCE"),
    ],
)
def test_what_to_verify_must_be_said(
    arguments: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a source nor a component, or a component without a precision, is an error of the command line."""
    assert main(["verify", str(tmp_path), *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.heavy
def test_drift_of_what_is_not_there_is_refused(reduced: BuildReport) -> None:
    """Runner, component and precision are named in the refusal."""
    bundle = Bundle.open(reduced.path)
    with pytest.raises(InvalidRequestError, match="runner is 'magic', expected one of emulated, "):
        find_drift(bundle, "unet_step", "int8", runner="magic")
    with pytest.raises(BundleError, match="no component 'unet_leap'"):
        find_drift(bundle, "unet_leap", "int8")
    with pytest.raises(BundleError, match="no form 'opset20-fp8'"):
        find_drift(bundle, "unet_step", "fp8")
    with pytest.raises(BundleError, match="drawing an image does not run vae_encoder"):
        find_drift(bundle, "vae_encoder", "int8")


@pytest.mark.heavy
def test_pictures_below_the_gate_fail_the_build_unless_accepted(
    emoji_source: Path, emoji_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused build leaves the bundle as it was, with nothing beside it; an accepted one records what it is worth."""
    path = tmp_path / "bundle"
    shutil.copytree(emoji_bundle, path)
    manifest = (path / "bundle.json").read_bytes()
    monkeypatch.setitem(quality.GATES, "int8-weights", 90.0)
    request: Callable[..., BuildRequest] = lambda **more: BuildRequest(  # noqa: E731
        emoji_source, path, precision="int8-weights", calibration=QUICK, **more
    )
    with pytest.raises(VerificationError, match="at least 90 dB are required"):
        build_bundle(request())
    assert (path / "bundle.json").read_bytes() == manifest
    assert [each.name for each in tmp_path.iterdir()] == ["bundle"]
    report = build_bundle(request(accept_quality=True))
    assert 32 <= report.quality["pictures/onnxruntime/int8-weights/psnr_db"] < 90
    assert Bundle.open(path).graph("unet_step", Form(20, "int8-weights").name).precision == "int8-weights"
