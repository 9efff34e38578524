"""Checkpoints in a single file: which model it is, which tensor goes where, and what is refused."""

from __future__ import annotations

import importlib
import json
import math
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.exporter.families import PIPELINES
from latentrt.exporter.graphs.export import export_component
from latentrt.exporter.graphs.targets import PORTABLE
from latentrt.exporter.model import Model
from latentrt.exporter.source import single_file
from latentrt.exporter.source.opening import Reading, open_source
from latentrt.exporter.source.single_file import Header, SingleFileWeights, recognise
from latentrt.exporter.source.single_file_configs import Published
from latentrt.runtime import Bundle
from latentrt.runtime.cli import main

KINDS = ("sd1", "sd2", "sdxl")
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
EditJson = Callable[..., None]


class Files:
    """Checkpoints of the tiny sources, each written when it is first asked for; not to be changed."""

    def __init__(self, layout: Any, tiny: Any, directory: Path) -> None:
        self.layout, self._tiny, self._directory = layout, tiny, directory

    def __call__(self, kind: str) -> Path:
        file = self._directory / f"{kind}.safetensors"
        return file if file.exists() else Path(self.layout.write(file, self._tiny.source(kind), kind))


@pytest.fixture(scope="session")
def checkpoints(original_layout: Any, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Checkpoints by kind."""
    return Files(original_layout, tiny, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def damage(checkpoints: Files, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a copy of the tiny SD 1.x checkpoint with tensors changed; ``None`` removes one."""

    def change(changes: Mapping[str, Tensor | None], metadata: dict[str, str] | None = None) -> Path:
        tensors = {**load_file(checkpoints("sd1")), **changes}
        file = tmp_path / "damaged.safetensors"
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, metadata)
        return file

    return change


def load_all(file: Path, reading: Reading) -> None:
    source = open_source(file, reading)
    for part in source.family.parts:
        source.load(part)


def refusal(file: Path, config: Path | None, **reading: Any) -> str:
    """The message with which a file is refused, at opening or else at loading."""
    with pytest.raises(SourceError) as caught:
        load_all(file, Reading(config=config, **reading))
    message = str(caught.value)
    assert "\n" not in message
    assert 10 < len(message) < 500
    return message


def their_reading(kind: str, file: Path, directory: Path) -> dict[str, dict[str, Tensor]]:
    """What diffusers reads, by part."""
    tensors = load_file(file)
    found: dict[str, dict[str, Tensor]] = {}
    for name, model in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        config = dict(model.load_config(directory / name))
        convert = theirs.convert_ldm_unet_checkpoint if name == "unet" else theirs.convert_ldm_vae_checkpoint
        found[name] = convert(dict(tensors), config)
    if kind == "sd2":
        text = CLIPTextModel.from_pretrained(directory / "text_encoder")
        found["text_encoder"] = theirs.convert_open_clip_checkpoint(text, tensors)
    else:
        found["text_encoder"] = theirs.convert_ldm_clip_checkpoint(dict(tensors))
    if kind == "sdxl":
        text = CLIPTextModelWithProjection.from_pretrained(directory / "text_encoder_2")
        prefix = "conditioner.embedders.1.model."
        found["text_encoder_2"] = theirs.convert_open_clip_checkpoint(text, tensors, prefix)
    return found


def bare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names that transformers' versions agree on."""
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_of_the_directory(checkpoints: Files, tiny: Any, kind: str) -> None:
    """Each weight of a single file is, bit for bit, that of the directory it comes from, and what diffusers reads."""
    file, directory = checkpoints(kind), tiny.source(kind)
    ours, original = open_source(file, Reading(config=directory)), open_source(directory)
    assert ours.family is original.family
    assert ours.name == kind
    expected = their_reading(kind, file, directory)
    for part in original.family.parts:
        found, known = ours.load(part).state_dict(), original.load(part).state_dict()
        assert found.keys() == known.keys()
        assert all(torch.equal(tensor, known[name]) for name, tensor in found.items())
        read = bare(expected[part])
        assert all(torch.equal(tensor, read[name]) for name, tensor in bare(found).items())


