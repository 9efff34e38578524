"""Comparing two reports: noise and drift are no regressions, slower engines are."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats

from latentrt.benchmarks.report.compare import FAMILY_ERROR, compare, to_text
from latentrt.benchmarks.report.document import ReportError, validate

OURS = "latentrt-openvino"


@pytest.fixture(scope="module")
def base(reports: Any) -> dict[str, Any]:
    """A report to take everything but the times from."""
    made: dict[str, Any] = reports.make("sd15", rounds=2)
    return made


def run(
    base: dict[str, Any],
    rng: np.random.Generator,
    *,
    cv: float,
    rounds: int = 10,
    drift: float = 1.0,
    slower: float = 1.0,
    controls: int = 1,
) -> dict[str, Any]:
    """A run on a machine that others use: half of the variance is common to a round, and drift to the whole run.

    ``slower`` multiplies the step, and thereby nearly all of the image, of one of two LatentRT contenders.
    """
    common = rng.normal(0, math.sqrt(0.5), rounds)

    def noisy(seconds: float) -> np.ndarray:
        return seconds * drift * np.exp(cv * (common + rng.normal(0, math.sqrt(0.5), rounds)))

    report = dict(base, method=dict(base["method"], rounds_done=rounds, rounds_asked=rounds), contenders=[])
    control = np.stack([noisy(0.05) for _ in range(controls)], 1)
    report["control"] = dict(base["control"], samples=control.ravel().tolist())
    for contender in base["contenders"]:
        if contender["name"] not in (OURS, "latentrt-openvino-int8", "optimum-onnx"):
            continue
        step = noisy(0.04) * (slower if contender["name"] == OURS else 1.0)
        decode = noisy(0.05)
        samples = {
            "total": (20 * step + decode).tolist(),
            "step": [[seconds] * 20 for seconds in step.tolist()],
            "vae_decoder": decode.tolist(),
        }
        report["contenders"].append(dict(contender, samples=contender["samples"] | samples))
    return report


def test_equal_reports_show_no_change(reports: Any) -> None:
    """A report against itself: every ratio is 1, no warning, nothing better or worse."""
    report = validate(reports.make())
    comparison = compare(report, copy.deepcopy(report))
    assert comparison.warnings == ()
    assert comparison.drift == 1
    assert {change.ratio for change in comparison.changes} == {1.0}
    assert {change.verdict for change in comparison.changes} == {"unchanged"}
    assert {change.figure for change in comparison.changes} >= {"total", "step", "vae_decoder", "memory", "psnr"}
    assert "regressions: none" in to_text(comparison)


def test_noise_and_drift_are_no_regressions(base: dict[str, Any]) -> None:
    """Of 300 pairs of equal runs, noise 2 to 5 %, drift 3 %, less than 2 % show any regression, or any improvement."""
    rng, worse, better = np.random.default_rng(0), 0, 0
    for _ in range(300):
        cv, drift = rng.uniform(0.02, 0.05), rng.choice([1.03, 1 / 1.03])
        comparison = compare(run(base, rng, cv=cv), run(base, rng, cv=cv, drift=drift))
        worse += bool(comparison.regressions)
        better += bool(comparison.improvements)
    assert worse < 6
    assert better < 6


@pytest.mark.parametrize(("controls", "expected"), [(1, 90), (3, 95)])
def test_a_slower_engine_is_found(base: dict[str, Any], controls: int, expected: int) -> None:
    """Of 100 engines slower by 10 %, at ten rounds and the same noise and drift, nearly all are found."""
    rng, found, wrong = np.random.default_rng(1), 0, 0
    for _ in range(100):
        cv, drift = rng.uniform(0.02, 0.05), rng.choice([1.03, 1 / 1.03])
        old = run(base, rng, cv=cv, controls=controls)
        comparison = compare(old, run(base, rng, cv=cv, drift=drift, slower=1.1, controls=controls))
        found += any(change.contender == OURS for change in comparison.regressions)
        wrong += any(change.contender != OURS for change in comparison.regressions)
    assert found >= expected
    assert wrong <= 2


def test_a_faster_engine_is_an_improvement(base: dict[str, Any]) -> None:
    """It is listed, and is no regression; the decoder, which is as before, is neither."""
    rng = np.random.default_rng(2)
    comparison = compare(run(base, rng, cv=0.02), run(base, rng, cv=0.02, slower=0.8))
    assert comparison.regressions == ()
    assert {(c.contender, c.figure) for c in comparison.improvements} == {(OURS, "total"), (OURS, "step")}
    text = to_text(comparison)
    assert "improvements:" in text
    (step,) = [change for change in comparison.improvements if change.figure == "step"]
    assert step.ratio == pytest.approx(0.8, abs=0.03)
    assert step.low < step.ratio < step.high < 1


@pytest.mark.parametrize("factor", [1.3, 0.7])
def test_a_control_that_jumps_alone_changes_nothing(base: dict[str, Any], factor: float) -> None:
    """If the control is slower or faster but the contenders are as before, they are neither better nor worse."""
    rng = np.random.default_rng(3)
    old, new = run(base, rng, cv=0.02), run(base, rng, cv=0.02)
    new["control"]["samples"] = [factor * seconds for seconds in new["control"]["samples"]]
    comparison = compare(old, new)
    assert comparison.regressions == comparison.improvements == ()
    assert comparison.drift == pytest.approx(factor, rel=0.05)


def test_a_slow_machine_is_no_regression(base: dict[str, Any]) -> None:
    """A run in which all took half as long again, the control too, is as good as the one before."""
    rng = np.random.default_rng(4)
    comparison = compare(run(base, rng, cv=0.02), run(base, rng, cv=0.02, drift=1.5))
    assert comparison.regressions == comparison.improvements == ()


def test_intervals_are_those_of_yuens_test(base: dict[str, Any]) -> None:
    """With a control that does not vary, ratio and interval follow from scipy's trimmed t test on logarithms."""
    rng = np.random.default_rng(5)
    old, new = run(base, rng, cv=0.04, rounds=11), run(base, rng, cv=0.05, rounds=14, slower=1.2)
    for report in (old, new):
        report["control"]["samples"] = [0.05] * len(report["control"]["samples"])
    comparison = compare(old, new)
    times = [c for c in comparison.changes if c.kind == "latentrt" and c.figure in ("total", "step", "vae_decoder")]
    assert comparison.confidence == pytest.approx(1 - FAMILY_ERROR / len(times))
    for change in times:
        before, after = (
            np.log(
                [
                    np.mean(x)
                    for r in (report,)
                    for c in r["contenders"]
                    if c["name"] == change.contender
                    for x in c["samples"][change.figure]
                ]
            )
            for report in (old, new)
        )
        test = scipy.stats.ttest_ind(after, before, equal_var=False, trim=0.15)
        center = scipy.stats.trim_mean(after, 0.15) - scipy.stats.trim_mean(before, 0.15)
        half = scipy.stats.t.ppf((1 + comparison.confidence) / 2, math.floor(test.df)) * center / test.statistic
        assert math.log(change.ratio) == pytest.approx(center)
        assert (math.log(change.low), math.log(change.high)) == pytest.approx((center - half, center + half), rel=1e-5)


