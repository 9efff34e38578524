"""Train the emoji model: autoencoder, text encoder, then U-Net and text encoder together.

    python train.py vae  --work build/emoji-training --steps 2000
    python train.py text --work build/emoji-training --steps 2000
    python train.py unet --work build/emoji-training --steps 6000
    python train.py save --work build/emoji-training --output examples/emoji

Every stage is seeded, keeps its state in ``--work`` and resumes from there; ``log.jsonl`` has a line every
50 steps, ``samples-*.png`` shows what the stage can do so far.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from data import Picture, load_pictures, thumbnail
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from model import WIDTH, new_scheduler, new_text_encoder, new_unet, new_vae, train_tokenizer
from muon import Muon
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

EMPTY_CAPTIONS = 0.1
"""Share of captions replaced by the empty one, so that the model can be guided away from it."""
Step = Callable[[torch.Generator], Tensor]


class Trainer:
    """AdamW with warm-up and cosine decay, an exponential moving average of the weights, and resumption."""

    def __init__(
        self,
        name: str,
        modules: nn.ModuleDict,
        work: Path,
        *,
        steps: int,
        rate: float,
        average: float,
        seed: int,
        muon: bool = False,
    ) -> None:
        self.name, self.modules, self.work, self.steps, self.rate, self.average = (
            name,
            modules,
            work,
            steps,
            rate,
            average,
        )
        hidden = {
            p
            for n, p in modules.named_parameters()
            if p.ndim > 1 and not any(k in n for k in ("embedding", "conv_in", "conv_out"))
        }
        hidden = hidden if muon else set()
        rest = [p for p in modules.parameters() if p not in hidden]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.99), weight_decay=1e-3)
        ]
        if muon:
            self.optimizers.append(Muon([p for p in modules.parameters() if p in hidden], lr=rate))
        self.smooth = copy.deepcopy(modules).requires_grad_(False)
        self.generator = torch.Generator().manual_seed(seed)
        self.step = 0
        if self.state.exists():
            saved = torch.load(self.state, weights_only=True)
            modules.load_state_dict(saved["modules"])
            self.smooth.load_state_dict(saved["smooth"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"] or [], strict=False):
                optimizer.load_state_dict(state)
            self.generator.set_state(saved["generator"])
            self.step = saved["step"]
            print(f"{name}: resuming at step {self.step}", flush=True)

    @property
    def state(self) -> Path:
        return self.work / f"{self.name}.pt"

    def save(self) -> None:
        temporary = self.state.with_suffix(".new")
        torch.save(
            {
                "modules": self.modules.state_dict(),
                "smooth": self.smooth.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "generator": self.generator.get_state(),
                "step": self.step,
            },
            temporary,
        )
        temporary.replace(self.state)

    def train(self, loss_of: Step, show: Callable[[nn.ModuleDict], dict[str, float]], every: int = 500) -> None:
        """Run to the last step; ``show`` draws what the averaged weights can do and returns figures to log."""
        recent: list[float] = []
        since = time.perf_counter()
        while self.step < self.steps:
            progress = self.step / self.steps
            rate = self.rate * min(1.0, (self.step + 1) / 100) * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group["lr"] = rate
            loss = loss_of(self.generator)
            loss.backward()
            nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.step += 1
            decay = min(self.average, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.smooth.parameters()), list(self.modules.parameters()), 1 - decay)
            recent.append(loss.item())
            last = self.step == self.steps
            if self.step % 50 == 0 or last:
                row: dict[str, object] = {
                    "stage": self.name,
                    "step": self.step,
                    "loss": round(float(np.mean(recent)), 5),
                }
                row["seconds_per_step"] = round((time.perf_counter() - since) / len(recent), 3)
                if self.step % every == 0 or last:
                    row |= {key: round(value, 4) for key, value in show(self.smooth).items()}
                    self.save()
                print(json.dumps(row), flush=True)
                with (self.work / "log.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
                recent, since = [], time.perf_counter()


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of whole shuffled passes over ``count`` items, cut into batches."""
    while True:
        yield from torch.randperm(count, generator=generator)[: count // size * size].split(size)


def as_tensor(pictures: list[Picture]) -> Tensor:
    """Pixels as float32 ``[count, 3, 64, 64]`` in [-1, 1]."""
    return torch.from_numpy(np.stack([picture.pixels for picture in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_sheet(pixels: Tensor, path: Path, columns: int = 16) -> None:
    """Write float pictures ``[count, 3, H, W]`` in [-1, 1] as one sheet."""
    array = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = math.ceil(len(array) / columns)
    sheet = np.full((rows * 64, columns * 64, 3), 255, np.uint8)
    for index, picture in enumerate(array):
        top, left = index // columns * 64, index % columns * 64
        sheet[top : top + 64, left : left + 64] = picture
    Image.fromarray(sheet).save(path)


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean peak signal-to-noise ratio over pictures in [-1, 1], in dB."""
    return float((10 * torch.log10(4 / (a.clamp(-1, 1) - b).square().flatten(1).mean(1))).mean())


def train_vae(pictures: list[Picture], work: Path, steps: int, seed: int) -> None:
    images = as_tensor(pictures)
    trainer = Trainer("vae", nn.ModuleDict({"vae": new_vae()}), work, steps=steps, rate=2e-3, average=0.995, seed=seed)
    trainer.modules.to(memory_format=torch.channels_last)
    order = batches(len(images), 16, trainer.generator)

    def edges(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.diff(dim=-1), x.diff(dim=-2)

    def loss_of(generator: torch.Generator) -> Tensor:
        vae: AutoencoderKL = trainer.modules["vae"]  # type: ignore[assignment]
        target = images[next(order)].contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        drawn = vae.decode(posterior.mean + posterior.std * noise).sample
        sharp = sum(functional.l1_loss(a, b) for a, b in zip(edges(drawn), edges(target), strict=True))
        pixel = functional.l1_loss(drawn, target) + 2 * functional.mse_loss(drawn, target)
        return pixel + 0.25 * sharp + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    def show(modules: nn.ModuleDict) -> dict[str, float]:
        vae: AutoencoderKL = modules["vae"]  # type: ignore[assignment]
        with torch.no_grad():
            latents = torch.cat([vae.encode(part).latent_dist.mean for part in images[::6].split(32)])
            drawn = torch.cat([vae.decode(part).sample for part in latents.split(32)])
        save_sheet(torch.cat([images[::6][:64], drawn[:64]]), work / "samples-vae.png")
        return {"psnr": psnr(drawn, images[::6]), "latent_std": float(latents.std())}

    trainer.train(loss_of, show)


def load_vae(work: Path) -> AutoencoderKL:
    vae = new_vae()
    saved = torch.load(work / "vae.pt", weights_only=True)["smooth"]
    vae.load_state_dict({key.removeprefix("vae."): value for key, value in saved.items()})
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: list[Picture]) -> tuple[Tensor, Tensor, float]:
    """Mean and standard deviation of every picture's latents, scaled to unit variance, and the scale."""
    posteriors = [vae.encode(part).latent_dist for part in as_tensor(pictures).split(32)]
    mean, std = torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])
    scale = float(1 / mean.std())
    return mean * scale, std * scale, scale


def caption_ids(tokenizer: CLIPTokenizer, pictures: list[Picture], length: int) -> Tensor:
    """Token ids ``[pictures, captions, length]``."""
    flat = [caption for picture in pictures for caption in picture.captions]
    ids = tokenizer(flat, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return ids.reshape(len(pictures), -1, length)


def train_text(pictures: list[Picture], work: Path, steps: int, seed: int) -> None:
    """Teach the text encoder what its captions look like, as CLIP's was taught: match each caption to its picture."""
    tokenizer = train_tokenizer([c for p in pictures for c in p.captions], work / "tokenizer")
    ids = caption_ids(tokenizer, pictures, 16)
    thumbs = torch.from_numpy(thumbnail(np.stack([p.pixels for p in pictures])))
    left, strength, _ = torch.linalg.svd(thumbs - thumbs.mean(0), full_matrices=False)
    target = left[:, :WIDTH] * strength[:WIDTH].sqrt()  # half-whitened principal components
    target = target / target.std()
    torch.manual_seed(seed)
    modules = nn.ModuleDict(
        {"text": new_text_encoder(len(tokenizer)), "head": nn.Linear(WIDTH, WIDTH), "logits": nn.Linear(WIDTH, WIDTH)}
    )
    trainer = Trainer("text", modules, work, steps=steps, rate=1e-3, average=0.99, seed=seed)
    order = batches(len(pictures), 96, trainer.generator)

    def outputs(modules: nn.ModuleDict, tokens: Tensor) -> tuple[Tensor, Tensor]:
        states = modules["text"](tokens).last_hidden_state
        pooled = states[torch.arange(len(tokens)), (tokens == tokenizer.eos_token_id).int().argmax(1)]
        query = functional.normalize(modules["logits"](pooled), dim=-1)
        return modules["head"](pooled), 20 * query @ functional.normalize(target, dim=-1).T

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = next(order)
        tokens = ids[rows, torch.randint(ids.shape[1], (len(rows),), generator=generator)]
        regressed, logits = outputs(trainer.modules, tokens)
        return functional.mse_loss(regressed, target[rows]) + 0.2 * functional.cross_entropy(logits, rows)

    def show(modules: nn.ModuleDict) -> dict[str, float]:
        with torch.no_grad():
            regressed, logits = outputs(modules, ids[:, 3])
        right = (logits.argmax(1) == torch.arange(len(ids))).float().mean()
        return {"caption_matches": float(right), "explained": float(1 - (regressed - target).var() / target.var())}

    trainer.train(loss_of, show)


def train_unet(pictures: list[Picture], work: Path, steps: int, seed: int) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    vae = load_vae(work)
    mean, std, scale = encode_pictures(vae, pictures)
    ids = caption_ids(tokenizer, pictures, 77)
    empty = tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids[0]
    text = new_text_encoder(len(tokenizer))
    pretrained = torch.load(work / "text.pt", weights_only=True)["smooth"]
    text.load_state_dict(
        {key.removeprefix("text."): value for key, value in pretrained.items() if key.startswith("text.")}
    )
    torch.manual_seed(seed)
    trainer = Trainer(
        "unet",
        nn.ModuleDict({"unet": new_unet(), "text": text}),
        work,
        steps=steps,
        rate=1.2e-3,
        average=0.998,
        seed=seed,
        muon=True,
    )
    scheduler = new_scheduler()
    signal, noise_level = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    order = batches(len(pictures), 32, trainer.generator)

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = next(order)
        tokens = ids[rows, torch.randint(ids.shape[1], (len(rows),), generator=generator)]
        tokens = torch.where(torch.rand(len(rows), 1, generator=generator) < EMPTY_CAPTIONS, empty, tokens)
        noise = torch.randn(mean[rows].shape, generator=generator)
        latents = mean[rows] + std[rows] * torch.randn(noise.shape, generator=generator)
        # One timestep in each of as many strata as the batch has rows: less variance. More of them where noise
        # prevails, since there the picture has to come from the caption.
        strata = (torch.arange(len(rows)) + torch.rand(len(rows), generator=generator)) / len(rows)
        timesteps = (strata**0.7 * len(signal)).long()
        a, s = signal[timesteps].view(-1, 1, 1, 1), noise_level[timesteps].view(-1, 1, 1, 1)
        states = trainer.modules["text"](tokens).last_hidden_state
        predicted = trainer.modules["unet"](a * latents + s * noise, timesteps, states).sample
        return functional.mse_loss(predicted, a * noise - s * latents)

    chosen = list(range(0, len(pictures), max(1, len(pictures) // 64)))[:64]
    thumbs = torch.from_numpy(thumbnail(np.stack([p.pixels for p in pictures])))

    def show(modules: nn.ModuleDict) -> dict[str, float]:
        pipe = assemble(modules["unet"], modules["text"], vae, tokenizer, scale)  # type: ignore[arg-type]
        pipe.set_progress_bar_config(disable=True)
        drawn = pipe(
            [pictures[i].captions[2] for i in chosen], num_inference_steps=12, guidance_scale=4.0, height=64, width=64,
            generator=torch.Generator().manual_seed(0), output_type="pt",
        ).images  # fmt: skip
        save_sheet(drawn * 2 - 1, work / "samples-unet.png")
        small = torch.from_numpy(thumbnail((drawn * 255).permute(0, 2, 3, 1).numpy()))
        nearest = torch.cdist(small, thumbs).argmin(1)
        return {"nearest_is_right": float((nearest == torch.tensor(chosen)).float().mean())}

    trainer.train(loss_of, show)


def assemble(
    unet: UNet2DConditionModel, text: CLIPTextModel, vae: AutoencoderKL, tokenizer: CLIPTokenizer, scale: float
) -> StableDiffusionPipeline:
    """The diffusers pipeline that the trained networks make; ``scale`` brings latents to unit variance."""
    vae.register_to_config(scaling_factor=scale)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text.eval(), tokenizer=tokenizer, unet=unet.eval(), scheduler=new_scheduler(),
        safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False,
    )  # fmt: skip


def save(pictures: list[Picture], work: Path, output: Path) -> None:
    """Write the averaged weights as a diffusers directory in fp16 safetensors."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    modules = nn.ModuleDict({"unet": new_unet(), "text": new_text_encoder(len(tokenizer))})
    modules.load_state_dict(torch.load(work / "unet.pt", weights_only=True)["smooth"])
    vae = load_vae(work)
    scale = encode_pictures(vae, pictures)[2]
    pipe = assemble(modules["unet"], modules["text"], vae, tokenizer, scale)  # type: ignore[arg-type]
    pipe.to(dtype=torch.float16)
    pipe.save_pretrained(output, safe_serialization=True)
    captions = [{"emoji": p.text, "name": p.name} for p in pictures]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in captions)
    (output / "captions.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("vae", "text", "unet", "save"))
    parser.add_argument("--work", type=Path, required=True, help="where states, logs and samples are kept")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where 'save' writes the diffusers directory")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    pictures = load_pictures()
    if arguments.stage == "save":
        if arguments.output is None:
            parser.error("save needs --output")
        save(pictures, arguments.work, arguments.output)
    else:
        stage = {"vae": train_vae, "text": train_text, "unet": train_unet}[arguments.stage]
        stage(pictures, arguments.work, arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