@pytest.mark.heavy
def test_graphs_are_those_of_the_directory(checkpoints: Files, tiny: Any, shared_exports: Any, tmp_path: Path) -> None:
    """Graphs exported from a single file are, bit for bit, those of the directory, weights and all.

    What decides an export is the same for every component, and one is exported again.
    """
    bundle, directory = Bundle.open(tiny.bundle("sd1")), open_source(tiny.source("sd1"))
    source = open_source(checkpoints("sd1"), Reading(config=tiny.source("sd1")))
    for name in source.family.components:
        keys = {shared_exports.key(Model(each).load_component(name), PORTABLE) for each in (source, directory)}
        assert len(keys) == 1, name
    graph = export_component(Model(source).load_component("text_encoder"), PORTABLE, tmp_path)
    assert graph == bundle.graph("text_encoder", PORTABLE.name)
    for file in (graph.file, *graph.external):
        assert (tmp_path / file).read_bytes() == bundle.file(file).read_bytes()


# --- which model it is

# The parameters of the original configurations: v1-inference.yaml, v2-inference-v.yaml, sd_xl_base.yaml,
# sd_xl_refiner.yaml of the authors' repositories.
_SD: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": 2}
ORIGINAL: Mapping[str, dict[str, Any]] = {
    "sd1": {
        **_SD,
        "attention_resolutions": [4, 2, 1],
        "channel_mult": [1, 2, 4, 4],
        "num_heads": 8,
        "transformer_depth": 1,
        "context_dim": 768,
    },
    "sd2": {
        **_SD,
        "attention_resolutions": [4, 2, 1],
        "channel_mult": [1, 2, 4, 4],
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "transformer_depth": 1,
        "context_dim": 1024,
    },
    "sdxl": {
        **_SD,
        "attention_resolutions": [4, 2],
        "channel_mult": [1, 2, 4],
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "transformer_depth": [1, 2, 10],
        "context_dim": 2048,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
    },
    "refiner": {
        **_SD,
        "model_channels": 384,
        "attention_resolutions": [4, 2],
        "channel_mult": [1, 2, 4, 4],
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "transformer_depth": 4,
        "context_dim": [1280, 1280, 1280, 1280],
        "num_classes": "sequential",
        "adm_in_channels": 2560,
    },
}
VAE: dict[str, Any] = {
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "in_channels": 3,
    "out_ch": 3,
    "z_channels": 4,
}
# Millions of parameters of the text towers, from OpenCLIP's docs/model_profile.csv: ViT-L-14, ViT-H-14, ViT-bigG-14.
TOWERS = {"sd1": 123.65, "sd2": 354.03, "sdxl": 694.66, "refiner": 694.66}


def their_modules(kind: str) -> dict[str, Any]:
    """The published model as diffusers makes it from the original configuration, without weights."""
    original = {
        "model": {
            "params": {"unet_config": {"params": ORIGINAL[kind]}, "first_stage_config": {"params": {"ddconfig": VAE}}}
        }
    }
    # The checkpoint serves to find the size of the picture, which does not matter here.
    unet = theirs.create_unet_diffusers_config_from_ldm(original, {}, image_size=512)
    vae = theirs.create_vae_diffusers_config_from_ldm(original, {}, image_size=512)
    with torch.device("meta"):
        return {"unet": UNet2DConditionModel(**unet), "vae": AutoencoderKL(**vae)}


def published(kind: str) -> Published:
    """What we know of a published model."""
    names = {"sd1": "stable_diffusion_1", "sd2": "stable_diffusion_2", "sdxl": "stable_diffusion_xl"}
    module = importlib.import_module("latentrt.exporter.source.single_file_configs")
    found = getattr(module, names.get(kind, "stable_diffusion_xl_refiner"))("epsilon")
    assert isinstance(found, Published)
    return found


