"""IP-Adapters and their image encoders (``clip_vision``): which do not fit a model, and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from latentrt.engines.errors import InvalidRequestError, SourceError
from latentrt.exporter.adapters.base import AdapterFiles
from latentrt.exporter.adapters.ip_adapter import IpAdapterFiles
from latentrt.exporter.adapters.registry import open_model
from latentrt.exporter.model import Model
from latentrt.exporter.source.opening import open_source
from latentrt.exporter.source.source import Source


def steered(source: Source, files: AdapterFiles) -> Model:
    """A source with one kind of adapter."""
    return open_model(source, [files])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("image_proj.proj.weight", None, "of another kind"),
        ("image_proj.norm.bias", None, "'image_proj.norm.bias' is missing"),
        ("ip_adapter.3.to_k_ip.weight", None, "'ip_adapter.3.to_k_ip.weight' is missing"),
        ("ip_adapter.3.to_k_ip.weight", np.zeros((2, 2), np.float32), r"has the shape \[2, 2\], expected \[32, 32\]"),
        ("ip_adapter.99.to_k_ip.weight", np.zeros((2, 2), np.float32), "has no place in sd1"),
        ("ip_adapter.1.to_k_lora.down.weight", np.zeros((2, 2), np.float32), "of another kind"),
    ],
)
def test_an_ip_adapter_that_does_not_fit(tiny: Any, tmp_path: Path, name: str, change: Any, message: str) -> None:
    """One sentence names the tensor."""
    given = tiny.ip_adapter("sd1")
    tensors = load_file(given / "ip-adapter.safetensors")
    tensors.pop(name, None)
    save_file({**tensors, **({} if change is None else {name: change})}, tmp_path / "ip.safetensors")
    with pytest.raises(SourceError, match=message):
        steered(open_source(tiny.source("sd1")), IpAdapterFiles(tmp_path / "ip.safetensors", given / "image_encoder"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["CLIPModel"]}, r"'architectures' is \['CLIPModel'\]"),
        ({"image_size": 4096}, "images have 4096 pixels a side"),
        ({"patch_size": 64}, "patches 64"),
        ({"projection_dim": 48}, "'image_proj.proj.weight' has the shape"),
        ({"num_hidden_layers": 10**4}, "which no model has"),
        ({"num_channels": 4}, "'num_channels' is 4, expected 3"),
        ({"hidden_size": 33}, "does not describe a model"),
    ],
)
def test_an_image_encoder_that_does_not_fit(tiny: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """One sentence names what is wrong."""
    given = tiny.ip_adapter("sd1")
    copy = Path(shutil.copytree(given / "image_encoder", tmp_path / "encoder"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SourceError, match=message):
        steered(open_source(tiny.source("sd1")), IpAdapterFiles(given / "ip-adapter.safetensors", copy))


def test_an_ip_adapter_comes_with_its_encoder(tiny: Any, tmp_path: Path) -> None:
    """One without the other, pickled files, and models that take none are refused; none at all is fine."""
    given, source = tiny.ip_adapter("sd1"), open_source(tiny.source("sd1"))
    assert IpAdapterFiles.parse({}) is None
    with pytest.raises(InvalidRequestError, match="goes with its image encoder"):
        IpAdapterFiles.parse({"ip_adapter": [str(given / "ip-adapter.safetensors")]})
    (tmp_path / "ip.bin").write_bytes(b"")
    with pytest.raises(SourceError, match=r"does not end with \.safetensors"):
        steered(source, IpAdapterFiles(tmp_path / "ip.bin", given / "image_encoder"))
    with pytest.raises(SourceError, match="does not exist"):
        steered(source, IpAdapterFiles(tmp_path / "none.safetensors", given / "image_encoder"))
    with pytest.raises(SourceError, match=r"the image encoder .* does not exist"):
        steered(source, IpAdapterFiles(given / "ip-adapter.safetensors", tmp_path / "none"))
    files = IpAdapterFiles(given / "ip-adapter.safetensors", given / "image_encoder")
    with pytest.raises(InvalidRequestError, match="takes its guidance in"):
        steered(open_source(tiny.source("lcm")), files)
