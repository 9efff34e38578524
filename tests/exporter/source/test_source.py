"""Sources are read without trust: what is damaged, hostile or unknown ends in one sentence."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from latentrt.engines.errors import SourceError
from latentrt.exporter.source.opening import Reading, open_source
from latentrt.exporter.source.source import Source

EditJson = Callable[..., None]
UNET = "unet/diffusion_pytorch_model.safetensors"
PARTS = ("text_encoder", "unet", "vae")


def load_all(source: Source) -> None:
    for part in PARTS:
        source.load(part)
    source.load_tokenizer()


def refusal(path: Path, *, load: bool = False) -> str:
    """The message with which a source is refused, at opening or else at loading."""
    if load:
        source = open_source(path)
        with pytest.raises(SourceError) as caught:
            load_all(source)
    else:
        with pytest.raises(SourceError) as caught:
            open_source(path)
    message = str(caught.value)
    assert "\n" not in message
    assert 10 < len(message) < 500
    return message


def test_opens_and_loads(tiny_source: Path) -> None:
    """A whole source gives modules that compute what the libraries' own loading gives."""
    source = open_source(tiny_source)
    assert source.family.name == "stable-diffusion"
    ids = torch.arange(7)[None]
    ours, theirs = source.load("text_encoder"), CLIPTextModel.from_pretrained(tiny_source / "text_encoder")
    with torch.no_grad():
        assert torch.equal(ours(ids).last_hidden_state, theirs(ids).last_hidden_state)
    reference = UNet2DConditionModel.from_pretrained(tiny_source / "unet").state_dict()
    loaded = source.load("unet")
    assert not loaded.training
    assert loaded.state_dict().keys() == reference.keys()
    assert all(torch.equal(tensor, reference[name]) for name, tensor in loaded.state_dict().items())


# --- the directory


def test_no_directory(tmp_path: Path) -> None:
    """A missing directory, a file, and a directory of something else are told apart."""
    assert "does not exist" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    assert "is a file" in refusal(tmp_path / "file")
    assert "model_index.json is missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b'{"a": ' + b"1" * 5000 + b"}", "cannot be read"),
    ],
    ids=["empty", "cut", "not-text", "deep", "list", "null", "long-number"],
)
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_broken_json(tiny_source: Path, file: str, content: bytes, expected: str) -> None:
    """A configuration that is no JSON object is named."""
    (tiny_source / file).write_bytes(content)
    message = refusal(tiny_source)
    assert expected in message
    assert Path(file).name in message


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json", UNET])
def test_missing_file(tiny_source: Path, file: str) -> None:
    """A file that is missing is named."""
    (tiny_source / file).unlink()
    assert f"{file} is missing" in refusal(tiny_source)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are a Unix thing")
def test_pipe_for_a_file(tiny_source: Path) -> None:
    """A named pipe in place of a configuration is refused rather than waited for."""
    (tiny_source / "unet" / "config.json").unlink()
    os.mkfifo(tiny_source / "unet" / "config.json")
    assert "no regular file" in refusal(tiny_source)


# --- links


@pytest.mark.parametrize(
    "place", ["model_index.json", "unet/config.json", UNET, "tokenizer/tokenizer.json", "scheduler", "vae"]
)
def test_link_out_of_the_directory(tiny_source: Path, tmp_path: Path, place: str) -> None:
    """A file or folder that is a link to somewhere else is refused: what is exported would not be the source's."""
    (tiny_source / place).rename(tmp_path / "elsewhere")
    (tiny_source / place).symlink_to(tmp_path / "elsewhere")
    assert refusal(tiny_source).startswith(f"{place} is a link out of source")


def test_links_that_stay(tiny_source: Path, tmp_path: Path) -> None:
    """Links inside the directory are followed, and so are those to the blobs of a hub's cache, and the path itself."""
    expected = open_source(tiny_source).fingerprint
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    tiny_source.rename(snapshot)
    (snapshot / UNET).rename(blobs / "1")
    (snapshot / UNET).symlink_to("../../../blobs/1")
    (snapshot / "vae").rename(snapshot / "other")
    (snapshot / "vae").symlink_to("other")
    (tmp_path / "link").symlink_to(snapshot)
    assert open_source(tmp_path / "link").fingerprint == expected
    (snapshot / UNET).unlink()
    (blobs / "1").rename(tmp_path / "cache" / "1")
    (snapshot / UNET).symlink_to("../../../1")
    assert "is a link out of" in refusal(snapshot)


