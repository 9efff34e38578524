"""Bundles compute what diffusers computes, are built from what changed alone, and are never half written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from latentrt.engines.errors import (
    BundleError,
    EngineUnavailableError,
    ExportError,
    InvalidRequestError,
    OutputError,
    SourceError,
    VerificationError,
)
from latentrt.engines.onnxrt import OnnxRuntimeEngine
from latentrt.engines.trt import Range
from latentrt.exporter.builder import build, construction
from latentrt.exporter.builder.build import BuildReport, build_bundle
from latentrt.exporter.builder.construction import Construction
from latentrt.exporter.builder.request import BuildRequest
from latentrt.exporter.families.stable_diffusion import StableDiffusion
from latentrt.exporter.graphs import export as onnx_export
from latentrt.exporter.graphs.export import export_component
from latentrt.exporter.graphs.targets import Form
from latentrt.exporter.model import Model
from latentrt.exporter.progress import Silent
from latentrt.exporter.source.opening import open_source
from latentrt.exporter.source.source import Source
from latentrt.exporter.verification.bundle import verify_bundle
from latentrt.exporter.verification.components import GATES, check_component, heavy_weight, psnr
from latentrt.exporter.verification.emulate import widened_copy
from latentrt.runtime.bundle.manifest import Graph
from latentrt.runtime.bundle.reader import Bundle

EditJson = Callable[..., None]
COMPONENTS = tuple(part for name in StableDiffusion.components for part in StableDiffusion().with_stages(name))
FORM = "opset20-fp32"
FILES = (
    *("text_encoder/model.onnx", "unet/model.onnx", "unet/prompt.onnx", "unet/schedule.onnx", "unet/step.onnx"),
    *("vae_decoder/model.onnx", "vae_encoder/model.onnx"),
)
KINDS = ("sd1", "sd2")


def snapshot(directory: Path) -> dict[str, bytes]:
    """Content of every file below a directory, hidden ones too."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def change_weights(source: Path, *, part: str = "text_encoder", file: str = "model.safetensors") -> None:
    """Add one to the first number of every tensor of a component."""
    tensors = load_file(source / part / file)
    for tensor in tensors.values():
        tensor.view(-1)[0] += 1
    save_file(tensors, source / part / file)


def unverified(source: Path, output: Path) -> BuildReport:
    return build_bundle(BuildRequest(source, output, verify=False))


# --- what is exported


@pytest.mark.heavy
@pytest.mark.parametrize("kind", KINDS)
def test_bundle_is_whole_and_good(tiny_bundles: dict[str, Path], kind: str) -> None:
    """A bundle opens with every hash right, and each of its graphs has a figure above the gate."""
    bundle = Bundle.open(tiny_bundles[kind], verify_hash=True)
    assert tuple(bundle.manifest.components) == COMPONENTS
    assert set(bundle.manifest.quality) == set(FILES)
    assert min(bundle.manifest.quality.values()) >= GATES["fp32"]
    assert bundle.manifest.prediction_type == {"sd1": "epsilon", "sd2": "v_prediction"}[kind]
    for name in COMPONENTS:
        graph = onnx.load(bundle.graph_path(name, FORM))
        onnx.checker.check_model(graph, full_check=True)
        assert not any(node.metadata_props for node in graph.graph.node)


@pytest.mark.heavy
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (3, 5, 7), (2, 16, 16), (1, 9, 24)])
@pytest.mark.parametrize("kind", KINDS)
def test_unet_at_every_size(
    tiny_sources: dict[str, Path], tiny_bundles: dict[str, Path], kind: str, batch: int, height: int, width: int
) -> None:
    """The U-Net computes what diffusers' computes at any batch and at odd sizes, with a timestep for each sample."""
    model = UNet2DConditionModel.from_pretrained(tiny_sources[kind] / "unet").eval()
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(batch, 4, height, width, generator=generator)
    timestep = torch.rand(batch, generator=generator) * 999
    states = torch.randn(batch, 77, 32, generator=generator)
    with torch.no_grad():
        expected = model(sample, timestep, states).sample.numpy()
    feeds = {"sample": sample.numpy(), "timestep": timestep.numpy(), "encoder_hidden_states": states.numpy()}
    with OnnxRuntimeEngine(Bundle.open(tiny_bundles[kind]).graph_path("unet", FORM)) as engine:
        np.testing.assert_allclose(engine.run(feeds)["out_sample"], expected, atol=2e-5)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", KINDS)