def test_several_controls_a_round_are_one(base: dict[str, Any]) -> None:
    """Their median counts: one outlier of three in each round does not."""
    rng = np.random.default_rng(6)
    old, new = (run(base, rng, cv=0.02, controls=3) for _ in range(2))
    new["control"]["samples"][::3] = [5 * seconds for seconds in new["control"]["samples"][::3]]
    comparison = compare(old, new)
    assert comparison.regressions == ()
    assert comparison.drift == pytest.approx(1, abs=0.05)


def test_too_few_rounds_are_not_decided_on(base: dict[str, Any]) -> None:
    """Three rounds say nothing of noise, however large the difference is; the comparison says so."""
    rng = np.random.default_rng(7)
    comparison = compare(run(base, rng, cv=0.02, rounds=3), run(base, rng, cv=0.02, rounds=3, slower=2))
    assert comparison.regressions == ()
    assert {change.verdict for change in comparison.changes if change.figure == "step"} == {"undecided"}
    assert any("fewer than 4 rounds" in warning for warning in comparison.warnings)


def test_without_a_control_nothing_is_decided(base: dict[str, Any]) -> None:
    """What the machine did cannot be told from what the engine did."""
    rng = np.random.default_rng(8)
    old, new = run(base, rng, cv=0.02), run(base, rng, cv=0.02, slower=1.5)
    new["control"] = new["control"] | {"samples": [], "cv": None}
    comparison = compare(old, new)
    assert comparison.regressions == ()
    assert {change.verdict for change in comparison.changes if change.figure == "total"} == {"undecided"}
    assert math.isnan(comparison.drift)
    assert "control:" not in to_text(comparison)


