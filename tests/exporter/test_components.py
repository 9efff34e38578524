"""Components as functions of tensors: what they add to the modules of diffusers and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from latentrt.exporter.components import Decoder, Denoiser, Encoder, InpaintingDenoiser, TextEncoder, embeddings_added
from latentrt.exporter.families.stable_diffusion import StableDiffusion
from latentrt.exporter.model import Model
from latentrt.exporter.source.opening import open_source

WORDS, WIDTH = 60, 16


def text_model(words: int = WORDS) -> CLIPTextModel:
    """A text encoder of two layers, whose end of text is the largest token of the smaller table."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": WORDS - 1, "pad_token_id": WORDS - 1}
    return CLIPTextModel(CLIPTextConfig(vocab_size=words, max_position_embeddings=12, **sizes, **ids)).eval()


def table_of(model: Any) -> Any:
    return getattr(model, "text_model", model).embeddings.token_embedding


def test_added_vectors_are_read_as_tokens_of_a_larger_table() -> None:
    """A vector at -1 or -2 does what it does as a row behind the table, up to the pooled state."""
    small, large, vectors = text_model(), text_model(WORDS + 2), torch.randn(2, WIDTH)
    large.load_state_dict({name: each for name, each in small.state_dict().items() if "token_emb" not in name}, False)
    table_of(large).weight.data[:] = torch.cat([table_of(small).weight.data, vectors])
    ids = torch.tensor([[0, 5, -1, 7, -2, WORDS - 1], [0, -2, -2, WORDS - 1, WORDS - 1, WORDS - 1]])
    with torch.no_grad():
        last, penultimate, pooled = TextEncoder(small)(ids, vectors)
        rows = torch.where(ids < 0, WORDS - 1 - ids, ids)
        expected = large(rows, output_hidden_states=True)
        norm = getattr(large, "text_model", large).final_layer_norm
        torch.testing.assert_close(last, expected.last_hidden_state)
        torch.testing.assert_close(penultimate, norm(expected.hidden_states[-2]))
    ends = (ids == WORDS - 1).int().argmax(dim=1)
    torch.testing.assert_close(pooled, last[torch.arange(2), ends])


def test_added_vectors_are_gone_afterwards() -> None:
    """The model reads its own table again, also where the statement is left with an error."""
    model, ids = text_model(), torch.tensor([[0, 3, WORDS - 1]])

    def interrupted() -> None:
        with embeddings_added(model, torch.full_like(ids, -1), torch.ones(1, WIDTH)) as plain:
            assert plain.tolist() == [[0, 0, 0]]
            assert not torch.equal(model(ids).last_hidden_state, before)
            raise KeyError

    with torch.no_grad():
        before = model(ids).last_hidden_state
        with pytest.raises(KeyError):
            interrupted()
        torch.testing.assert_close(model(ids).last_hidden_state, before, rtol=0, atol=0)


def test_denoisers_predict_what_diffusers_predicts(tiny: Any) -> None:
    """A U-Net for inpainting gets mask and masked image behind the latents, joined by channel."""
    unet = UNet2DConditionModel.from_pretrained(tiny.source("sd1") / "unet").eval()
    sample, time, text = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 7.0]), torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = unet(sample, time, text).sample
        torch.testing.assert_close(Denoiser(unet)(sample, time, text), expected)
        torch.testing.assert_close(InpaintingDenoiser(unet)(sample[:, :1], sample[:, 1:], time, text), expected)


def test_the_vae_in_halves(tiny: Any) -> None:
    """Latents are decoded as they are, and an image is encoded to mean and log variance, before any scaling."""
    vae = AutoencoderKL.from_pretrained(tiny.source("sd1") / "vae").eval()
    latents, pixels = torch.randn(1, 4, 4, 6), torch.rand(1, 3, 8, 12) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(Decoder(vae)(latents), vae.decode(latents).sample)
        posterior = vae.encode(pixels).latent_dist
        torch.testing.assert_close(Encoder(vae)(pixels), torch.cat([posterior.mean, posterior.logvar], dim=1))


@pytest.mark.parametrize("name", StableDiffusion.components)
def test_examples_are_drawn_from_the_seed(tiny_source: Path, name: str) -> None:
    """One seed gives one example, which the component takes, and another seed gives another."""
    model = Model(open_source(tiny_source))
    first, again, other = (model.load_component(name, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(value, again.example[key]) for key, value in first.example.items())
    assert not all(torch.equal(value, other.example[key]) for key, value in first.example.items())
    with torch.no_grad():
        results = first.module(*first.example.values())
    results = results if isinstance(results, tuple) else (results,)
    assert len(results) == len(first.outputs)