def test_vae_and_text_encoder(tiny_sources: dict[str, Path], tiny_bundles: dict[str, Path], kind: str) -> None:
    """VAE and text encoder compute what diffusers' and transformers' compute, at sizes of their own."""
    bundle, source = Bundle.open(tiny_bundles[kind]), tiny_sources[kind]
    vae = AutoencoderKL.from_pretrained(source / "vae").eval()
    text = CLIPTextModel.from_pretrained(source / "text_encoder").eval()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 5, 9, generator=generator)
    pixels = torch.rand(1, 3, 22, 34, generator=generator) * 2 - 1
    ids = torch.randint(1713, (3, 77), generator=generator)
    with torch.no_grad():
        decoded, encoded = vae.decode(latents).sample, vae.encode(pixels).latent_dist.parameters
        states = text(ids, output_hidden_states=True)
        penultimate = getattr(text, "text_model", text).final_layer_norm(states.hidden_states[-2])
    with OnnxRuntimeEngine(bundle.graph_path("vae_decoder", FORM)) as engine:
        np.testing.assert_allclose(engine.run({"latent_sample": latents.numpy()})["sample"], decoded, atol=2e-5)
    with OnnxRuntimeEngine(bundle.graph_path("vae_encoder", FORM)) as engine:
        np.testing.assert_allclose(engine.run({"sample": pixels.numpy()})["latent_parameters"], encoded, atol=2e-5)
    with OnnxRuntimeEngine(bundle.graph_path("text_encoder", FORM)) as engine:
        results = engine.run({"input_ids": ids.numpy(), "extra_embeddings": np.zeros((1, 32), np.float32)})
    np.testing.assert_allclose(results["last_hidden_state"], states.last_hidden_state, atol=2e-5)
    np.testing.assert_allclose(results["penultimate_hidden_state"], penultimate, atol=2e-5)
    np.testing.assert_allclose(results["pooler_output"], states.pooler_output, atol=2e-5)


@pytest.mark.heavy
def test_half_precision(tiny_sources: dict[str, Path], tmp_path: Path) -> None:
    """An fp16 graph holds fp16 weights, agrees with torch in fp32, and leaves the module as it was."""
    component = Model(open_source(tiny_sources["sd1"])).load_component("text_encoder")
    before = {name: tensor.clone() for name, tensor in component.module.state_dict().items()}
    graph = export_component(component, Form(20, "fp16"), tmp_path)
    assert graph.file == "text_encoder/model.opset20-fp16.onnx"
    assert {spec.dtype for spec in graph.outputs} == {"float16"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in component.module.state_dict().items())
    model = onnx.load(tmp_path / graph.file)
    assert onnx.TensorProto.FLOAT not in {tensor.data_type for tensor in model.graph.initializer if tensor.dims}
    with widened_copy(tmp_path / graph.file, rounded=True) as copy, OnnxRuntimeEngine(copy) as engine:
        assert 50 < check_component(component, engine, "fp16").psnr < 100


