"""Bundles of reduced precision: calibrated on real trajectories, held to a gate, and run by the engines."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from latentrt.engines.errors import BundleError, InvalidRequestError, VerificationError
from latentrt.engines.kinds import KINDS
from latentrt.exporter.builder.build import BuildReport, build_bundle
from latentrt.exporter.builder.request import BuildRequest
from latentrt.exporter.graphs.targets import PORTABLE, Form, exported_form, form_for, next_higher
from latentrt.exporter.passes.quantize import find_layers
from latentrt.exporter.precision import quality
from latentrt.exporter.precision.bisect import find_drift
from latentrt.exporter.precision.calibration import PROMPTS, Calibration, read_prompts, record
from latentrt.exporter.precision.quality import Judgement, PictureQuality, picture_psnr, picture_ssim, require
from latentrt.exporter.precision.reduce import Quantization
from latentrt.exporter.source.opening import open_source
from latentrt.exporter.verification.bundle import verify_bundle
from latentrt.exporter.verification.emulate import emulated
from latentrt.runtime import Pipeline
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.cli import main

QUICK = Calibration(("a red apple", "rocket"), steps=4, checked=2, recorded=4)
PICTURES = "pictures/onnxruntime/int8"


# --- the table of targets


def test_every_precision_of_every_engine_has_a_form() -> None:
    """Each is exported as itself or quantised from a form that is, and has a higher precision to be compared with."""
    for engine, kind in KINDS.items():
        for precision in kind.precisions:
            form = form_for(engine, precision)
            base = exported_form(form)
            assert form.opset == base.opset == kind.form.opset
            assert base.precision in ("fp32", "fp16", "bf16")
            assert form.quantized == (base != form)
            assert next_higher(engine, precision) in kind.precisions
    assert form_for("openvino", "bf16") == PORTABLE  # it rounds by itself
    with pytest.raises(InvalidRequestError, match=r"onnxruntime does not compute in fp8; choose .*tensorrt"):
        form_for("onnxruntime", "fp8")


# --- pictures


def test_figures_of_pictures_are_those_of_scikit_image() -> None:
    """PSNR and SSIM agree with an independent implementation, at Wang's settings."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, (24, 33, 3)).astype(np.uint8)
    for noise in (1, 12, 80):
        second = np.clip(first + rng.normal(0, noise, first.shape), 0, 255).astype(np.uint8)
        assert picture_psnr(first, second) == pytest.approx(peak_signal_noise_ratio(first, second))
        # scikit-image averages over the whole picture with mirrored borders, unless the window is told to stay inside.
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
        _, local = structural_similarity(first, second, channel_axis=2, full=True, **options)
        assert picture_ssim(first, second) == pytest.approx(float(local[5:-5, 5:-5].mean()), abs=1e-6)
    assert (picture_psnr(first, first), picture_ssim(first, first)) == (100, pytest.approx(1))


def test_gate_says_what_was_measured_and_what_to_do() -> None:
    """Pictures below the gate of their precision, or that are no numbers, are refused."""
    require(PictureQuality(25.1, 20, 0.9), "int8", "onnxruntime")
    for psnr in (24.9, float("nan")):
        with pytest.raises(VerificationError, match=r"onnxruntime: pictures in int8 .* 25 dB .*--accept-quality"):
            require(PictureQuality(psnr, 20, 0.9), "int8", "onnxruntime")


def test_a_slower_precision_is_reported() -> None:
    """What takes longer than the next higher precision on this machine is said to."""
    assert "slower on this machine: a step takes 1.50 times as long as in fp32" in str(
        Judgement(PictureQuality(30, 29, 0.9, 1.5), False, "fp32")
    )
    assert "0.50 of the time that fp16 takes" in str(Judgement(PictureQuality(30, 29, 0.9, 0.5), False, "fp16"))
    assert "emulated" in str(Judgement(PictureQuality(30, 29, 0.9), True, "fp16"))


# --- calibration


def test_prompts_are_read_from_a_file(tmp_path: Path) -> None:
    """One a line; blank lines and comments are left out; what is no list of prompts is refused in one sentence."""
    path = tmp_path / "prompts.txt"
    path.write_text("# mine\n\n  a red apple \nein Haus, schön\n", encoding="utf-8")
    assert read_prompts(path) == ("a red apple", "ein Haus, schön")
    for content, words in (
        (b"# nothing\n", "holds 0 prompts"),
        (b"\xff\xfe", "not UTF-8"),
        (b"a\n" * 1001, "1001 prompts"),
        (b"a" * (1 << 20) + b"b", "more than"),
        (b"a" * (1 << 20) + "ö".encode(), "more than"),
    ):
        path.write_bytes(content)
        with pytest.raises(InvalidRequestError, match=words):
            read_prompts(path)
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize("change", [{"prompts": ()}, {"steps": 0}, {"checked": 0}, {"recorded": True}])
def test_a_calibration_that_draws_nothing_is_refused(change: dict[str, object]) -> None:
    """Prompts, steps and pictures are at least one."""
    with pytest.raises(InvalidRequestError):
        Calibration(**change)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="least SQNR"):
        Quantization(float("nan"))


@pytest.mark.heavy
def test_recording_covers_prompts_timesteps_and_both_halves(emoji_bundle: Path) -> None:
    """Kept calls come from every prompt, at timesteps spread over the run, with two rows a sample."""
    calibration = Calibration(PROMPTS[:3], steps=6, recorded=6)
    with emulated(Bundle.open(emoji_bundle), PORTABLE.name, rounded=False) as (pipeline, paths):
        recording = record(pipeline, calibration)
    assert {name: len(calls) for name, calls in recording.calls.items()} == {
        "text_encoder": 6,  # each prompt and the empty negative one
        "unet_prompt": 6,
        "unet_schedule": 3,
        "unet_step": 6,
        "vae_decoder": 3,
    }
    steps = recording.calls["unet_step"]
    assert len({float(call["input_scale"][0]) for call in steps} | {call["update"].tobytes() for call in steps}) >= 5
    assert all(len(call["rows"]) == 2 for call in steps)
    assert recording.pictures.shape == (3, 64, 64, 3)
    assert not [path for path in paths["unet_step"].parent.iterdir() if path.name.startswith(".")]


# --- whole builds


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
    figures = verify_bundle(Bundle.open(reduced.path), open_source(emoji_source))
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
    with pytest.raises(InvalidRequestError, match="unknown runner 'magic'"):
        find_drift(bundle, "unet_step", "int8", runner="magic")
    with pytest.raises(BundleError, match="no component 'unet_leap'"):
        find_drift(bundle, "unet_leap", "int8")
    with pytest.raises(BundleError, match="no form 'opset20-fp8'"):
        find_drift(bundle, "unet_step", "fp8")
    with pytest.raises(BundleError, match="no picture needs vae_encoder"):
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
