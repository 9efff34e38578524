"""Sources and bundles that several parts of the suite share; each is made once a run."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
EMOJI = ROOT / "examples" / "emoji"


@pytest.fixture(scope="session")
def fake_gpu() -> Any:
    """The module ``tests/fake_gpu.py``: a make-believe GPU."""
    spec = importlib.util.spec_from_file_location("fake_gpu", Path(__file__).with_name("fake_gpu.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emoji_source() -> Path:
    """The diffusers directory of the emoji model."""
    return EMOJI


def write_tiny_source(path: Path, kind: str, seed: int = 0) -> Path:
    """Write a diffusers directory of seeded random weights, with the layout of a Stable Diffusion checkpoint.

    Args:
        path: Where to.
        kind: ``"sd1"``: epsilon prediction, heads of one number in all blocks, PNDM scheduler. ``"sd2"``: v prediction,
            heads by block, linear projections, GELU text encoder, DDIM scheduler.
        seed: Seed of the weights.
    """
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    modern = kind == "sd2"
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_act="gelu" if modern else "quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=[2, 4] if modern else 4,
        use_linear_projection=modern,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        sample_size=32,
    )
    schedule: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule |= {"set_alpha_to_one": False, "steps_offset": 1}
    scheduler = (
        DDIMScheduler(**schedule, clip_sample=False, prediction_type="v_prediction")
        if modern
        else PNDMScheduler(**schedule, skip_prk_steps=True)
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture(scope="session")
def tiny_sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random tiny sources ``sd1`` and ``sd2``; never to be changed, :func:`tiny_source` gives a copy."""
    root = tmp_path_factory.mktemp("sources")
    return {kind: write_tiny_source(root / kind, kind) for kind in ("sd1", "sd2")}


@pytest.fixture
def tiny_source(tiny_sources: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny SD 1.x source that a test may damage."""
    return Path(shutil.copytree(tiny_sources["sd1"], tmp_path / "source"))


@pytest.fixture(scope="session")
def bundle_cache(pytestconfig: pytest.Config) -> Path:
    """A directory that outlives the run, one for each state of the exporter's code.

    Exporting takes most of a test run's time, and the exporter itself finds out whether a bundle still fits its
    source. ``pytest --cache-clear`` starts afresh.
    """
    digest = hashlib.sha256()
    for file in sorted((ROOT / "exporter").rglob("*.py")):
        digest.update(file.read_bytes())
    assert pytestconfig.cache is not None
    return pytestconfig.cache.mkdir("bundles") / digest.hexdigest()[:16]


def _build(source: Path, output: Path) -> Path:
    from latentrt.exporter.build import BuildRequest, build_bundle

    output.parent.mkdir(parents=True, exist_ok=True)
    build_bundle(BuildRequest(source, output))
    return output


@pytest.fixture(scope="session")
def tiny_bundles(tiny_sources: dict[str, Path], bundle_cache: Path) -> dict[str, Path]:
    """Bundles of the tiny sources for ONNX Runtime; never to be changed, :func:`tiny_bundle` gives a copy."""
    return {kind: _build(source, bundle_cache / kind) for kind, source in tiny_sources.items()}


@pytest.fixture
def tiny_bundle(tiny_bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny SD 1.x bundle that a test may damage."""
    return Path(shutil.copytree(tiny_bundles["sd1"], tmp_path / "bundle"))


@pytest.fixture(scope="session")
def emoji_bundle(emoji_source: Path, bundle_cache: Path) -> Path:
    """The emoji model's bundle for ONNX Runtime; never to be changed."""
    return _build(emoji_source, bundle_cache / "emoji")
