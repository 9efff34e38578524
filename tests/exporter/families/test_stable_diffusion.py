"""Components of Stable Diffusion compute in a bundle what diffusers and transformers compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from latentrt.engines.errors import (
    SourceError,
)
from latentrt.engines.onnxrt import OnnxRuntimeEngine
from latentrt.exporter.families.stable_diffusion import StableDiffusion
from latentrt.exporter.model import Model
from latentrt.exporter.source.opening import open_source
from latentrt.exporter.verification.components import GATES
from latentrt.runtime.bundle.reader import Bundle

COMPONENTS = tuple(part for name in StableDiffusion.components for part in StableDiffusion().with_stages(name))
FORM = "opset20-fp32"
KINDS = ("sd1", "sd2")


@pytest.mark.heavy
@pytest.mark.parametrize("kind", KINDS)
def test_bundle_is_whole_and_good(tiny_bundles: dict[str, Path], kind: str, graph_files: tuple[str, ...]) -> None:
    """A bundle opens with every hash right, and each of its graphs has a figure above the gate."""
    bundle = Bundle.open(tiny_bundles[kind], verify_hash=True)
    assert tuple(bundle.manifest.components) == COMPONENTS
    assert set(bundle.manifest.quality) == set(graph_files)
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


def test_unknown_component(tiny_source: Path) -> None:
    """A component that a pipeline does not have is refused by name."""
    with pytest.raises(SourceError, match="no component 'safety_checker'"):
        Model(open_source(tiny_source)).load_component("safety_checker")