# --- classes


@pytest.mark.parametrize("name", ["StableDiffusionUpscalePipeline", "os.system", "", None, [], {}, 7])
def test_unknown_pipeline(tiny_source: Path, edit_json: EditJson, name: Any) -> None:
    """A pipeline class that is not in the table is refused, whatever JSON stands in its place."""
    edit_json(tiny_source / "model_index.json", _class_name=name)
    assert "supported pipelines: StableDiffusionPipeline" in refusal(tiny_source)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer"])
@pytest.mark.parametrize("entry", [["os", "system"], [None, None], "UNet2DConditionModel", [["a"], {}], ..., 1])
def test_unknown_component_class(tiny_source: Path, edit_json: EditJson, component: str, entry: Any) -> None:
    """A component of another class is refused by name."""
    edit_json(tiny_source / "model_index.json", **{component: entry})
    message = refusal(tiny_source)
    assert message.startswith(component)
    assert "expected" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"_class_name": "EvilScheduler"}, "EvilScheduler"),
        ({"_class_name": ...}, "_class_name"),
        ({"beta_schedule": "exec"}, "beta_schedule"),
        ({"beta_start": "0.1"}, "beta_start"),
        ({"beta_start": math.nan}, ""),
        ({"beta_end": math.inf}, ""),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"prediction_type": "guess"}, "prediction_type"),
        ({"prediction_type": []}, "prediction_type"),
    ],
)
def test_scheduler(tiny_source: Path, edit_json: EditJson, changes: dict[str, Any], expected: str) -> None:
    """A scheduler that no sampler can follow is the source's fault, and is found before anything is exported."""
    edit_json(tiny_source / "scheduler" / "scheduler_config.json", **changes)
    message = refusal(tiny_source)
    assert message.startswith("scheduler/scheduler_config.json")
    assert expected in message


def test_unbounded_scheduler(tiny_source: Path, edit_json: EditJson) -> None:
    """diffusers' ``-Infinity`` for "no bound" is understood, and does not reach the bundle, which is proper JSON."""
    edit_json(
        tiny_source / "scheduler" / "scheduler_config.json",
        _class_name="DPMSolverMultistepScheduler",
        lambda_min_clipped=-math.inf,
    )
    assert "lambda_min_clipped" not in open_source(tiny_source).scheduler


def test_configs_run_no_code(tiny_source: Path, edit_json: EditJson, tmp_path: Path) -> None:
    """Class names, ``auto_map`` and modules beside the weights, by which a loader could run code, do nothing."""
    witness = tmp_path / "ran"
    code = f"open({str(witness)!r}, 'w').close()\nclass Evil:\n    pass\n"
    for part in (*PARTS, "tokenizer", "scheduler", "."):
        (tiny_source / part / "evil.py").write_text(code)
    for part in PARTS:
        changes = {"_class_name": "evil.Evil", "auto_map": {"AutoModel": "evil.Evil"}, "architectures": ["evil.Evil"]}
        edit_json(tiny_source / part / "config.json", **changes, trust_remote_code=True, custom_pipeline="evil")
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    edit_json(tiny_source / "tokenizer" / "tokenizer_config.json", **tokenizer)
    source = open_source(tiny_source)
    for part in PARTS:
        assert type(source.load(part)).__module__.startswith(("diffusers.", "transformers."))
    assert isinstance(source.load_tokenizer(), CLIPTokenizer)
    assert not witness.exists()


def test_switches_in_configs(tiny_source: Path, edit_json: EditJson) -> None:
    """Library switches in a configuration change neither element type nor what a module returns."""
    edit_json(
        tiny_source / "text_encoder" / "config.json",
        return_dict=False,
        torch_dtype="float16",
        dtype="float16",
        output_attentions=True,
        attn_implementation="evil/kernels",
    )
    module = open_source(tiny_source).load("text_encoder")
    assert {weight.dtype for weight in module.parameters()} == {torch.float32}
    with torch.no_grad():
        assert module(torch.zeros(1, 3, dtype=torch.int64)).attentions is None


