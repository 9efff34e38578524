"""Comparing components with torch: figures against scikit-image's, and what falls below the gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor, nn

from latentrt.engines import Array
from latentrt.engines.errors import VerificationError
from latentrt.exporter.components import Component
from latentrt.exporter.verification.components import check_component, check_stages, heavy_weight, other_size, psnr


class Doubled(nn.Module):
    """Twice its input, plus its ids."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([2.0]), requires_grad=False)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """``[batch, length]`` each."""
        return x * self.factor + ids


def component() -> Component:
    example = {"x": torch.randn(2, 4), "ids": torch.tensor([[3, 1, 0, 2]] * 2)}
    dynamic = {name: {0: "batch", 1: "length"} for name in example}
    return Component("doubled", Doubled(), example, dynamic, ("out",))


def engine(function: Callable[[Mapping[str, Array]], dict[str, Array]]) -> Any:
    """An engine of which only ``run`` is called."""
    return type("Engine", (), {"run": staticmethod(function)})()


def test_psnr_is_that_of_scikit_image() -> None:
    """The peak is the reference's largest magnitude; equal arrays are infinitely close, and faults are no number."""
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((3, 4))
    received = reference + rng.standard_normal((3, 4)) / 10
    peak = np.abs(reference).max()
    assert psnr(reference, received) == pytest.approx(peak_signal_noise_ratio(reference, received, data_range=peak))
    assert psnr(reference, reference) == math.inf
    assert psnr(np.zeros(2), np.ones(2)) == -math.inf
    assert math.isnan(psnr(reference, received[:2]))
    assert math.isnan(psnr(reference, np.where(received > 1, np.inf, received)))


def test_psnr_follows_its_definition() -> None:
    """PSNR follows its definition; what cannot be compared is NaN, which no gate lets through."""
    reference = np.array([[4.0, -2.0]])
    assert psnr(reference, reference) == np.inf
    assert psnr(reference, reference + 0.4) == pytest.approx(20)
    for received in (np.array([[np.nan, 0]]), np.array([[np.inf, 0]]), reference[0], np.ones((2, 2))):
        assert np.isnan(psnr(reference, received))
    assert psnr(np.zeros(2), np.ones(2)) == -np.inf


def test_another_size_differs_in_every_length() -> None:
    """Lengths are half as long again, rows as asked for, and whole numbers stay in the example's range."""
    inputs = other_size(component(), batch=3)
    assert {name: tuple(each.shape) for name, each in inputs.items()} == {"x": (3, 6), "ids": (3, 6)}
    assert inputs["ids"].dtype == torch.int64
    assert 0 <= int(inputs["ids"].min()) <= int(inputs["ids"].max()) <= 3


def test_a_component_is_held_to_the_gate_of_its_precision() -> None:
    """An exact engine passes; one that is off, or lacks an output, is refused with what was measured."""
    part = component()
    exact = check_component(part, engine(lambda feeds: {"out": 2 * feeds["x"] + feeds["ids"]}), "fp32")
    assert (exact.component, exact.precision) == ("doubled", "fp32")
    assert exact.psnr > 120
    rough = engine(lambda feeds: {"out": 2.01 * feeds["x"] + feeds["ids"]})
    assert check_component(part, rough, "bf16").psnr < 80
    with pytest.raises(VerificationError, match=r"doubled \(fp32\) .* output 'out' agrees to .* 80 dB are required"):
        check_component(part, rough, "fp32")
    with pytest.raises(VerificationError, match="agrees to nan dB"):
        check_component(part, engine(lambda _: {}), "fp32")
    with pytest.raises(VerificationError, match="doubled is fp4, for which no gate is known"):
        check_component(part, rough, "fp4")
    with pytest.raises(VerificationError, match="doubled has no stages"):
        check_stages(part, {}, "fp32")


def test_a_weight_beyond_fp16_is_named() -> None:
    """The first one that fp16 cannot hold."""
    part = component()
    assert heavy_weight(part) is None
    part.module.get_parameter("factor").data.fill_(7e4)
    assert heavy_weight(part) == "factor"
