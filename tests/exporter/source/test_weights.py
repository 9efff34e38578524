"""Files of weights are read without trust: every layout and variant loads, and damage ends in one sentence."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from latentrt.engines.errors import SourceError
from latentrt.exporter.source.opening import Reading, open_source

Refusal = Callable[..., str]

UNET = "unet/diffusion_pytorch_model.safetensors"
PARTS = ("text_encoder", "unet", "vae")


@pytest.mark.parametrize("fraction", [0, 0.00001, 0.0001, 0.01, 0.5, 0.9999])
def test_truncated_weights(tiny_source: Path, fraction: float, refusal: Refusal) -> None:
    """Weights cut off anywhere are found damaged when the source is opened."""
    file = tiny_source / UNET
    os.truncate(file, int(file.stat().st_size * fraction))
    assert "unet/diffusion_pytorch_model.safetensors is damaged" in refusal(tiny_source)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**31, 2**63, 2**64 - 1])
def test_header_of_the_wrong_length(tiny_source: Path, length: int, refusal: Refusal) -> None:
    """A header that claims more than there is, or nothing, is refused without an attempt to allocate it."""
    with (tiny_source / UNET).open("r+b") as file:
        file.write(struct.pack("<Q", length))
    assert "is damaged" in refusal(tiny_source)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        '{"a": 1}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4000000000]}}',
        '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        '"b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        '{"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 4]}}',
    ],
)
def test_hostile_header(tiny_source: Path, header: str, refusal: Refusal) -> None:
    """Offsets, shapes and types that do not describe the file's content are refused."""
    content = header.encode()
    (tiny_source / UNET).write_bytes(struct.pack("<Q", len(content)) + content + bytes(4))
    assert "is damaged" in refusal(tiny_source)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(tiny_source: Path, value: float, refusal: Refusal) -> None:
    """A weight that is not finite is named."""
    tensors = load_file(tiny_source / UNET)
    tensors["conv_in.bias"][3] = value
    save_file(tensors, tiny_source / UNET)
    assert "'conv_in.bias' holds NaN or infinity" in refusal(tiny_source, load=True)


def test_pickled_weights(tiny_source: Path, write_pickle: Callable[[Path], Path], refusal: Refusal) -> None:
    """Pickled weights are refused, with the way out, and are never unpickled."""
    (tiny_source / UNET).unlink()
    witness = write_pickle(tiny_source / "unet" / "diffusion_pytorch_model.bin")
    message = refusal(tiny_source)
    assert "pickled weights (diffusion_pytorch_model.bin)" in message
    assert "safetensors" in message
    assert not witness.exists()


def test_half_precision_variant(tiny_source: Path) -> None:
    """Weights under the fp16 variant's name load, as fp32."""
    tensors = {name: tensor.half() for name, tensor in load_file(tiny_source / UNET).items()}
    (tiny_source / UNET).unlink()
    save_file(tensors, tiny_source / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    state = open_source(tiny_source).load("unet").state_dict()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in tensors.items())


def test_weights_that_stay_in_half_precision(tiny_source: Path) -> None:
    """Weights are loaded in the type that is asked for, and a part with one that leaves its range in fp32."""
    tensors = load_file(tiny_source / UNET)
    source = open_source(tiny_source)
    state = source.load("unet", torch.float16).state_dict()
    assert all(torch.equal(state[name], tensor.half()) for name, tensor in tensors.items())
    name = next(name for name in tensors if name.endswith("bias"))
    save_file({**tensors, name: tensors[name] + 1e6}, tiny_source / UNET)
    state = source.load("unet", torch.float16).state_dict()
    assert torch.equal(state[name], tensors[name] + 1e6)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_variant_that_is_asked_for(tiny_source: Path) -> None:
    """A variant that is asked for is taken, or its absence named, whatever else is there."""
    for part, stem in zip(PARTS, ("model", *["diffusion_pytorch_model"] * 2), strict=True):
        file = tiny_source / part / f"{stem}.safetensors"
        tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(tensors, file.with_suffix(".fp16.safetensors"))
    state = open_source(tiny_source, Reading(variant="fp16")).load("unet").state_dict()
    known = load_file(tiny_source / UNET)
    assert all(torch.equal(tensor, known[name].half().float()) for name, tensor in state.items())
    with pytest.raises(SourceError, match=r"text_encoder/model\.non_ema\.safetensors is missing"):
        open_source(tiny_source, Reading(variant="non_ema"))


def test_quantised_weights(tiny_source: Path, refusal: Refusal) -> None:
    """Whole numbers in place of weights are refused."""
    tensors = load_file(tiny_source / UNET)
    save_file({**tensors, "conv_in.bias": tensors["conv_in.bias"].to(torch.int8)}, tiny_source / UNET)
    assert "'conv_in.bias' is int8; quantised weights are not supported" in refusal(tiny_source, load=True)


def test_old_names_of_attention(tiny_source: Path) -> None:
    """Autoencoders with the names of diffusers' first releases, as Stable Diffusion 1.5 has, load."""
    file = tiny_source / "vae" / "diffusion_pytorch_model.safetensors"
    known = load_file(file)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in known.items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        renamed[name] = tensor
    assert renamed.keys() != known.keys()
    save_file(renamed, file)
    state = open_source(tiny_source).load("vae").state_dict()
    reference = AutoencoderKL.from_pretrained(tiny_source / "vae").state_dict()
    assert state.keys() == reference.keys()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in state.items())


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_tensors_that_do_not_fit(tiny_source: Path, change: str, refusal: Refusal) -> None:
    """A tensor that is missing, that has no place, or that is of another shape is named."""
    tensors = load_file(tiny_source / UNET)
    if change == "missing":
        del tensors["conv_in.bias"]
    else:
        tensors["conv_in.bias" if change == "shape" else "conv_extra.bias"] = torch.zeros(3)
    save_file(tensors, tiny_source / UNET)
    message = refusal(tiny_source, load=True)
    assert message.startswith("weights of unet do not fit its config.json")
    assert ("conv_extra.bias" if change == "extra" else "conv_in.bias") in message


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(tiny_source: Path, variant: str | None) -> None:
    """Shards as diffusers itself writes them load, with and without a variant."""
    model = UNet2DConditionModel.from_pretrained(tiny_source / "unet")
    (tiny_source / UNET).unlink()
    model.save_pretrained(tiny_source / "unet", max_shard_size="200KB", variant=variant)
    assert len(list((tiny_source / "unet").glob("*-of-*.safetensors"))) > 1
    state = open_source(tiny_source).load("unet").state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../vae/diffusion_pytorch_model.safetensors"},
        {"a": "/etc/passwd"},
        {"a": ".."},
        {"a": ""},
        {"a": ["x.safetensors"]},
        {"a": 1, "b": "x.safetensors"},
        {"a": "weights.bin"},
        {"a": "absent.safetensors"},
        {},
        [],
        None,
        "x",
    ],
    ids=str,
)
def test_index_of_shards(tiny_source: Path, weight_map: Any, refusal: Refusal) -> None:
    """An index that names anything but safetensors files beside it is refused."""
    (tiny_source / UNET).unlink()
    index = tiny_source / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(tiny_source).startswith("unet/")


def test_tensor_in_two_shards(tiny_source: Path, refusal: Refusal) -> None:
    """Of a tensor that stands in two shards neither is preferred."""
    tensors = load_file(tiny_source / UNET)
    (tiny_source / UNET).unlink()
    for name in ("a", "b"):
        save_file(tensors, tiny_source / "unet" / f"{name}.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tiny_source / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "stands in two files" in refusal(tiny_source, load=True)
