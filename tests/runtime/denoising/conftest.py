"""The tiny model with either loop, for the tests of this room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latentrt.runtime import Pipeline


@pytest.fixture(scope="module", params=["fused", "plain"])
def looped(request: pytest.FixtureRequest, tiny_bundles: dict[str, Path]) -> Iterator[Pipeline]:
    """The tiny SD 1.x model with either loop."""
    with Pipeline.load(tiny_bundles["sd1"], "onnxruntime", threads=1, loop=request.param) as opened:
        yield opened


@pytest.fixture(
    params=[
        {},
        {"sampler": "euler-a", "images": 2},
        {"guidance": 1.0},
        {"guidance_start": 0.3, "guidance_end": 0.7},
        {"sampler": "unipc", "width": 48},
    ],
    ids=["plain", "noise", "no guidance", "guidance for a while", "registers and width"],
)
def varied(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of requests that differ in what their steps take: noise, guidance, registers and size."""
    options: dict[str, Any] = request.param
    return options
