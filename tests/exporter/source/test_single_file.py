"""Checkpoints in a single file: which model it is, its prediction and tokenizers, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.exporter.families import PIPELINES
from latentrt.exporter.source import single_file
from latentrt.exporter.source.opening import Reading, open_source
from latentrt.exporter.source.single_file import Header, recognise
from latentrt.exporter.source.single_file_configs import Published
from latentrt.runtime.cli import main

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
EditJson = Callable[..., None]
Checkpoints = Callable[[str], Path]
FileRefusal = Callable[..., str]


@pytest.fixture
def damage(checkpoints: Checkpoints, tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a copy of the tiny SD 1.x checkpoint with tensors changed; ``None`` removes one."""

    def change(changes: Mapping[str, Tensor | None], metadata: dict[str, str] | None = None) -> Path:
        tensors = {**load_file(checkpoints("sd1")), **changes}
        file = tmp_path / "damaged.safetensors"
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file, metadata)
        return file

    return change


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


def test_prediction_beside_a_configuration(checkpoints: Checkpoints, tiny: Any) -> None:
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


def test_tokenizer_of_ones_own(checkpoints: Checkpoints, tiny: Any, recognised: Callable[..., None]) -> None:
    """One folder serves both encoders of SDXL, and each pads as its model does."""
    recognised("sdxl", {"tokenizer": None, "tokenizer_2": "!"})
    directory = tiny.source("sdxl")
    source = open_source(checkpoints("sdxl"), Reading(tokenizer=directory / "tokenizer"))
    for name in ("tokenizer", "tokenizer_2"):
        ours, known = source.load_tokenizer(name), open_source(directory).load_tokenizer(name)
        assert ours.backend_tokenizer.to_str() == known.backend_tokenizer.to_str()
        assert ours.pad_token_id == known.pad_token_id
    assert source.load_tokenizer("tokenizer_2").pad_token_id == 0


def test_no_tokenizer(
    checkpoints: Checkpoints, recognised: Callable[..., None], tmp_path: Path, file_refusal: FileRefusal
) -> None:
    """Without a tokenizer the ways to name one are given; a folder that has none is refused."""
    recognised("sd1", {"tokenizer": None})
    message = file_refusal(checkpoints("sd1"), None)
    assert "--tokenizer DIR" in message
    assert "--config DIR" in message
    assert "neither tokenizer.json nor vocab.json" in tokenizer_refusal(checkpoints("sd1"), tmp_path)
    assert "does not exist" in file_refusal(checkpoints("sd1"), None, tokenizer=tmp_path / "absent" / "folder")


def tokenizer_refusal(file: Path, folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(file, Reading(tokenizer=folder)).load_tokenizer()
    return str(caught.value)


def test_options_that_do_not_suit(checkpoints: Checkpoints, tiny: Any, tmp_path: Path) -> None:
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
    damage: Callable[..., Path], tiny: Any, changes: dict[str, Tensor | None], expected: str, file_refusal: FileRefusal
) -> None:
    """A tensor that is missing, of another shape or type, not finite, or unknown is named, as the file names it."""
    message = file_refusal(damage(changes), tiny.source("sd1"))
    assert expected in message
    assert "damaged.safetensors" in message or "weights of unet" in message


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."])
def test_part_of_a_model(
    checkpoints: Checkpoints, tiny: Any, tmp_path: Path, prefix: str, file_refusal: FileRefusal
) -> None:
    """A file that lacks one part of the model says which."""
    tensors = {name: tensor for name, tensor in load_file(checkpoints("sd1")).items() if not name.startswith(prefix)}
    save_file(tensors, tmp_path / "part.safetensors")
    assert prefix in file_refusal(tmp_path / "part.safetensors", tiny.source("sd1"))


def test_other_sizes_than_published(checkpoints: Checkpoints, tiny: Any, file_refusal: FileRefusal) -> None:
    """A model of other sizes than the published one of its layout is refused with the way out."""
    message = file_refusal(checkpoints("sd1"), None, tokenizer=tiny.source("sd1") / "tokenizer")
    assert "give --config DIR" in message


