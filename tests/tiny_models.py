"""Diffusers directories of seeded random weights, with the layout of real checkpoints: one function a family."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TOKENIZER = Path(__file__).resolve().parent.parent / "examples" / "emoji" / "tokenizer"
BETAS: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _from_the_start() -> None:
    """Draw what follows from the seed's beginning: parts that are alike are then equal in every family.

    Their graphs are exported once for all, see ``tests/shared_exports.py``.
    """
    torch.manual_seed(torch.initial_seed())


def _clip(
    tokenizer: CLIPTokenizer, kind: Any = CLIPTextModel, width: int = 32, *, alike: bool = True, **settings: Any
) -> Any:
    if alike:
        _from_the_start()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    model = kind(config).eval()
    # As in a trained one, states have a mean: what weighs tokens keeps it, and would divide by nothing.
    getattr(model, "text_model", model).final_layer_norm.bias.data += torch.linspace(-0.1, 0.3, width)
    return model


def _vae(**settings: Any) -> AutoencoderKL:
    _from_the_start()
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=32,
        **settings,
    ).eval()


def _shifted_vae() -> AutoencoderKL:
    """As SD3 and FLUX have it: more channels, a shift, and nothing between moments and latents."""
    bare = {"use_quant_conv": False, "use_post_quant_conv": False}
    return _vae(latent_channels=8, scaling_factor=1.5, shift_factor=0.06, **bare)


def write_spiece(path: Path) -> Path:
    """Train a small sentencepiece model with T5's ids and normalisation into ``path``/spiece.model."""
    model = io.BytesIO()  # a file's own path would be part of the model
    vocabulary = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words = [word.removesuffix("</w>") for word in vocabulary if word.isascii() and "<|" not in word]
    letters = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0x17F), 0x4E00, 0x4E01, 0x1F34E, 0x2019)]
    text = [" ".join(words[start : start + 9]) for start in range(0, len(words), 5)] + [" ".join(letters)] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 3),
        model_writer=model,
        vocab_size=700,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.mkdir(parents=True, exist_ok=True)
    (path / "spiece.model").write_bytes(model.getvalue())
    return path


def _t5(folder: Path, width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    tokenizer = T5Tokenizer.from_pretrained(write_spiece(folder))
    config = T5Config(
        vocab_size=len(tokenizer) + 28,  # more rows than tokens, as T5 has them
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval(), tokenizer


def _unet(**settings: Any) -> UNet2DConditionModel:
    """The U-Net of SD 1.x, with other settings where they are given."""
    usual: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**usual, **settings})


