"""Graphs that Optimum exported (``source/optimum.py``) are taken over as they are, drawn with, or refused."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.exporter.builder.adoption import WARNING
from latentrt.exporter.builder.build import build_bundle
from latentrt.exporter.builder.request import BuildRequest
from latentrt.exporter.model import Model
from latentrt.exporter.source.opening import Reading, open_source
from latentrt.exporter.verification.bundle import verify_bundle
from latentrt.runtime import Bundle, Pipeline
from latentrt.runtime.cli import main

EditJson = Callable[..., None]
GATE = 45.0
"""Least PSNR in dB, on uint8 pictures."""


class Exports:
    """Directories as Optimum exports them, and their bundles, each made when it is first asked for."""

    def __init__(self, layout: Any, tiny: Any, directory: Path) -> None:
        self._layout, self._tiny, self._directory = layout, tiny, directory

    def source(self, kind: str) -> Path:
        """Not to be changed."""
        path = self._directory / f"{kind}-onnx"
        return path if path.exists() else Path(self._layout.write(path, self._tiny.source(kind), kind))

    def bundle(self, kind: str) -> Path:
        """Not to be changed."""
        path = self._directory / f"{kind}-bundle"
        if not path.exists():
            build_bundle(BuildRequest(self.source(kind), path))
        return path


@pytest.fixture(scope="session")
def exports(optimum_layout: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Directories and bundles by kind."""
    return Exports(optimum_layout, tiny, tmp_path_factory.mktemp("exports"))


@pytest.fixture
def graphs(exports: Exports, tmp_path: Path) -> Path:
    """A copy of the directory of SD 1.x that a test may damage."""
    return Path(shutil.copytree(exports.source("sd1"), tmp_path / "graphs"))