def test_models_that_take_more_than_latents() -> None:
    """The number of channels is the file's own: a model for inpainting is taken, one for editing is not."""
    found, _ = recognise(Header(Path("x"), {**SD1, CONV_IN: (320, 9, 3, 3)}, {}))
    PIPELINES["StableDiffusionPipeline"].check(found.configs)
    found, _ = recognise(Header(Path("x"), {**SD1, CONV_IN: (320, 8, 3, 3)}, {}))
    with pytest.raises(SourceError, match="takes 8; U-Nets for editing"):
        PIPELINES["StableDiffusionPipeline"].check(found.configs)


def test_configuration_of_another_model(
    checkpoints: Checkpoints, tiny: Any, tmp_path: Path, edit_json: EditJson, file_refusal: FileRefusal
) -> None:
    """A configuration that is not this model's, absurd, of an unknown class or incomplete is refused."""
    assert "is sd1 the configuration of this model?" in file_refusal(checkpoints("sd2"), tiny.source("sd1"))
    config = tmp_path / "config"
    shutil.copytree(tiny.source("sd1"), config, ignore=shutil.ignore_patterns("*.safetensors"))
    open_source(checkpoints("sd1"), Reading(config=config))
    edit_json(config / "unet" / "config.json", layers_per_block=10**5)
    assert "'layers_per_block' is 100000, which no model has" in file_refusal(checkpoints("sd1"), config)
    edit_json(config / "unet" / "config.json", layers_per_block=1, down_block_types=["Evil", "DownBlock2D"])
    assert "unet/config.json does not describe a model" in file_refusal(checkpoints("sd1"), config)
    edit_json(config / "model_index.json", _class_name="os.system")
    assert "config is a 'os.system'" in file_refusal(checkpoints("sd1"), config)
    (config / "model_index.json").unlink()
    assert "model_index.json is missing" in file_refusal(checkpoints("sd1"), config)


@pytest.mark.parametrize("fraction", [0, 0.00001, 0.001, 0.5, 0.9999])
def test_truncated(
    checkpoints: Checkpoints, tiny: Any, tmp_path: Path, fraction: float, file_refusal: FileRefusal
) -> None:
    """A file cut off anywhere is found damaged before a weight is read."""
    file = Path(shutil.copyfile(checkpoints("sd1"), tmp_path / "cut.safetensors"))
    os.truncate(file, int(file.stat().st_size * fraction))
    assert file_refusal(file, tiny.source("sd1")).startswith("cut.safetensors is damaged")


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
def test_hostile_header(tiny: Any, tmp_path: Path, header: str, file_refusal: FileRefusal) -> None:
    """Offsets and shapes that do not describe the file's content are refused."""
    file, content = tmp_path / "hostile.safetensors", header.encode()
    file.write_bytes(struct.pack("<Q", len(content)) + content + bytes(8))
    assert "hostile.safetensors is damaged" in file_refusal(file, tiny.source("sd1"))


@pytest.mark.parametrize("length", [0, 2**31, 2**63, 2**64 - 1])
def test_header_of_gigabytes(tiny: Any, tmp_path: Path, length: int, file_refusal: FileRefusal) -> None:
    """A header that claims more than there is, or nothing, is refused without an attempt to allocate it."""
    file = tmp_path / "claims.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    assert f"its header claims {length:,} bytes" in file_refusal(file, tiny.source("sd1"))


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".pkl", ".CKPT", ".safetensors"])
def test_pickled(
    tiny: Any, tmp_path: Path, suffix: str, write_pickle: Callable[[Path], Path], file_refusal: FileRefusal
) -> None:
    """A pickled checkpoint is refused by its name, or by its content under a wrong one, and never unpickled."""
    file = tmp_path / f"model{suffix}"
    witness = write_pickle(file)
    expected = "is damaged" if suffix == ".safetensors" else "can run code when loaded; convert it to safetensors"
    assert expected in file_refusal(file, tiny.source("sd1"))
    assert not witness.exists()


def test_other_files(tmp_path: Path, file_refusal: FileRefusal) -> None:
    """A file of another kind is told from a model."""
    (tmp_path / "notes.txt").write_text("hello")
    assert "a .safetensors file or a diffusers directory is expected" in file_refusal(tmp_path / "notes.txt", None)


def test_command(checkpoints: Checkpoints, damage: Callable[..., Path], tiny: Any, tmp_path: Path, capsys: Any) -> None:
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
