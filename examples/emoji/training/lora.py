"""Train a LoRA of the emoji model: whatever it draws, in blue ink.

    python lora.py --output ../lora/blue-ink.safetensors

The model's own weights stay as they are; factors of rank 4 beside the attentions and the convolutions of the last
blocks learn to draw the training pictures with their brightness as ink. Takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from data import load_pictures
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch.nn import functional
from train import EMPTY_CAPTIONS, batches, caption_ids, save_sheet

MODEL = Path(__file__).resolve().parent.parent
RANK = 4
LAYERS = r".*\.(to_q|to_k|to_v|to_out\.0)|up_blocks\.[12]\.resnets\.\d\.conv[12]|conv_out"
INK, PAPER = (24, 40, 150), (255, 255, 255)
"""RGB of what was black, and of what was white."""


def blue_ink(pixels: np.ndarray) -> np.ndarray:
    """Pictures ``[..., 3]`` uint8 with their brightness (ITU-R BT.601) between ink and paper."""
    brightness = pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    ink, paper = np.array(INK, np.float32), np.array(PAPER, np.float32)
    return np.rint(ink + brightness[..., None] * (paper - ink)).astype(np.uint8)


def main() -> None:
    """Train, write the file, and draw a sheet beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    pictures = load_pictures()
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))
    learnt = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    print(f"{sum(parameter.numel() for parameter in learnt):,} parameters", flush=True)
    ids = caption_ids(pipe.tokenizer, pictures, 77)
    empty = pipe.tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids[0]
    inked = torch.from_numpy(blue_ink(np.stack([picture.pixels for picture in pictures])))
    with torch.no_grad():
        parts = (inked.permute(0, 3, 1, 2).float() / 127.5 - 1).split(32)
        latents = torch.cat([pipe.vae.encode(part).latent_dist.mean for part in parts])
    latents *= pipe.vae.config.scaling_factor
    alphas = pipe.scheduler.alphas_cumprod
    signal, noise_level = alphas.sqrt(), (1 - alphas).sqrt()
    generator = torch.Generator().manual_seed(arguments.seed)
    order = batches(len(pictures), arguments.batch, generator)
    optimizer, start = torch.optim.AdamW(learnt, lr=arguments.rate, weight_decay=0), time.perf_counter()
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                arguments.rate * min(1, (step + 1) / 30) * (1 + math.cos(math.pi * step / arguments.steps)) / 2
            )
        rows = next(order)
        tokens = ids[rows, torch.randint(ids.shape[1], (len(rows),), generator=generator)]
        tokens = torch.where(torch.rand(len(rows), 1, generator=generator) < EMPTY_CAPTIONS, empty, tokens)
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = ((torch.arange(len(rows)) + torch.rand(len(rows), generator=generator)) / len(rows) * 1000).long()
        a, s = signal[timesteps].view(-1, 1, 1, 1), noise_level[timesteps].view(-1, 1, 1, 1)
        with torch.no_grad():
            states = pipe.text_encoder(tokens).last_hidden_state
        predicted = pipe.unet(a * clean + s * noise, timesteps, states).sample
        loss = functional.mse_loss(predicted, a * noise - s * clean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 49:
            print(f"{step + 1} {loss.item():.4f} {time.perf_counter() - start:.0f} s", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    factors = {name: tensor.half() for name, tensor in get_peft_model_state_dict(pipe.unet).items()}
    StableDiffusionPipeline.save_lora_weights(
        arguments.output.parent, unet_lora_layers=factors, weight_name=arguments.output.name
    )
    drawn = []
    for pipe_scale in (0.0, 0.5, 1.0):
        pipe.unet.set_adapters("default", pipe_scale)
        names = [picture.captions[2] for picture in pictures[:: max(1, len(pictures) // 16)]][:16]
        drawn.append(
            pipe(
                names, num_inference_steps=12, guidance_scale=4.0, height=64, width=64, output_type="pt",
                generator=torch.Generator().manual_seed(0),
            ).images
        )  # fmt: skip
    sheet = arguments.output.with_suffix(".png")
    save_sheet(torch.cat(drawn) * 2 - 1, sheet)
    print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes; {sheet}: {Image.open(sheet).size}")


if __name__ == "__main__":
    main()
