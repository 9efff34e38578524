"""ControlNets and the denoiser's twins (``controlled``): what is refused, and what is built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.engines.trt import Range
from latentrt.exporter.adapters.base import AdapterFiles
from latentrt.exporter.adapters.controlnet import ControlNetFile, ControlNetFiles
from latentrt.exporter.adapters.registry import open_model
from latentrt.exporter.model import Model
from latentrt.exporter.source.opening import open_source
from latentrt.exporter.source.source import Source
from latentrt.runtime import Bundle
from latentrt.runtime.cli import main


def steered(source: Source, files: AdapterFiles) -> Model:
    """A source with one kind of adapter."""
    return open_model(source, [files])


def edges(path: Path, count: int = 1) -> ControlNetFiles:
    """A ControlNet of this name, once or several times."""
    return ControlNetFiles((ControlNetFile("edges", path),) * count)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "ControlNetUnionModel"}, "is a 'ControlNetUnionModel', expected ControlNetModel"),
        ({"block_out_channels": [32, 128]}, r"'block_out_channels' is \[32, 128\], but that of sd1 is \[32, 64\]"),
        ({"block_out_channels": "wide"}, "'block_out_channels' is 'wide'"),
        ({"cross_attention_dim": 768}, "'cross_attention_dim' is 768, but that of sd1 is 32"),
        ({"layers_per_block": 2}, "its layers are not those of sd1"),
        ({"layers_per_block": "two"}, "'layers_per_block' is 'two'"),
        ({"in_channels": 9}, "'in_channels' is 9, but latents of sd1 have 4"),
        ({"conditioning_channels": 1}, "'conditioning_channels' is 1, expected 3"),
        ({"controlnet_conditioning_channel_order": "gbr"}, "'gbr', expected rgb or bgr"),
        ({"global_pool_conditions": True}, "pools its residuals"),
        ({"class_embed_type": "projection"}, "'class_embed_type' is 'projection', which is not supported"),
        ({"conditioning_embedding_out_channels": [16, 32, 96, 256]}, "8 times smaller, but latents of sd1 are 2 times"),
        ({"conditioning_embedding_out_channels": [16, 10**5]}, "expected 1 to 7 whole numbers"),
        ({"norm_num_groups": 10**9}, "'norm_num_groups' is 1000000000, which no model has"),
        ({"act_fn": "boom"}, "does not describe a model"),
        ({"norm_num_groups": 7}, "does not describe a model"),
    ],
)
def test_a_controlnet_that_does_not_fit(tiny: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """One sentence names what is wrong, before weights are read."""
    copy = Path(shutil.copytree(tiny.controlnet("sd1"), tmp_path / "edges"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SourceError, match=message):
        steered(open_source(tiny.source("sd1")), edges(copy))


def test_controlnets_are_named(tiny: Any, tmp_path: Path) -> None:
    """By the option, or after their directory; twice the same name, a bad one and a missing directory are refused."""
    source, path = open_source(tiny.source("sd1")), tiny.controlnet("sd1")
    assert ControlNetFile.parse(f"depth={path}") == ControlNetFile("depth", path)
    assert ControlNetFile.parse(str(tmp_path / "Control_V11p.canny")).name == "control-v11p-canny"
    (tmp_path / "a=b").mkdir()
    assert ControlNetFile.parse(f"x={tmp_path / 'a=b'}").path == tmp_path / "a=b"
    for name in ("", "Edges", "a_b", "-", "a" * 41):
        with pytest.raises(InvalidRequestError, match="give one as NAME=DIR"):
            ControlNetFile(name, path)
    with pytest.raises(InvalidRequestError, match="two ControlNets are called 'edges'"):
        steered(source, edges(path, 2))
    with pytest.raises(SourceError, match="does not exist"):
        steered(source, edges(tmp_path / "none"))
    assert ControlNetFiles.parse({}) is None
    with pytest.raises(SourceError, match=r"it is one for another model|but that of sdxl is"):
        steered(open_source(tiny.source("sdxl")), edges(path))
    with pytest.raises(InvalidRequestError, match="family stable-diffusion-xl-refiner is not supported"):
        steered(open_source(tiny.source("sdxl-refiner")), edges(path))


def test_weights_of_a_controlnet_are_checked(tiny: Any, tmp_path: Path) -> None:
    """What is missing is named when the weights are read."""
    copy = Path(shutil.copytree(tiny.controlnet("sd1"), tmp_path / "edges"))
    file = copy / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: values for name, values in tensors.items() if "mid_block" not in name}, file)
    source = steered(open_source(tiny.source("sd1")), edges(copy))
    with pytest.raises(SourceError, match=r"weights of edges do not fit its config\.json"):
        source.load_component("controlnet_edges")


def test_compiled_engines_of_controlnets_have_ranges(tiny: Any) -> None:
    """Every stage has one for each of its symbols; lengths of lower levels are rounded up."""
    model = steered(open_source(tiny.source("sd1")), edges(tiny.controlnet("sd1")))
    step = {"latent_height": Range(9, 17, 33), "latent_width": Range(16, 16, 16), "batch": Range(1, 1, 2)}
    ranges = {"unet_prompt": {"batch": Range(1, 1, 1)}, "unet_schedule": {"batch": Range(1, 20, 64)}, "unet_step": step}
    ranges["vae_encoder"] = {"height": Range(18, 34, 66), "width": Range(32, 32, 32)}
    found = model.adapters[0].ranges(ranges)
    parts = ("image", "prompt", "schedule", "step")
    assert set(found) == {"unet_control_step", *(f"controlnet_edges_{part}" for part in parts)}
    assert found["unet_control_step"]["latent_height_1"] == Range(5, 9, 17)
    assert found["controlnet_edges_image"]["height"] == Range(18, 34, 66)


@pytest.mark.heavy
def test_a_bundle_of_all_that_steers_is_whole(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Every graph is at its gate, the twins share the file of weights, and verify and inspect know them."""
    path = tiny.controlled("sd1")
    manifest = Bundle.open(path).manifest
    assert all(
        graph.file in manifest.quality for part in manifest.components.values() for graph in part.graphs.values()
    )
    for part in ("unet_step", "unet_control", "unet_control_step"):
        assert manifest.components[part].graphs["opset20-fp32"].external == ("unet/model.onnx.data",)
    adapter = tiny.ip_adapter("sd1")
    given = [
        "--controlnet",
        f"edges={tiny.controlnet('sd1')}",
        "--controlnet",
        f"depth={tiny.controlnet('sd1', 'bgr')}",
    ]
    given += [
        "--ip-adapter",
        str(adapter / "ip-adapter.safetensors"),
        "--image-encoder",
        str(adapter / "image_encoder"),
    ]
    assert main(["verify", str(path), "--source", str(tiny.source("sd1")), *given, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["psnr_db"]
    assert set(figures) == {file for file in manifest.quality if file.endswith(".onnx")}
    assert main(["inspect", str(path)]) == 0
    told = capsys.readouterr().out
    assert "ControlNets: depth edges" in told
    assert "IP-Adapter: images may be part of prompts" in told