@pytest.mark.parametrize(
    ("part", "key", "old", "new", "verdict"),
    [
        ("memory", "peak_rss_bytes", 1_000_000_000, 1_100_000_000, "regression"),
        ("memory", "peak_rss_bytes", 1_000_000_000, 900_000_000, "improvement"),
        ("memory", "peak_rss_bytes", 1_000_000_000, 1_040_000_000, "unchanged"),
        ("memory", "peak_rss_bytes", 50_000_000, 60_000_000, "unchanged"),
        ("memory", "device_peak_bytes", 4_000_000_000, 5_000_000_000, "regression"),
        ("quality", "psnr", 45.0, 43.0, "regression"),
        ("quality", "psnr", 43.0, 45.0, "improvement"),
        ("quality", "psnr", 45.0, 44.5, "unchanged"),
        ("quality", "psnr", 100.0, 70.0, "unchanged"),
    ],
)
def test_memory_and_quality(reports: Any, part: str, key: str, old: float, new: float, verdict: str) -> None:
    """Beyond what repeats, more memory and less PSNR are regressions; errors below a quarter of a level are none."""
    before, after = reports.make(), reports.make()
    for report, value in ((before, old), (after, new)):
        contender = next(each for each in report["contenders"] if each["name"] == OURS)
        contender[part][key] = value
    (change,) = [
        each
        for each in compare(before, after).changes
        if each.contender == OURS and each.figure == {"memory": "memory", "quality": "psnr"}[part]
    ]
    assert change.verdict == verdict
    assert (change.old, change.new) == (old, new)


def test_an_engine_that_fails_now_is_a_regression(reports: Any) -> None:
    """If it drew images before; if it is unavailable, or was left out, that is a warning."""
    old, new = reports.make(), reports.make()
    index = next(i for i, contender in enumerate(new["contenders"]) if contender["name"] == OURS)
    empty = reports._empty(OURS, "LatentRT, OpenVINO fp32", "latentrt")
    new["contenders"][index] = empty | {"state": "failed", "reason": "it ran out of memory"}
    (change,) = compare(old, new).regressions
    assert (change.contender, change.figure) == (OURS, "state")
    assert "it drew images before, now it fails: it ran out of memory" in to_text(compare(old, new))
    new["contenders"][index] = empty | {"state": "unavailable", "reason": "OpenVINO is not installed"}
    assert compare(old, new).regressions == ()
    assert any("OpenVINO is not installed" in warning for warning in compare(old, new).warnings)
    del new["contenders"][index]
    assert "LatentRT, OpenVINO fp32 is not in the new report" in compare(old, new).warnings


def test_peers_do_not_count(base: dict[str, Any]) -> None:
    """A peer that became slower is told, but is no regression of LatentRT."""
    rng = np.random.default_rng(9)
    old, new = run(base, rng, cv=0.02), run(base, rng, cv=0.02)
    peer = next(contender for contender in new["contenders"] if contender["kind"] == "peer")
    peer["samples"]["total"] = [2 * seconds for seconds in peer["samples"]["total"]]
    comparison = compare(old, new)
    assert comparison.regressions == ()
    assert "peers that changed (these do not count):\n  Optimum ONNX, fp32, end to end" in to_text(comparison)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("job", "steps", 30), ("job", "sampler", "ddim"), ("job", "threads", 8), ("model", "name", "another")],
)
def test_another_job_is_refused(reports: Any, part: str, key: str, value: object) -> None:
    """Times of different work are not compared; the sentence says what differs."""
    new = reports.make()
    new[part][key] = value
    with pytest.raises(ReportError, match=rf"different jobs: {part}\.{key} was .* and is {value!r}"):
        compare(reports.make(), new)


def test_another_machine_is_a_warning(reports: Any) -> None:
    """So are another method, an incomplete report and other versions."""
    new = reports.make()
    new["machine"]["processor"] = "another"
    new["method"]["residency"] = "reloaded"
    new |= {"complete": False, "missing": ["The rest: interrupted."]}
    new["contenders"][0]["versions"]["python"] = "3.12.1"
    warnings = compare(reports.make(), new).warnings
    assert any("another machine: processor was 'AMD EPYC" in warning for warning in warnings)
    assert any("another method: residency was 'resident' and is 'reloaded'" in warning for warning in warnings)
    assert "the new report is not complete: The rest: interrupted." in warnings
    assert "diffusers, fp32 has other versions: python 3.11.7 to 3.12.1" in warnings


def test_reports_without_a_common_contender_are_refused(reports: Any) -> None:
    """There is nothing to compare."""
    new = reports.make()
    new |= {"contenders": [], "reference": None}
    with pytest.raises(ReportError, match="no contender in common"):
        compare(reports.make(), new)