@pytest.mark.parametrize("kind", ORIGINAL)
@pytest.mark.filterwarnings("ignore:.*image_size.*:FutureWarning")
def test_published_models(original_layout: Any, kind: str) -> None:
    """A file with the names and shapes of a published model is recognised, and every tensor has its place."""
    parts = their_modules(kind)
    known = published(kind)
    with torch.device("meta"):
        for name, config in known.configs.items():
            if name.startswith("text"):
                model = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
                parts[name] = model(CLIPTextConfig(**config))
        tensors = original_layout.tensors(kind, parts)
    header = Header(Path(f"{kind}.safetensors"), {name: tuple(tensor.shape) for name, tensor in tensors.items()}, {})
    found, notes = recognise(header)
    assert found.title == known.title
    assert known.title in notes[0]
    for name in ("unet", "vae"):
        ours = {key: value for key, value in parts[name].config.items() if key in found.configs[name]}
        assert {key: _listed(value) for key, value in ours.items() if key not in _OWN} == {
            key: value for key, value in found.configs[name].items() if key in ours and key not in _OWN
        }
    prefix = {"sd1": "cond_stage_model.transformer", "sdxl": "conditioner.embedders.1.model"}.get(
        kind, "conditioner.embedders.0.model" if kind == "refiner" else "cond_stage_model.model"
    )
    held = [tensor.numel() for key, tensor in tensors.items() if key.startswith(prefix) and "position_ids" not in key]
    projection = 768 * 768 if kind == "sd1" else 0  # which transformers' CLIPTextModel does not have
    assert (sum(held) + projection) / 1e6 == pytest.approx(TOWERS[kind], abs=0.006)
    if found.index["_class_name"] in PIPELINES:
        SingleFileWeights(header, PIPELINES[found.index["_class_name"]], found.configs, "")


# Sizes of pictures, and what only half precision and scaling are about.
_OWN = ("sample_size", "scaling_factor", "upcast_attention")


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_scaling_of_latents() -> None:
    """Latents are scaled as the original configurations say."""
    scaling = {kind: published(kind).configs["vae"]["scaling_factor"] for kind in ORIGINAL}
    assert scaling == {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025, "refiner": 0.13025}


SD2 = {"cond_stage_model.model.ln_final.bias": (1024,), CONV_IN: (320, 4, 3, 3)}
SD1 = {"cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,), CONV_IN: (320, 4, 3, 3)}


@pytest.mark.parametrize(
    ("shapes", "metadata", "asked", "expected", "assumed"),
    [
        (SD1, {}, None, "epsilon", True),
        (SD1, {}, "v_prediction", "v_prediction", False),
        (SD2, {}, None, "v_prediction", True),
        (SD2, {}, "epsilon", "epsilon", False),
        (SD2, {"modelspec.prediction_type": "epsilon"}, None, "epsilon", False),
        (SD2, {"modelspec.prediction_type": "nonsense"}, None, "v_prediction", True),
        (SD1, {"modelspec.prediction_type": "v"}, None, "v_prediction", False),
        (SD1, {"modelspec.prediction_type": "v"}, "epsilon", "epsilon", False),
        ({**SD1, "v_pred": (0,)}, {}, None, "v_prediction", False),
    ],
)
def test_prediction(
    shapes: dict[str, tuple[int, ...]], metadata: dict[str, str], asked: str | None, expected: str, assumed: bool
) -> None:
    """What is predicted is what is asked for, else what the file says, else what is usual, and then a note says so."""
    found, notes = recognise(Header(Path("x.safetensors"), shapes, metadata), asked)
    assert found.scheduler["prediction_type"] == expected
    assert any("--prediction" in note for note in notes) is assumed


def test_size_of_stable_diffusion_2() -> None:
    """The model of 2.x that predicts velocity was trained at 768 pixels, the other one at 512."""
    sides = [
        recognise(Header(Path("x"), SD2, {}), prediction)[0].configs["unet"]["sample_size"] * 8
        for prediction in ("v_prediction", "epsilon")
    ]
    assert sides == [768, 512]


def test_prediction_beside_a_configuration(checkpoints: Files, tiny: Any) -> None:
    """What is asked for counts more than the scheduler of the configuration, and makes another fingerprint."""
    file, config = checkpoints("sd1"), tiny.source("sd1")
    plain, asked = (open_source(file, Reading(config=config, prediction=each)) for each in (None, "v_prediction"))
    assert plain.scheduler["prediction_type"] == "epsilon"
    assert asked.scheduler["prediction_type"] == "v_prediction"
    assert plain.fingerprint != asked.fingerprint


# --- tokenizers


@pytest.fixture
def recognised(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, str | None]], None]:
    """A function that lets a tiny checkpoint pass for a published model."""

    def pass_for(kind: str, padding: dict[str, str | None]) -> None:
        source = open_source(tiny.source(kind))
        known = Published(kind, source.index, source.configs, source.scheduler, padding)
        monkeypatch.setattr(single_file, "recognise", lambda header, prediction: (known, ()))

    return pass_for