@pytest.mark.heavy
def test_large_weights_in_a_file_of_their_own(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights above the threshold go to a second file, which the manifest lists, and the bundle opens and runs."""
    monkeypatch.setattr(onnx_export, "EXTERNAL_THRESHOLD", 1000)
    monkeypatch.setattr(StableDiffusion, "components", ("text_encoder",))
    report = build_bundle(BuildRequest(tiny_source, tmp_path / "bundle"))
    bundle = Bundle.open(report.path, verify_hash=True)
    graph = bundle.graph("text_encoder", FORM)
    assert graph.external == ("text_encoder/model.onnx.data",)
    assert set(graph.external) < set(bundle.manifest.files)
    assert bundle.file(graph.external[0]).stat().st_size > bundle.file(graph.file).stat().st_size
    with OnnxRuntimeEngine(bundle.graph_path("text_encoder", FORM)) as engine:
        feeds = {"input_ids": np.zeros((1, 77), np.int64), "extra_embeddings": np.zeros((1, 32), np.float32)}
        assert engine.run(feeds)["pooler_output"].shape == (1, 32)
    assert min(report.quality.values()) >= GATES["fp32"]
    assert verify_bundle(bundle, Model(open_source(tiny_source))).keys() == {graph.file}


def test_module_that_cannot_be_exported(tiny_source: Path, tmp_path: Path) -> None:
    """What the exporter raises becomes one sentence that names the component."""
    component = Model(open_source(tiny_source)).load_component("text_encoder")

    def fail(input_ids: torch.Tensor, extra_embeddings: torch.Tensor) -> None:
        raise RuntimeError("no such operator\nand much more")

    component.module.forward = fail
    with pytest.raises(ExportError, match=r"text_encoder could not be exported.*no such operator") as caught:
        export_component(component, Form(20, "fp32"), tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("text_encoder"))


def test_unknown_component(tiny_source: Path) -> None:
    """A component that a pipeline does not have is refused by name."""
    with pytest.raises(SourceError, match="no component 'safety_checker'"):
        Model(open_source(tiny_source)).load_component("safety_checker")


# --- half precision that overflows


def with_huge_weights(source: Path, name: str, factor: float) -> None:
    file = source / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    (key,) = [key for key in tensors if key.endswith(name)]
    save_file({**tensors, key: tensors[key] * factor}, file)


def exported_in_fp16(
    source: Path, name: str, directory: Path, monkeypatch: pytest.MonkeyPatch, *, verify: bool = True
) -> tuple[Construction, str]:
    """One component exported at opset 20 in fp16, and what was told of it."""
    told: list[str] = []
    reporter = Silent()
    monkeypatch.setattr(reporter, "result", told.append)
    graphs: dict[str, dict[str, Graph]] = {part: {} for part in COMPONENTS}
    made = Construction(
        Model(open_source(source)), directory, verify, reporter, graphs, {}, lambda: pytest.fail("not asked for")
    )
    made.export(name, [Form(20, "fp16")])
    return made, " ".join(told)


def test_weight_beyond_fp16_is_found(tiny_source: Path) -> None:
    """The first weight that fp16 cannot hold is named by its path."""
    component = Model(open_source(tiny_source)).load_component("text_encoder")
    assert heavy_weight(component) is None
    name = "layers.2.mlp.fc2.bias"
    ((path, weight),) = [(path, each) for path, each in component.module.named_parameters() if path.endswith(name)]
    weight.data = (weight.data + 0.01) * 1e9
    assert heavy_weight(component) == path


@pytest.mark.heavy
def test_weights_in_half_precision_give_the_same_graph(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export that is not compared reads weights in half precision, and writes what one that is compared writes."""
    name = "text_encoder"
    for each in ("compared", "plain"):
        (tmp_path / each).mkdir()
    exported_in_fp16(tiny_source, name, tmp_path / "compared", monkeypatch)
    load, read = Source.load, []
    monkeypatch.setattr(Source, "load", lambda self, part, dtype: read.append(dtype) or load(self, part, dtype))
    exported_in_fp16(tiny_source, name, tmp_path / "plain", monkeypatch, verify=False)
    assert read == [torch.float16]
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / each / name).iterdir()} for each in ("compared", "plain")
    )
    assert first.keys() >= {f"model{Form(20, 'fp16').suffix}.onnx"}
    assert first == second


