"""Symbolic links in a source: those that stay in it are followed, and all others are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from latentrt.exporter.source.opening import open_source

Refusal = Callable[..., str]

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    "place", ["model_index.json", "unet/config.json", UNET, "tokenizer/tokenizer.json", "scheduler", "vae"]
)
def test_link_out_of_the_directory(tiny_source: Path, tmp_path: Path, place: str, refusal: Refusal) -> None:
    """A file or folder that is a link to somewhere else is refused: what is exported would not be the source's."""
    (tiny_source / place).rename(tmp_path / "elsewhere")
    (tiny_source / place).symlink_to(tmp_path / "elsewhere")
    assert refusal(tiny_source).startswith(f"{place} is a link out of source")


def test_links_that_stay(tiny_source: Path, tmp_path: Path, refusal: Refusal) -> None:
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