def test_tokenizer_of_ones_own(checkpoints: Files, tiny: Any, recognised: Callable[..., None]) -> None:
    """One folder serves both encoders of SDXL, and each pads as its model does."""
    recognised("sdxl", {"tokenizer": None, "tokenizer_2": "!"})
    directory = tiny.source("sdxl")
    source = open_source(checkpoints("sdxl"), Reading(tokenizer=directory / "tokenizer"))
    for name in ("tokenizer", "tokenizer_2"):
        ours, known = source.load_tokenizer(name), open_source(directory).load_tokenizer(name)
        assert ours.backend_tokenizer.to_str() == known.backend_tokenizer.to_str()
        assert ours.pad_token_id == known.pad_token_id
    assert source.load_tokenizer("tokenizer_2").pad_token_id == 0


def test_no_tokenizer(checkpoints: Files, recognised: Callable[..., None], tmp_path: Path) -> None:
    """Without a tokenizer the ways to name one are given; a folder that has none is refused."""
    recognised("sd1", {"tokenizer": None})
    message = refusal(checkpoints("sd1"), None)
    assert "--tokenizer DIR" in message
    assert "--config DIR" in message
    assert "neither tokenizer.json nor vocab.json" in _tokenizer_refusal(checkpoints("sd1"), tmp_path)
    assert "does not exist" in refusal(checkpoints("sd1"), None, tokenizer=tmp_path / "absent" / "folder")


