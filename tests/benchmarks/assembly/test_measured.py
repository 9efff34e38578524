"""Figures of a contender, from samples that make them plain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from latentrt.benchmarks.assembly import measured
from latentrt.benchmarks.contest.contenders import OURS, Contender
from latentrt.benchmarks.contest.rounds import Entry


def entry(name: str, rounds: list[int], seconds: float, steps: int = 2) -> Entry:
    """A contender whose steps all take as long, and whose text encoder and decoder take 1 s each."""
    made = Entry(Contender(name, name, OURS), opened={"versions": {}}, rounds=rounds)
    made.total = [steps * seconds + 2] * len(rounds)
    made.step = [[seconds] * steps for _ in rounds]
    made.stages["text_encoder"] = made.stages["vae_decoder"] = [1.0] * len(rounds)
    return made


def test_ratios_are_from_rounds_that_both_took_part_in() -> None:
    """Of three and two rounds, the two in common count; above 1 is faster."""
    reference, fast = entry("a", [0, 1, 2], 4.0), entry("b", [1, 2, 3], 1.0)
    found = measured.ratios(fast, reference)
    assert found["total"] == {"median": 2.5, "low": 2.5, "high": 2.5, "pairs": 2}
    assert found["step"]["median"] == 4
    assert measured.ratios(fast, None) == measured.ratios(entry("c", [9], 1.0), reference) == {}


def test_the_reference_is_the_first_that_was_opened() -> None:
    """Names that did not take part, or did not open, are passed over."""
    entries = [entry("latentrt-openvino-fp32", [0], 1.0), entry("latentrt-onnxruntime-fp32", [0], 1.0)]
    assert measured.reference(entries) is entries[1]
    entries[1].opened = {}
    assert measured.reference(entries) is entries[0]
    assert measured.reference([]) is None


def test_more_steps_are_estimated_from_each_rounds_own() -> None:
    """Twenty steps take the measured time and eighteen median steps more."""
    found = measured.extrapolated(entry("a", [0, 1], 3.0), 20)
    assert found == {"steps": 20, "seconds": {"median": 62.0, "low": 62.0, "high": 62.0}}
    assert measured.extrapolated(entry("a", [], 3.0), 20) is None
    assert measured.extrapolated(entry("a", [0], 3.0), None) is None


def test_stages_without_samples_are_left_out() -> None:
    """Summaries, medians and throughput have what was measured, and nothing else."""
    one = entry("a", [0, 1], 3.0)
    assert measured.medians(one) == {"text_encoder": 1.0, "vae_decoder": 1.0, "total": 8.0, "step": 3.0}
    assert measured.summaries(one).keys() == measured.medians(one).keys()
    assert measured.throughput(one, 1) == []
    one.batches = {4: [16.0]}
    assert [(each["images"], each["per_minute"]["median"]) for each in measured.throughput(one, 1)] == [
        (1, 7.5),
        (4, 15.0),
    ]


def test_quality_is_against_the_references_image(tmp_path: Path) -> None:
    """PSNR has its closed form for a constant error; images of another size, or none, have no quality."""
    one, other = entry("a", [0], 1.0), entry("b", [0], 1.0)
    assert measured.quality(one, other) is None
    for each, shade, side in ((one, 90, 16), (other, 100, 16)):
        each.picture = tmp_path / f"{each.contender.name}.npy"
        np.save(each.picture, np.full((1, side, side, 3), shade, np.uint8))
    found = measured.quality(one, other)
    assert found is not None
    assert found["psnr"] == pytest.approx(20 * np.log10(25.5))
    assert found["reference"] == "b"
    assert one.picture is not None
    np.save(one.picture, np.zeros((1, 8, 8, 3), np.uint8))
    assert measured.quality(one, other) is None
    assert measured.quality(one, None) is None