# --- numbers


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet/config.json", {"block_out_channels": ...}),
        ("unet/config.json", {"block_out_channels": []}),
        ("unet/config.json", {"block_out_channels": "32"}),
        ("unet/config.json", {"block_out_channels": [32] * 60}),
        ("unet/config.json", {"block_out_channels": [32, 10**9]}),
        ("unet/config.json", {"block_out_channels": [32, 10**400]}),
        ("unet/config.json", {"layers_per_block": 10**5}),
        ("unet/config.json", {"transformer_layers_per_block": [200, 200]}),
        ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 1000}),
        ("unet/config.json", {"cross_attention_dim": [32, 32]}),
        ("unet/config.json", {"cross_attention_dim": 64}),
        ("unet/config.json", {"in_channels": 7}),
        ("unet/config.json", {"in_channels": True}),
        ("unet/config.json", {"sample_size": "16"}),
        ("unet/config.json", {"sample_size": [16]}),
        ("unet/config.json", {"sample_size": 10**6}),
        ("unet/config.json", {"sample_size": 16.5}),
        ("unet/config.json", {"norm_eps": math.nan}),
        ("unet/config.json", {"norm_eps": -math.inf}),
        ("unet/config.json", {"extra": json.loads("[" * 40 + "]" * 40)}),
        ("vae/config.json", {"block_out_channels": None}),
        ("vae/config.json", {"latent_channels": "4"}),
        ("vae/config.json", {"scaling_factor": 0}),
        ("vae/config.json", {"scaling_factor": None}),
        ("vae/config.json", {"shift_factor": "0"}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**5}),
        ("text_encoder/config.json", {"num_hidden_layers": 0}),
        ("text_encoder/config.json", {"max_position_embeddings": -1}),
        ("text_encoder/config.json", {"vocab_size": 1.5}),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:40],
)
def test_absurd_numbers(tiny_source: Path, edit_json: EditJson, file: str, changes: dict[str, Any]) -> None:
    """Numbers that no model has, or that contradict another component, are refused before anything is built."""
    edit_json(tiny_source / file, **changes)
    refusal(tiny_source)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("unet", {"attention_head_dim": 0}),
        ("unet", {"norm_num_groups": 7}),
        ("unet", {"down_block_types": ["Evil", "DownBlock2D"]}),
        ("unet", {"down_block_types": 5}),
        ("unet", {"act_fn": {}}),
        ("unet", {"block_out_channels": [32]}),
        ("unet", {"block_out_channels": [32, 128]}),
        ("unet", {"layers_per_block": 2}),
        ("vae", {"latent_channels": 4, "up_block_types": ["Evil"] * 2}),
        ("vae", {"out_channels": 4}),
        ("text_encoder", {"num_attention_heads": 5}),
        ("text_encoder", {"hidden_act": "evil"}),
        ("text_encoder", {"num_hidden_layers": 4}),
        ("text_encoder", {"intermediate_size": 10**6, "num_hidden_layers": 200}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value)[:40],
)
def test_config_and_weights_that_do_not_fit(
    tiny_source: Path, edit_json: EditJson, part: str, changes: dict[str, Any]
) -> None:
    """A configuration that describes no model, or another than the weights, is refused; nothing large is allocated."""
    edit_json(tiny_source / part / "config.json", **changes)
    assert part in refusal(tiny_source, load=True)


# --- weights


@pytest.mark.parametrize("fraction", [0, 0.00001, 0.0001, 0.01, 0.5, 0.9999])
def test_truncated_weights(tiny_source: Path, fraction: float) -> None:
    """Weights cut off anywhere are found damaged when the source is opened."""
    file = tiny_source / UNET
    os.truncate(file, int(file.stat().st_size * fraction))
    assert "unet/diffusion_pytorch_model.safetensors is damaged" in refusal(tiny_source)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**31, 2**63, 2**64 - 1])
def test_header_of_the_wrong_length(tiny_source: Path, length: int) -> None:
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
def test_hostile_header(tiny_source: Path, header: str) -> None:
    """Offsets, shapes and types that do not describe the file's content are refused."""
    content = header.encode()
    (tiny_source / UNET).write_bytes(struct.pack("<Q", len(content)) + content + bytes(4))
    assert "is damaged" in refusal(tiny_source)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(tiny_source: Path, value: float) -> None:
    """A weight that is not finite is named."""
    tensors = load_file(tiny_source / UNET)
    tensors["conv_in.bias"][3] = value
    save_file(tensors, tiny_source / UNET)
    assert "'conv_in.bias' holds NaN or infinity" in refusal(tiny_source, load=True)