@pytest.mark.heavy
def test_component_with_too_heavy_weights_is_kept_in_fp32(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A component whose weights fp16 cannot hold is exported in fp32, which the build says, and passes fp32's gate."""
    with_huge_weights(tiny_source, "layers.1.mlp.fc1.weight", 1e9)
    made, told = exported_in_fp16(tiny_source, "text_encoder", tmp_path, monkeypatch)
    graph = made.graphs["text_encoder"]["opset20-fp16"]
    assert graph.precision == "fp32"
    assert made.quality[graph.file] >= GATES["fp32"]
    assert "kept in fp32" in told
    assert "layers.1.mlp.fc1" in told


@pytest.mark.heavy
def test_decoder_whose_values_leave_fp16_does_not_turn_black(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where activations leave the range of fp16 operators run in fp32, and the rest, weights too, stays fp16.

    Run in half precision with all its roundings, the same graph without them gives nothing finite.
    """
    file = tiny_source / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "decoder.conv_in.weight": tensors["decoder.conv_in.weight"] * 3e5}, file)
    monkeypatch.setattr(construction, "out_of_range", lambda path, feeds: {})
    with pytest.raises(VerificationError, match="agrees to nan dB"):
        exported_in_fp16(tiny_source, "vae_decoder", tmp_path / "black", monkeypatch)
    monkeypatch.undo()
    made, told = exported_in_fp16(tiny_source, "vae_decoder", tmp_path / "right", monkeypatch)
    graph = made.graphs["vae_decoder"]["opset20-fp16"]
    assert graph.precision == "fp16"
    assert made.quality[graph.file] >= GATES["fp16"]
    assert "operators kept in fp32, where values reach" in told
    model = onnx.load(tmp_path / "right" / graph.file)
    floats = {each.name for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT}
    assert not any(name.startswith("vae.") for name in floats)  # no weights


# --- what is verified


def test_psnr() -> None:
    """PSNR follows its definition; what cannot be compared is NaN, which no gate lets through."""
    reference = np.array([[4.0, -2.0]])
    assert psnr(reference, reference) == np.inf
    assert psnr(reference, reference + 0.4) == pytest.approx(20)
    for received in (np.array([[np.nan, 0]]), np.array([[np.inf, 0]]), reference[0], np.ones((2, 2))):
        assert np.isnan(psnr(reference, received))
    assert psnr(np.zeros(2), np.ones(2)) == -np.inf


@pytest.mark.heavy
def test_verification_failure(tiny_source: Path, tmp_path: Path, copied_exports: list[str]) -> None:
    """Graphs that hold other weights than the source are refused, and no bundle is left."""
    change_weights(tiny_source)
    with pytest.raises(VerificationError, match=r"text_encoder \(fp32\) does not compute what its source computes"):
        build_bundle(BuildRequest(tiny_source, tmp_path / "out" / "bundle"))
    assert copied_exports == [f"text_encoder {FORM}"]
    assert snapshot(tmp_path / "out") == {}
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.heavy
def test_gate(tiny_source: Path, tmp_path: Path, copied_exports: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure below the gate is refused although the graph is right."""
    monkeypatch.setitem(GATES, "fp32", 400.0)
    with pytest.raises(VerificationError, match="at least 400 dB are required"):
        build_bundle(BuildRequest(tiny_source, tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.heavy
def test_verify_bundle(tiny_source: Path, tiny_bundle: Path) -> None:
    """A bundle passes against its own source, and is refused against another or with a graph of another model."""
    figures = verify_bundle(Bundle.open(tiny_bundle), Model(open_source(tiny_source)))
    assert figures.keys() == set(FILES)
    weights = tiny_bundle / "text_encoder" / "model.onnx.data"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(VerificationError, match="text_encoder"):
        verify_bundle(Bundle.open(tiny_bundle), Model(open_source(tiny_source)))
    change_weights(tiny_source)
    with pytest.raises(BundleError, match="was not built from"):
        verify_bundle(Bundle.open(tiny_bundle), Model(open_source(tiny_source)))


# --- what is built again


@pytest.mark.heavy
def test_second_build_reuses(tiny_source: Path, tmp_path: Path, copied_exports: list[str]) -> None:
    """A build of what is there already exports nothing and changes no file."""
    report = unverified(tiny_source, tmp_path / "bundle")
    assert report.exported == FILES
    before, times = snapshot(report.path), {p: p.stat().st_mtime_ns for p in report.path.rglob("*")}
    again = unverified(tiny_source, tmp_path / "bundle")
    assert again.exported == ()
    assert len(copied_exports) == 4
    assert snapshot(report.path) == before
    assert {p: p.stat().st_mtime_ns for p in report.path.rglob("*")} == times


@pytest.mark.heavy
def test_what_causes_an_export(
    tiny_source: Path, tmp_path: Path, copied_exports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights, other tools, a damaged bundle or a figure that is missing cause exports; new defaults do not."""
    output = tmp_path / "bundle"
    unverified(tiny_source, output)
    first = Bundle.open(output).manifest
    copied_exports.clear()

    build_bundle(BuildRequest(tiny_source, output, verify=False, steps=33, guidance=1.0, sampler="ddim"))
    (tiny_source / "README.md").write_text("license: mit\n")
    unverified(tiny_source, output)
    assert copied_exports == []
    assert Bundle.open(output, verify_hash=True).manifest.source.licence == "mit"
    assert Bundle.open(output).manifest.files == first.files
    kept = Bundle.open(output).manifest.defaults
    assert (kept.steps, kept.guidance, kept.sampler) == (33, 1.0, "ddim"), "a build that names none keeps them"

    build_bundle(BuildRequest(tiny_source, output))  # with verification, of which nothing is known yet
    assert len(copied_exports) == 4
    assert min(Bundle.open(output).manifest.quality.values()) >= GATES["fp32"]
    copied_exports.clear()
    build_bundle(BuildRequest(tiny_source, output))
    assert copied_exports == []

    change_weights(tiny_source)
    unverified(tiny_source, output)
    assert len(copied_exports) == 4
    assert Bundle.open(output).manifest.source.fingerprint != first.source.fingerprint
    assert Bundle.open(output).manifest.quality == {}
    copied_exports.clear()

    with (output / "unet" / "model.onnx").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    unverified(tiny_source, output)
    assert len(copied_exports) == 4
    copied_exports.clear()

    monkeypatch.setattr(build, "tool_versions", lambda: {"torch": "0.1"})
    unverified(tiny_source, output)
    assert len(copied_exports) == 4


@pytest.mark.heavy
def test_another_form_beside_the_first(tiny_source: Path, tmp_path: Path, copied_exports: list[str]) -> None:
    """Another precision is added to a bundle; the graphs that it has stay, byte for byte."""
    before = snapshot(unverified(tiny_source, tmp_path / "bundle").path)
    copied_exports.clear()
    report = build_bundle(BuildRequest(tiny_source, tmp_path / "bundle", precision="fp16", verify=False))
    assert copied_exports == [f"{name} opset20-fp16" for name in StableDiffusion.components]
    bundle = Bundle.open(report.path, verify_hash=True)
    assert all(set(component.graphs) == {FORM, "opset20-fp16"} for component in bundle.manifest.components.values())
    after = snapshot(report.path)
    assert all(after[name] == content for name, content in before.items() if name != "bundle.json")


# --- what goes wrong


class Interrupting(Silent):
    """Raises at the nth event."""

    def __init__(self, event: int) -> None:
        self.left = event

    def stage(self, text: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    result = stage


@pytest.mark.heavy
@pytest.mark.parametrize("older", [False, True])
def test_interrupted(tiny_source: Path, tmp_path: Path, copied_exports: list[str], older: bool) -> None:
    """Ctrl-C at any event leaves the older bundle, or nothing, and no file beside it."""
    output = tmp_path / "out" / "bundle"
    output.parent.mkdir()
    if older:
        unverified(tiny_source, output)
        change_weights(tiny_source)
    before = snapshot(output.parent)
    for event in (0, 1, 4, 7):
        with pytest.raises(KeyboardInterrupt):
            build_bundle(BuildRequest(tiny_source, output, verify=False), Interrupting(event))
        assert snapshot(output.parent) == before
        assert [path.name for path in output.parent.iterdir()] == (["bundle"] if older else [])


@pytest.mark.heavy
def test_failing_export(
    tiny_source: Path, tmp_path: Path, copied_exports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export that fails after others were done leaves the older bundle untouched."""
    output = tmp_path / "out" / "bundle"
    unverified(tiny_source, output)
    before = snapshot(output.parent)
    change_weights(tiny_source)
    working = construction.export_component

    def fail(component: onnx_export.Component, form: Form, directory: Path) -> object:
        if component.name == "vae_encoder":
            raise ExportError("vae_encoder could not be exported")
        return working(component, form, directory)

    monkeypatch.setattr(construction, "export_component", fail)
    with pytest.raises(ExportError):
        unverified(tiny_source, output)
    assert snapshot(output.parent) == before


def test_damage_is_found_before_anything_is_exported(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are not finite, or a tokenizer that is missing, are found before the first export."""
    monkeypatch.setattr(construction, "export_component", lambda *_: pytest.fail("something was exported"))
    file = tiny_source / "vae" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    tensors["decoder.conv_in.bias"][0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(SourceError, match="vae: the tensor"):
        unverified(tiny_source, tmp_path / "bundle")
    file.write_bytes(whole)
    shutil.rmtree(tiny_source / "tokenizer")
    with pytest.raises(SourceError, match="tokenizer"):
        unverified(tiny_source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engines": ()}, "no engine"),
        ({"engines": ("openvinyl",)}, "unknown engine"),
        ({"precision": "fp12"}, "unknown precision"),
        ({"sampler": "magic"}, "unknown sampler"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 10_001}, "steps is 10001"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"ranges": {"depth": Range.fixed(1)}}, "unknown profile entry 'depth'"),
        ({"ranges": {"batch": Range(1, 1, 10**6)}}, "exceeds 4096"),
        ({"ranges": {"height": Range.fixed(10**6)}}, "exceeds 16384"),
        ({"precision": "int8", "calibration": None, "verify": False}, "int8 learns its ranges from images"),
        ({"precision": "fp16", "engines": ["tensorrt-rtx"], "calibration": None}, "no images are drawn"),
    ],
    ids=str,
)
def test_requests_that_make_no_sense(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    """A request is checked when it is made."""
    with pytest.raises(InvalidRequestError, match=message):
        BuildRequest(tmp_path, tmp_path / "bundle", **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 5000}, "1000 timesteps"),
        ({"sampler": "flow-euler"}, "flow"),
        ({"ranges": {"width": Range(16, 33, 64)}}, "width: range 16:33:64 must consist of multiples of 2"),
    ],
    ids=str,
)
def test_requests_that_do_not_suit_the_source(
    tiny_source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, object],
    message: str,
) -> None:
    """What only the source can tell is checked before anything is exported."""
    monkeypatch.setattr(construction, "export_component", lambda *_: pytest.fail("something was exported"))
    with pytest.raises(InvalidRequestError, match=message):
        build_bundle(BuildRequest(tiny_source, tmp_path / "bundle", **arguments))  # type: ignore[arg-type]


def test_engine_that_cannot_be_built(tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing SDK is found before anything is exported."""

    def missing(name: str) -> None:
        raise EngineUnavailableError(f"{name} is not installed")

    monkeypatch.setattr(build, "load_sdk", missing)
    monkeypatch.setattr(construction, "export_component", lambda *_: pytest.fail("something was exported"))
    with pytest.raises(EngineUnavailableError):
        build_bundle(BuildRequest(tiny_source, tmp_path / "bundle", ("onnxruntime", "tensorrt")))


def test_output_that_cannot_be_written(tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place that cannot be written, the source among them, is refused before anything is exported."""
    monkeypatch.setattr(construction, "export_component", lambda *_: pytest.fail("something was exported"))
    before = snapshot(tiny_source)
    for output in (tiny_source, tiny_source / "model_index.json", tiny_source / "model_index.json" / "bundle"):
        with pytest.raises(OutputError):
            unverified(tiny_source, output)
    assert snapshot(tiny_source) == before
