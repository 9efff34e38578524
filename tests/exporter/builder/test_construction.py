"""Graphs under construction: precision, weights that leave fp16, and files of weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.engines.errors import (
    ExportError,
    VerificationError,
)
from latentrt.engines.onnxrt import OnnxRuntimeEngine
from latentrt.exporter.builder import construction
from latentrt.exporter.builder.build import build_bundle
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
from latentrt.exporter.verification.components import GATES, check_component, heavy_weight
from latentrt.exporter.verification.emulate import widened_copy
from latentrt.runtime.bundle.manifest import Graph
from latentrt.runtime.bundle.reader import Bundle

COMPONENTS = tuple(part for name in StableDiffusion.components for part in StableDiffusion().with_stages(name))
FORM = "opset20-fp32"


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