def refusal(path: Path, **request: Any) -> str:
    """The message with which a directory is refused; nothing is left behind."""
    output = path.parent / "bundle"
    before = sorted(path.parent.iterdir())
    with pytest.raises(SourceError) as caught:
        build_bundle(BuildRequest(path, output, **request))
    assert sorted(path.parent.iterdir()) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def expected(source: Path, pipeline: str, scheduler: str, **options: Any) -> NDArray[np.uint8]:
    """diffusers' pictures of the model that was exported."""
    pipe = getattr(diffusers, pipeline).from_pretrained(source, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(7)
    pictures = pipe("a red apple", generator=generator, output_type="np", num_inference_steps=4, **options).images
    return np.round(pictures * 255).astype(np.uint8)


def psnr(pictures: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """PSNR in dB of the worst picture."""
    errors = np.square(pictures.astype(np.float64) - reference).mean(axis=(1, 2, 3))
    return float(10 * np.log10(255**2 / max(errors.max(), 1e-9)))


@pytest.mark.heavy
@pytest.mark.parametrize(("width", "height", "images"), [(32, 32, 1), (48, 24, 3)])
def test_pictures_are_diffusers(exports: Exports, tiny: Any, width: int, height: int, images: int) -> None:
    """Graphs of SD 1.x with one whole timestep for all rows draw what diffusers draws."""
    size = {"width": width, "height": height, "negative_prompt": "a green leaf"}
    reference = expected(
        *(tiny.source("sd1"), "StableDiffusionPipeline", "DPMSolverMultistepScheduler"),
        **{**size, "num_images_per_prompt": images, "guidance_scale": 4.0},
    )
    with Pipeline.load(exports.bundle("sd1"), "onnxruntime") as pipe:
        assert pipe.loop.name == "plain"
        result = pipe("a red apple", steps=4, seed=7, guidance=4.0, sampler="dpmpp-2m", images=images, **size)
    assert psnr(result.images, reference) >= GATE


@pytest.mark.heavy
@pytest.mark.parametrize("special", [{}, {"clip_skip": 1}, {"negative_prompt": ""}], ids=str)
def test_pictures_of_sdxl_are_diffusers(exports: Exports, tiny: Any, special: dict[str, Any]) -> None:
    """Graphs of SDXL give the states of every layer, from which those that count are taken."""
    size: dict[str, Any] = {"width": 48, "height": 24, "negative_prompt": "a green leaf", **special}
    asked = {**size, "negative_prompt": size["negative_prompt"] or None}
    reference = expected(
        tiny.source("sdxl"), "StableDiffusionXLPipeline", "DPMSolverMultistepScheduler", guidance_scale=4.0, **asked
    )
    with Pipeline.load(exports.bundle("sdxl"), "onnxruntime") as pipe:
        result = pipe("a red apple", steps=4, seed=7, guidance=4.0, sampler="dpmpp-2m", **size)
    assert psnr(result.images, reference) >= GATE


@pytest.mark.heavy
def test_files_are_those_of_the_export(exports: Exports, capsys: pytest.CaptureFixture[str]) -> None:
    """Every graph is taken over byte for byte, and the bundle says that it has no stages."""
    source, path = exports.source("sd1"), exports.bundle("sd1")
    manifest = Bundle.open(path, verify_hash=True).manifest
    assert list(manifest.components) == ["text_encoder", "unet", "vae_decoder"]
    for component in manifest.components.values():
        (graph,) = component.graphs.values()
        content = (source / component.name / "model.onnx").read_bytes()
        assert manifest.files[graph.file].sha256 == hashlib.sha256(content).hexdigest()
        assert (graph.opset, graph.precision) == (18, "fp32")
    assert manifest.tools["pytorch"] == torch.__version__.partition("+")[0]
    assert "diffusers" in manifest.tools
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "loops: plain\n" in shown
    assert "the unet has no stages: every step computes all of it" in shown
    assert "options negative_prompt prompt_syntax\n" in shown
    samplers = shown.partition("samplers: ")[2].splitlines()[0].split()
    assert "ddim" in samplers
    assert "dpm2" not in samplers, "it visits timesteps between those that the graph takes"
    assert main(["build-engine", str(source), "--output", str(path)]) == 0
    told = capsys.readouterr()
    assert WARNING in told.out + told.err
    assert "already taken over" in told.out + told.err


@pytest.mark.heavy
def test_what_such_graphs_cannot_do(exports: Exports, tmp_path: Path) -> None:
    """Layers to leave out, timesteps between whole ones, and other builds are refused for what they are."""
    source = exports.source("sd1")
    with Pipeline.load(exports.bundle("sd1"), "onnxruntime") as pipe:
        with pytest.raises(InvalidRequestError, match="graphs of this bundle do not give what clip_skip needs"):
            pipe("a cat", clip_skip=1)
        with pytest.raises(InvalidRequestError, match=r"visits the timestep 500\.50, but the unet .* whole ones alone"):
            pipe("a cat", sampler="euler", timesteps=[900, 500.5, 20])
    with pytest.raises(InvalidRequestError, match="are fp32, and are taken over as they are; give --precision fp32"):
        build_bundle(BuildRequest(source, tmp_path / "bundle", precision="fp16"))
    with pytest.raises(InvalidRequestError, match="no plans for tensorrt-rtx are built"):
        build_bundle(BuildRequest(source, tmp_path / "bundle", engines=("onnxruntime", "tensorrt-rtx")))
    with pytest.raises(InvalidRequestError, match="no use for a variant"):
        open_source(source, Reading(variant="fp16"))
    with pytest.raises(SourceError, match="no weights of text_encoder to compare or export"):
        verify_bundle(Bundle.open(exports.bundle("sd1")), Model(open_source(source)))
    assert not any(tmp_path.iterdir())


@pytest.mark.heavy
def test_batch_of_runs(exports: Exports) -> None:
    """Runs at different timesteps take a call each where the graph has one for all rows, and come out as alone."""
    with Pipeline.load(exports.bundle("sd1"), "onnxruntime") as pipe:
        options: list[dict[str, Any]] = [
            {"steps": 2, "seed": 1, "sampler": "ddim"},
            {"steps": 3, "seed": 2, "sampler": "ddim", "images": 2, "guidance": 1.0},
        ]
        alone = [pipe("a cat", **each).images for each in options]
        runs = [pipe.start("a cat", **each) for each in options]
        while running := [run for run in runs if not run.done]:
            pipe.advance(running)
        together = [pipe.finish(run) for run in runs]
    assert all(psnr(*pair) >= GATE for pair in zip(together, alone, strict=True))


# --- what is refused


def change(path: Path, edit: Callable[[Any], None]) -> None:
    """Change a graph."""
    model = onnx.load(path)
    edit(model)
    onnx.save(model, path)


def rename_input(model: Any, name: str, other: str) -> None:
    """Give an input another name, as another exporter would have it."""
    for value in model.graph.input:
        if value.name == name:
            value.name = other
    for node in model.graph.node:
        node.input[:] = [other if each == name else each for each in node.input]


def fix_rows(model: Any) -> None:
    """As exported without dynamic axes."""
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def declare_one_row(model: Any) -> None:
    """As traced with a batch of one, and declared so for the output alone; what is computed stays right."""
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1


@pytest.mark.heavy
def test_outputs_that_are_declared_wrongly_are_taken_as_they_come(
    exports: Exports, graphs: Path, tmp_path: Path
) -> None:
    """ONNX Runtime only warns of a declared length that is not kept, and the images are those of the right graph."""
    change(graphs / "unet" / "model.onnx", declare_one_row)
    build_bundle(BuildRequest(graphs, tmp_path / "bundle"))
    options: dict[str, Any] = {"steps": 2, "seed": 7, "width": 32, "height": 32}
    with Pipeline.load(tmp_path / "bundle", "onnxruntime") as pipe, Pipeline.load(exports.bundle("sd1")) as right:
        np.testing.assert_array_equal(pipe("a", **options).images, right("a", **options).images)


def point_outside(model: Any) -> None:
    """A tensor in a file outside the directory."""
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../../secret")


def poison(model: Any) -> None:
    """A weight that is not finite."""
    weight = next(each for each in model.graph.initializer if each.data_type == 1 and len(each.dims) > 1)
    weight.raw_data = np.full(weight.dims, np.nan, np.float32).tobytes()


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("component", "edit", "message"),
    [
        (
            "unet",
            lambda model: rename_input(model, "timestep", "t"),
            "takes sample, t, encoder_hidden_states, expected",
        ),
        ("unet", fix_rows, "takes one size alone"),
        ("vae_decoder", lambda model: setattr(model.graph.output[0], "name", "x"), "does not give 'sample'"),
        ("text_encoder", point_outside, "no file beside it"),
        ("vae_decoder", poison, "computes NaN or infinity"),
        ("vae_decoder", lambda model: model.graph.node.pop(3), "vae_decoder/model.onnx of graphs"),
    ],
    ids=["names", "fixed", "outputs", "outside", "not finite", "broken"],
)
def test_graphs_that_do_not_fit(graphs: Path, component: str, edit: Callable[[Any], None], message: str) -> None:
    """A graph that is not what its folder says, leads out of it, or does not run, is refused."""
    change(graphs / component / "model.onnx", edit)
    assert message in refusal(graphs)


@pytest.mark.heavy
def test_directories_that_do_not_fit(graphs: Path, edit_json: EditJson, tmp_path: Path) -> None:
    """What is missing, absurd, unknown or cut off is named."""
    edit_json(graphs / "vae_decoder" / "config.json", latent_channels=10**9)
    assert "'latent_channels' is 1000000000, which no model has" in refusal(graphs)
    edit_json(graphs / "vae_decoder" / "config.json", latent_channels=8)
    assert "the VAE's latents have 8 channels" in refusal(graphs)
    (graphs / "vae_decoder" / "config.json").unlink()
    assert "vae_decoder/config.json is missing" in refusal(graphs)
    (graphs / "vae_decoder" / "model.onnx").unlink()
    assert "vae_decoder/model.onnx of graphs is missing" in refusal(graphs)
    edit_json(graphs / "model_index.json", _class_name="ORTFluxPipeline")
    assert "holds graphs of a 'FluxPipeline'; supported: StableDiffusionPipeline" in refusal(graphs)


@pytest.mark.heavy
def test_cut_off_graph(graphs: Path) -> None:
    """A graph that was cut off is refused by the reader that looks into it before anything opens it."""
    file = graphs / "unet" / "model.onnx"
    file.write_bytes(file.read_bytes()[:5000])
    assert "not an ONNX model that can be trusted" in refusal(graphs)


@pytest.mark.heavy
def test_link_out(graphs: Path, tmp_path: Path) -> None:
    """A graph that is a link to a file elsewhere is refused."""
    file = graphs / "unet" / "model.onnx"
    file.rename(tmp_path / "elsewhere.onnx")
    file.symlink_to(tmp_path / "elsewhere.onnx")
    assert "unet/model.onnx is a link out of graphs" in refusal(graphs)