def _tokenizer_refusal(file: Path, folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(file, Reading(tokenizer=folder)).load_tokenizer()
    return str(caught.value)


def test_options_that_do_not_suit(checkpoints: Files, tiny: Any, tmp_path: Path) -> None:
    """An option that a kind of source has no use for is the caller's mistake."""
    directory = tiny.source("sd1")
    for reading in (Reading(config=directory), Reading(tokenizer=directory), Reading(prediction="epsilon")):
        with pytest.raises(InvalidRequestError, match="is a directory"):
            open_source(directory, reading)
    with pytest.raises(InvalidRequestError, match="is a single file"):
        open_source(checkpoints("sd1"), Reading(variant="fp16"))
    with pytest.raises(InvalidRequestError, match="not both"):
        Reading(config=directory, tokenizer=directory)
    with pytest.raises(InvalidRequestError, match="prediction is 'flow'"):
        Reading(prediction="flow")
    with pytest.raises(InvalidRequestError, match="variant is"):
        Reading(variant="../fp16")


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({CONV_IN: None}, "lacks 'conv_in.weight' of its unet"),
        ({"first_stage_model.quant_conv.bias": None}, "lacks 'quant_conv.bias' of its vae"),
        ({CONV_IN: torch.zeros(32, 4, 1, 1)}, f"{CONV_IN!r} gives the shape [32, 4, 1, 1], expected [32, 4, 3, 3]"),
        ({CONV_IN: torch.zeros(7)}, "gives the shape [7]"),
        ({CONV_IN: torch.full((32, 4, 3, 3), math.nan)}, "holds NaN or infinity"),
        ({CONV_IN: torch.full((32, 4, 3, 3), math.inf)}, "holds NaN or infinity"),
        ({CONV_IN: torch.zeros(32, 4, 3, 3, dtype=torch.int8)}, "quantised weights are not supported"),
        ({"first_stage_model.encoder.mid.attn_1.q.weight": torch.zeros(3)}, "gives the shape [3]"),
        ({"model.diffusion_model.input_blocks.0.0.scale": torch.zeros(1)}, "for which its unet has no place"),
        ({"model.diffusion_model.input_blocks.99.0.weight": torch.zeros(1)}, "has the tensor"),
        ({"model.diffusion_model.weight": torch.zeros(1)}, "has the tensor 'model.diffusion_model.weight'"),
        ({"extra": torch.zeros(1)}, "has the tensor 'extra', for which models of stable-diffusion have no place"),
        ({"lora_unet_mid.up": torch.zeros(1)}, "holds LoRA weights"),
        ({"control_model.input_hint": torch.zeros(1)}, "holds a ControlNet"),
        ({"down_blocks.0.weight": torch.zeros(1)}, "one part of a model"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else next(iter(value))[-30:],
)
def test_tensors_that_do_not_fit(
    damage: Callable[..., Path], tiny: Any, changes: dict[str, Tensor | None], expected: str
) -> None:
    """A tensor that is missing, of another shape or type, not finite, or unknown is named, as the file names it."""
    message = refusal(damage(changes), tiny.source("sd1"))
    assert expected in message
    assert "damaged.safetensors" in message or "weights of unet" in message


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."])
def test_part_of_a_model(checkpoints: Files, tiny: Any, tmp_path: Path, prefix: str) -> None:
    """A file that lacks one part of the model says which."""
    tensors = {name: tensor for name, tensor in load_file(checkpoints("sd1")).items() if not name.startswith(prefix)}
    save_file(tensors, tmp_path / "part.safetensors")
    assert prefix in refusal(tmp_path / "part.safetensors", tiny.source("sd1"))


def test_other_sizes_than_published(checkpoints: Files, tiny: Any) -> None:
    """A model of other sizes than the published one of its layout is refused with the way out."""
    message = refusal(checkpoints("sd1"), None, tokenizer=tiny.source("sd1") / "tokenizer")
    assert "give --config DIR" in message


def test_models_that_take_more_than_latents() -> None:
    """The number of channels is the file's own: a model for inpainting is taken, one for editing is not."""
    found, _ = recognise(Header(Path("x"), {**SD1, CONV_IN: (320, 9, 3, 3)}, {}))
    PIPELINES["StableDiffusionPipeline"].check(found.configs)
    found, _ = recognise(Header(Path("x"), {**SD1, CONV_IN: (320, 8, 3, 3)}, {}))
    with pytest.raises(SourceError, match="takes 8; U-Nets for editing"):
        PIPELINES["StableDiffusionPipeline"].check(found.configs)


def test_configuration_of_another_model(checkpoints: Files, tiny: Any, tmp_path: Path, edit_json: EditJson) -> None:
    """A configuration that is not this model's, absurd, of an unknown class or incomplete is refused."""
    assert "is sd1 the configuration of this model?" in refusal(checkpoints("sd2"), tiny.source("sd1"))
    config = tmp_path / "config"
    shutil.copytree(tiny.source("sd1"), config, ignore=shutil.ignore_patterns("*.safetensors"))
    open_source(checkpoints("sd1"), Reading(config=config))
    edit_json(config / "unet" / "config.json", layers_per_block=10**5)
    assert "'layers_per_block' is 100000, which no model has" in refusal(checkpoints("sd1"), config)
    edit_json(config / "unet" / "config.json", layers_per_block=1, down_block_types=["Evil", "DownBlock2D"])
    assert "unet/config.json does not describe a model" in refusal(checkpoints("sd1"), config)
    edit_json(config / "model_index.json", _class_name="os.system")
    assert "config is a 'os.system'" in refusal(checkpoints("sd1"), config)
    (config / "model_index.json").unlink()
    assert "model_index.json is missing" in refusal(checkpoints("sd1"), config)


@pytest.mark.parametrize("fraction", [0, 0.00001, 0.001, 0.5, 0.9999])
def test_truncated(checkpoints: Files, tiny: Any, tmp_path: Path, fraction: float) -> None:
    """A file cut off anywhere is found damaged before a weight is read."""
    file = Path(shutil.copyfile(checkpoints("sd1"), tmp_path / "cut.safetensors"))
    os.truncate(file, int(file.stat().st_size * fraction))
    assert refusal(file, tiny.source("sd1")).startswith("cut.safetensors is damaged")


@pytest.mark.parametrize(
    "header",
    [
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4000000000]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [1], '
        '"data_offsets": [4, 8]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}',
    ],
    ids=["out of bounds", "backwards", "overlapping", "gap", "overflow", "negative"],
)
def test_hostile_header(tiny: Any, tmp_path: Path, header: str) -> None:
    """Offsets and shapes that do not describe the file's content are refused."""
    file, content = tmp_path / "hostile.safetensors", header.encode()
    file.write_bytes(struct.pack("<Q", len(content)) + content + bytes(8))
    assert "hostile.safetensors is damaged" in refusal(file, tiny.source("sd1"))