ONE_LEVEL: Mapping[str, Any] = {
    "block_out_channels": (32,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}
"""A U-Net of one level with one transformer, for models that differ in what it takes in: transformers take seconds each
to export."""


def stable_diffusion(path: Path, *, modern: bool, channels: int = 4) -> None:
    """SD 1.x: epsilon prediction, heads of one number in all blocks, PNDM scheduler.

    ``modern`` is SD 2.x: v prediction, heads by block, linear projections, GELU text encoder, DDIM scheduler. A model
    made for inpainting has a U-Net of nine ``channels`` and one level, all else is the same.
    """
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    text = _clip(tokenizer, hidden_act="gelu" if modern else "quick_gelu")
    settings: dict[str, Any] = {"attention_head_dim": [2, 4], "use_linear_projection": True} if modern else {}
    if channels != 4:
        settings = {"in_channels": channels, **ONE_LEVEL}
    schedule = {**BETAS, "set_alpha_to_one": False, "steps_offset": 1}
    scheduler = (
        DDIMScheduler(**schedule, clip_sample=False, prediction_type="v_prediction")
        if modern
        else PNDMScheduler(**schedule, skip_prk_steps=True)
    )
    pipeline = StableDiffusionPipeline if channels == 4 else StableDiffusionInpaintPipeline
    pipeline(
        text_encoder=text,
        unet=_unet(**settings).eval(),
        vae=_vae(),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path, safe_serialization=True)


def lcm_weights(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A U-Net that takes guidance in, which a random one would hardly heed."""
    unet.time_embedding.cond_proj.weight.data *= 8
    return unet.eval()


def latent_consistency(path: Path) -> None:
    """A latent consistency model of SD 1.x."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    unet = lcm_weights(_unet(time_cond_proj_dim=16, **ONE_LEVEL))
    LatentConsistencyModelPipeline(
        text_encoder=_clip(tokenizer, hidden_act="quick_gelu"),
        unet=unet,
        vae=_vae(),
        tokenizer=tokenizer,
        scheduler=LCMScheduler(**BETAS, set_alpha_to_one=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path, safe_serialization=True)


def stable_diffusion_xl(path: Path, *, consistent: bool = False, channels: int = 4) -> None:
    """SDXL: two text encoders of different widths, the second padding with another token, heads by level.

    ``consistent`` is a latent consistency model of it, of one level, with two blocks in its transformer. A model made
    for inpainting has a U-Net of nine ``channels`` and one level, all else is the same.
    """
    tokenizer, tokenizer_2 = (CLIPTokenizer.from_pretrained(TOKENIZER) for _ in range(2))
    tokenizer_2.pad_token = tokenizer_2.convert_ids_to_tokens(0)
    blocks: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
    }
    if consistent:
        blocks = {**ONE_LEVEL, "transformer_layers_per_block": 2, "time_cond_proj_dim": 17}
    elif channels != 4:
        blocks = {**ONE_LEVEL, "in_channels": channels}
    unet = _unet(
        **blocks,
        cross_attention_dim=32 + 48,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    for weight in unet.add_embedding.parameters():
        weight.data *= 4  # or sizes would hardly change a picture
    pipeline = StableDiffusionXLPipeline if channels == 4 else StableDiffusionXLInpaintPipeline
    pipeline(
        text_encoder=_clip(tokenizer),
        text_encoder_2=_clip(tokenizer_2, CLIPTextModelWithProjection, width=48, hidden_act="gelu", projection_dim=24),
        unet=lcm_weights(unet) if consistent else unet.eval(),
        vae=_vae(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=LCMScheduler(**BETAS)
        if consistent
        else EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    ).save_pretrained(path, safe_serialization=True)


def stable_diffusion_xl_refiner(path: Path) -> None:
    """SDXL's refiner: the second text encoder alone, attention in the middle levels, a score in place of a size."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    unet = _unet(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=48,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=5 * 8 + 24,
    )
    for weight in unet.add_embedding.parameters():
        weight.data *= 4  # as for the base
    StableDiffusionXLImg2ImgPipeline(
        text_encoder=None,
        text_encoder_2=_clip(tokenizer, CLIPTextModelWithProjection, width=48, hidden_act="gelu", projection_dim=24),
        unet=unet.eval(),
        vae=_vae(),
        tokenizer=None,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).save_pretrained(path, safe_serialization=True)


def controlnet(path: Path, source: Path, seed: int = 0, order: str = "rgb") -> Path:
    """A ControlNet for the U-Net of a source, with connections that are not zero, or it would do nothing."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(source / "unet", local_files_only=True)
    net = ControlNetModel.from_unet(
        unet,
        controlnet_conditioning_channel_order=order,
        conditioning_embedding_out_channels=(16, 32),
        load_weights_from_unet=False,
    )
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        for weight in block.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    net.eval().save_pretrained(path, safe_serialization=True)
    return path


def ip_adapter(path: Path, source: Path, seed: int = 0) -> Path:
    """An IP-Adapter ``ip-adapter.safetensors`` for the U-Net of a source, with its image encoder ``image_encoder``."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(source / "unet", local_files_only=True)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=24,
    )
    encoder = CLIPVisionModelWithProjection(config).eval()
    for weight in encoder.parameters():
        weight.data *= 3  # or all pictures would look alike
    encoder.save_pretrained(path / "image_encoder", safe_serialization=True)
    width, number = unet.config.cross_attention_dim, 1
    tensors = {
        "image_proj.proj.weight": torch.randn(4 * width, config.projection_dim),
        "image_proj.proj.bias": torch.randn(4 * width),
        "image_proj.norm.weight": torch.ones(width) * 2,
        "image_proj.norm.bias": torch.randn(width),
    }
    for name in unet.attn_processors:
        if not name.endswith("attn1.processor"):
            rows = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for layer in ("to_k_ip", "to_v_ip"):
                tensors[f"ip_adapter.{number}.{layer}.weight"] = torch.randn(rows, width) * 0.3
            number += 2
    save_file(tensors, path / "ip-adapter.safetensors")
    return path


def tiny_vae(path: Path, factor: int = 2, seed: int = 0) -> Path:
    """An AutoencoderTiny for the latents of the models here, with a scale of its own."""
    torch.manual_seed(seed)
    levels = factor.bit_length()
    AutoencoderTiny(
        encoder_block_out_channels=(16,) * levels,
        decoder_block_out_channels=(16,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(1,) * levels,
        scaling_factor=0.8,
        shift_factor=0.1,
    ).save_pretrained(path, safe_serialization=True)
    return path


def safety_checker(path: Path, seed: int = 0) -> Path:
    """A StableDiffusionSafetyChecker with its CLIPImageProcessor, which flags about a third of all pictures."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision.to_dict(), projection_dim=24)).eval()
    for weight in checker.parameters():
        weight.data *= 3  # or all pictures would look alike
    for name in ("concept_embeds", "special_care_embeds"):
        torch.nn.init.normal_(getattr(checker, name))
    torch.nn.init.uniform_(checker.concept_embeds_weights, 0.3, 0.4)  # cosines deviate by about 0.17
    torch.nn.init.uniform_(checker.special_care_embeds_weights, 0.1, 0.3)
    checker.save_pretrained(path, safe_serialization=True)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def stable_diffusion_3(path: Path, *, t5: bool) -> None:
    """SD3.5: normalised queries and keys, and a block of dual attention. Without T5 all other weights are the same."""
    vae = _shifted_vae()
    tokenizer, tokenizer_2 = (CLIPTokenizer.from_pretrained(TOKENIZER) for _ in range(2))
    tokenizer_2.pad_token = tokenizer_2.convert_ids_to_tokens(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=96,
        caption_projection_dim=32,
        pooled_projection_dim=16 + 24,
        pos_embed_max_size=32,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    _enliven(transformer)
    projected = functools.partial(_clip, kind=CLIPTextModelWithProjection, alike=False)
    text = projected(tokenizer, projection_dim=16)
    text_2 = projected(tokenizer_2, width=48, hidden_act="gelu", projection_dim=24)
    text_3, tokenizer_3 = _t5(path / "tokenizer_3", 96) if t5 else (None, None)
    StableDiffusion3Pipeline(
        text_encoder=text,
        text_encoder_2=text_2,
        text_encoder_3=text_3,
        transformer=transformer.eval(),
        vae=vae,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=tokenizer_3,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(path, safe_serialization=True)


def flux(path: Path, *, schnell: bool) -> None:
    """FLUX.1 dev: guidance as an input, a schedule shifted by the size. ``schnell`` has neither; all else is dev's.

    The VAE is that of :func:`stable_diffusion_3`.
    """
    vae = _shifted_vae()
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    text = _clip(tokenizer, alike=False)
    text_2, tokenizer_2 = _t5(path / "tokenizer_2", 48)
    transformer = FluxTransformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=32,
        guidance_embeds=not schnell,
        axes_dims_rope=(4, 6, 6),
    )
    _enliven(transformer)
    FluxPipeline(
        text_encoder=text,
        text_encoder_2=text_2,
        transformer=transformer.eval(),
        vae=vae,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0 if schnell else 3.0, use_dynamic_shifting=not schnell),
    ).save_pretrained(path, safe_serialization=True)


def _enliven(transformer: Any) -> None:
    """Sharpen attention and strengthen modulations, or texts and time would hardly change a picture."""
    for name, weight in transformer.named_parameters():
        if ("norm" in name and "linear" in name) or ("embedder" in name and weight.ndim == 2):
            weight.data *= 4
        elif any(part in name for part in ("norm_q", "norm_k", "norm_added", "add_v_proj.weight")):
            weight.data *= 3


WRITERS: Mapping[str, Callable[[Path], None]] = {
    "sd1": lambda path: stable_diffusion(path, modern=False),
    "sd2": lambda path: stable_diffusion(path, modern=True),
    "sd1-inpaint": lambda path: stable_diffusion(path, modern=False, channels=9),
    "lcm": latent_consistency,
    "sdxl": stable_diffusion_xl,
    "sdxl-inpaint": lambda path: stable_diffusion_xl(path, channels=9),
    "sdxl-lcm": lambda path: stable_diffusion_xl(path, consistent=True),
    "sdxl-refiner": stable_diffusion_xl_refiner,
    "sd3": lambda path: stable_diffusion_3(path, t5=False),
    "sd35": lambda path: stable_diffusion_3(path, t5=True),
    "flux-dev": lambda path: flux(path, schnell=False),
    "flux-schnell": lambda path: flux(path, schnell=True),
}

WITH_TINY_VAE = {"lcm"}
"""Kinds whose bundles get a tiny decoder too."""

WITH_SAFETY_CHECKER = {"lcm", "flux-schnell"}
"""Kinds whose bundles get a safety checker too."""


def write(path: Path, kind: str, seed: int = 0) -> Path:
    """Write a source of random weights.

    Args:
        path: Where to.
        kind: A key of :data:`WRITERS`.
        seed: Seed of the weights.
    """
    torch.manual_seed(seed)
    WRITERS[kind](path)
    return path
