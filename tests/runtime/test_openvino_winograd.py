"""Whole pictures with convolutions by tiles. A small model has none that are wide enough, so all are taken here."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from latentrt.engines.openvino import engine as ov
from latentrt.engines.openvino import rewrite as ov_rewrite
from latentrt.engines.openvino.winograd import convolve_by_tiles
from latentrt.exporter.precision.quality import GATES, picture_psnr
from latentrt.runtime import Pipeline

BF16 = pytest.mark.skipif(not ov.has_bf16(ov.load_core()), reason="this processor has no bf16")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many convolutions of each model that was compiled are computed by tiles, as on x86-64 without AMX."""
    counts: list[int] = []

    def take_all(model: object, sdk: object, *, largest: int) -> int:
        counts.append(convolve_by_tiles(model, sdk, largest=largest, channels=1, tiles=1))
        return counts[-1]

    monkeypatch.setattr(ov_rewrite, "convolve_by_tiles", take_all)
    monkeypatch.setattr(ov_rewrite, "largest_tile", {"fp32": 4, "bf16": 2}.__getitem__)
    return counts


@pytest.mark.parametrize(("precision", "least"), [("fp32", 60.0), pytest.param("bf16", GATES["bf16"], marks=BF16)])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (72, 56)])
def test_pictures_are_those_of_plain_convolutions(
    tiny_bundle: Path, taken: list[int], size: tuple[int, int], fixed: bool, precision: str, least: float
) -> None:
    """Beside ONNX Runtime in fp32, with and without a fixed size, for sizes that tiles divide and others."""
    draw = {"prompt": "a red apple", "width": size[0], "height": size[1], "steps": 4, "seed": 7}
    load = functools.partial(Pipeline.load, tiny_bundle, engine_cache="off")
    with load("onnxruntime") as pipe:
        wanted = pipe(**draw).images[0]
    with load("openvino", precision=precision, fixed_size=(*size, 1) if fixed else None) as pipe:
        found = pipe(**draw).images[0]
    assert sum(taken) > 10
    assert least <= picture_psnr(wanted, found)
    assert np.ptp(found.astype(int)) > 0