@pytest.mark.parametrize("length", [0, 2**31, 2**63, 2**64 - 1])
def test_header_of_gigabytes(tiny: Any, tmp_path: Path, length: int) -> None:
    """A header that claims more than there is, or nothing, is refused without an attempt to allocate it."""
    file = tmp_path / "claims.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    assert f"its header claims {length:,} bytes" in refusal(file, tiny.source("sd1"))


class Witness:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".pkl", ".CKPT", ".safetensors"])
def test_pickled(tiny: Any, tmp_path: Path, suffix: str) -> None:
    """A pickled checkpoint is refused by its name, or by its content under a wrong one, and never unpickled."""
    file = tmp_path / f"model{suffix}"
    file.write_bytes(pickle.dumps(Witness(tmp_path / "ran")))
    expected = "is damaged" if suffix == ".safetensors" else "can run code when loaded; convert it to safetensors"
    assert expected in refusal(file, tiny.source("sd1"))
    assert not (tmp_path / "ran").exists()


def test_other_files(tmp_path: Path) -> None:
    """A file of another kind is told from a model."""
    (tmp_path / "notes.txt").write_text("hello")
    assert "a .safetensors file or a diffusers directory is expected" in refusal(tmp_path / "notes.txt", None)


def test_command(checkpoints: Files, damage: Callable[..., Path], tiny: Any, tmp_path: Path, capsys: Any) -> None:
    """The command ends in one sentence, and leaves nothing behind."""
    config = ["--config", str(tiny.source("sd1"))]
    output = ["--output", str(tmp_path / "bundle")]
    file = damage({CONV_IN: torch.full((32, 4, 3, 3), math.nan)})
    before = sorted(tmp_path.iterdir())
    assert main(["build-engine", str(file), *config, *output]) == 1
    assert "holds NaN or infinity" in capsys.readouterr().err.splitlines()[-1]
    assert main(["build-engine", str(checkpoints("sd1")), *output]) == 1
    assert "holds no tokenizer" in capsys.readouterr().err.splitlines()[-1]
    assert main(["build-engine", str(tiny.source("sd1")), *config, *output]) == 2
    assert sorted(tmp_path.iterdir()) == before


def test_licence(damage: Callable[..., Path], tiny: Any) -> None:
    """The licence in the file's metadata is carried over where no model card is given."""
    header = Header.read(damage({}, {"modelspec.license": "CreativeML\nOpen RAIL-M"}))
    assert header.licence == "CreativeML Open RAIL-M"
    assert json.loads(json.dumps(header.metadata)) == {"modelspec.license": "CreativeML\nOpen RAIL-M"}
