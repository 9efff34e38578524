"""Models on a hub: the real client against a hub on this machine."""

from __future__ import annotations

import pickle
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.exporter.source.opening import Reading, open_source

NAME = Path("some-org/tiny.sd1")


@dataclass
class Hub:
    """A hub with a model, its files, the cache, and what was fetched so far."""

    model: Path
    cache: Path
    fetched: list[str]


def point_client(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    """What HF_ENDPOINT and HF_HUB_CACHE do when the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(hub_server: Any, tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the tiny SD 1.x model, with files beside it that nobody should fetch."""
    tensors = load_file(tiny_source / "unet" / "diffusion_pytorch_model.safetensors")
    half = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(half, tiny_source / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (tiny_source / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(None))
    (tiny_source / "unet" / "model.py").write_text("raise SystemExit")
    (tiny_source / "pipeline.py").write_text("raise SystemExit")
    (tiny_source / "README.md").write_text("---\nlicense: mit\n---\n")
    with hub_server.serve({str(NAME): tiny_source}) as (endpoint, fetched):
        point_client(monkeypatch, endpoint, tmp_path / "cache")
        yield Hub(tiny_source, tmp_path / "cache", fetched)


def refusal(name: Path = NAME, reading: Reading | None = None) -> str:
    with pytest.raises(SourceError) as caught:
        open_source(name, reading)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"'{name.as_posix()}' does not exist here, and ")
    return message


def test_model(hub: Hub) -> None:
    """A model on a hub is the directory that it is made of; only what is needed is fetched, and nothing twice."""
    source = open_source(NAME)
    assert source.name == NAME.as_posix()
    assert source.licence == "mit"
    assert source.fingerprint == open_source(hub.model).fingerprint
    assert set(hub.fetched) == {
        *("model_index.json", "README.md", "scheduler/scheduler_config.json"),
        *(f"{part}/config.json" for part in ("text_encoder", "unet", "vae")),
        *(f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")),
        *("text_encoder/model.safetensors", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    }
    count = len(hub.fetched)
    assert open_source(NAME, Reading(revision="main")).fingerprint == source.fingerprint
    assert len(hub.fetched) == count


def test_variant(hub: Hub) -> None:
    """The variant that is asked for is fetched in place of the other."""
    for part, stem in (("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        file = hub.model / part / f"{stem}.safetensors"
        shutil.copyfile(file, file.with_suffix(".fp16.safetensors"))
    source = open_source(NAME, Reading(variant="fp16"))
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.fetched
    assert "unet/diffusion_pytorch_model.safetensors" not in hub.fetched
    whole, half = open_source(hub.model).load("unet").state_dict(), source.load("unet").state_dict()
    assert all((half[name] == tensor.half().float()).all() for name, tensor in whole.items())
    assert any((half[name] != tensor).any() for name, tensor in whole.items())


def test_configuration_on_a_hub(hub: Hub, original_layout: Any, tmp_path: Path) -> None:
    """A single file may go with a configuration on a hub, of which no weights are fetched."""
    file = original_layout.write(tmp_path / "model.safetensors", hub.model, "sd1")
    local = open_source(file, Reading(config=hub.model))
    assert open_source(file, Reading(config=NAME)).fingerprint == local.fingerprint
    assert not any(name.endswith((".safetensors", ".bin", ".py")) for name in hub.fetched)


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched once is there without the hub, be it unreachable or forbidden; anything else is refused."""
    fingerprint = open_source(NAME).fingerprint
    point_client(monkeypatch, "http://127.0.0.1:9", hub.cache)
    assert open_source(NAME).fingerprint == fingerprint
    assert "the hub cannot be reached" in refusal(Path("some-org/other"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_source(NAME).fingerprint == fingerprint
    assert "the hub cannot be reached" in refusal(Path("some-org/other"))


@pytest.mark.usefixtures("hub")
def test_what_a_hub_refuses() -> None:
    """An unknown name, a revision that is not there, and terms that nobody accepted are told apart."""
    assert "the hub has no model of that name" in refusal(Path("some-org/unknown"))
    assert "has no revision 'v9'" in refusal(reading=Reading(revision="v9"))
    assert "accepted its terms" in refusal(Path("gated/model"))


def test_client_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the client the sentence says what to install."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert 'pip install "latentrt[hub]"' in refusal()


@pytest.mark.parametrize("name", ["models/sd15/unet", "model", "../model", "/nowhere/model", "a b/c", "org/"])
def test_paths_are_no_names(name: str) -> None:
    """What cannot be a name on a hub is a path that does not exist."""
    with pytest.raises(SourceError, match=r"source .* does not exist"):
        open_source(Path(name))


def test_options_of_a_hub(tiny_source: Path) -> None:
    """A revision is for a hub alone."""
    with pytest.raises(InvalidRequestError, match="no use for a revision"):
        open_source(tiny_source, Reading(revision="main"))