class Witness:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_weights(tiny_source: Path, tmp_path: Path) -> None:
    """Pickled weights are refused, with the way out, and are never unpickled."""
    (tiny_source / UNET).unlink()
    (tiny_source / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Witness(tmp_path / "ran")))
    message = refusal(tiny_source)
    assert "pickled weights (diffusion_pytorch_model.bin)" in message
    assert "safetensors" in message
    assert not (tmp_path / "ran").exists()


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


def test_quantised_weights(tiny_source: Path) -> None:
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
def test_tensors_that_do_not_fit(tiny_source: Path, change: str) -> None:
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
def test_index_of_shards(tiny_source: Path, weight_map: Any) -> None:
    """An index that names anything but safetensors files beside it is refused."""
    (tiny_source / UNET).unlink()
    index = tiny_source / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert refusal(tiny_source).startswith("unet/")


def test_tensor_in_two_shards(tiny_source: Path) -> None:
    """Of a tensor that stands in two shards neither is preferred."""
    tensors = load_file(tiny_source / UNET)
    (tiny_source / UNET).unlink()
    for name in ("a", "b"):
        save_file(tensors, tiny_source / "unet" / f"{name}.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tiny_source / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "stands in two files" in refusal(tiny_source, load=True)


# --- the tokenizer


def test_incomplete_tokenizer(tiny_source: Path) -> None:
    """Without its vocabulary a tokenizer is refused; transformers would make one that knows no words."""
    (tiny_source / "tokenizer" / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(tiny_source, load=True)
    (tiny_source / "tokenizer" / "vocab.json").write_text("{}")
    assert "merges.txt" in refusal(tiny_source, load=True)


def test_tokenizer_of_gigabytes(tiny_source: Path) -> None:
    """A tokenizer's file that is far larger than any is not read."""
    os.truncate(tiny_source / "tokenizer" / "tokenizer.json", 2**31)
    assert "tokenizer/tokenizer.json has over 64 MiB" in refusal(tiny_source)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_tokenizer(tiny_source: Path, file: str) -> None:
    """A tokenizer's file that is no JSON is refused."""
    (tiny_source / "tokenizer" / file).write_text("{")
    assert "tokenizer" in refusal(tiny_source, load=True)


def test_tokenizer_and_text_encoder_that_do_not_fit(tiny_source: Path, edit_json: EditJson) -> None:
    """A tokenizer with more tokens than the text encoder embeds is refused."""
    file = tiny_source / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("token_embedding.weight")]
    save_file({**tensors, name: tensors[name][:100].clone()}, file)
    edit_json(tiny_source / "text_encoder" / "config.json", vocab_size=100)
    assert "only 100 tokens" in refusal(tiny_source, load=True)


# --- fingerprint and licence


def test_fingerprint(tiny_source: Path, edit_json: EditJson) -> None:
    """The fingerprint follows weights, configurations, tokenizer and scheduler, and nothing else."""
    seen = {open_source(tiny_source).fingerprint}
    (tiny_source / "README.md").write_text("---\nlicense: mit\n---\n")
    assert {open_source(tiny_source).fingerprint} == seen
    edit_json(tiny_source / "unet" / "config.json", norm_eps=1e-6)
    seen.add(open_source(tiny_source).fingerprint)
    edit_json(tiny_source / "scheduler" / "scheduler_config.json", steps_offset=0)
    seen.add(open_source(tiny_source).fingerprint)
    edit_json(tiny_source / "tokenizer" / "tokenizer_config.json", model_max_length=70)
    seen.add(open_source(tiny_source).fingerprint)
    tensors = load_file(tiny_source / UNET)
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, tiny_source / UNET)
    seen.add(open_source(tiny_source).fingerprint)
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (b"---\nlicense: creativeml-openrail-m\n---\n", "creativeml-openrail-m"),
        (b"---\nlicense:\n---\n", "unknown"),
        (b"\xff\xfe\x00", "unknown"),
        (b"license: " + b"x" * 9999, "x" * 200),
    ],
)
def test_licence(tiny_source: Path, card: bytes, licence: str) -> None:
    """The licence is the model card's, of bounded length; a card that cannot be read says nothing."""
    (tiny_source / "README.md").write_bytes(card)
    assert open_source(tiny_source).licence == licence
