"""The report as Markdown, with ``figures``: all figures and contenders are there, hostile text stays text."""

from __future__ import annotations

import re
from typing import Any

import pytest

from latentrt.benchmarks.report import figures
from latentrt.benchmarks.report.markdown import to_markdown

CELLS = re.compile(r"(?<!\\)\|")


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table after a heading, without header and rule."""
    lines = text.partition(f"\n{heading}\n")[2].split("\n")
    start = next(index for index, line in enumerate(lines) if line.startswith("| ---"))
    table = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in CELLS.split(line)[1:-1]])
    return table


def numbers(cell: str) -> list[float]:
    """The numbers in a cell."""
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", cell)]


def test_the_table_has_the_figures_of_the_report(reports: Any) -> None:
    """Medians, intervals, ratios, memory and quality of all contenders, rounded to three digits."""
    report = reports.make()
    by_label = {contender["label"]: contender for contender in report["contenders"]}
    table = rows(to_markdown(report), "## Results")
    assert len(table) == len(by_label)
    times = []
    for name, picture, step, decode, ratio, first, memory, disk, psnr, ssim in table:
        contender = by_label[re.sub(r"\*\*| \((reference|failed|unavailable)\)", "", name)]
        if contender["state"] != "measured":
            assert contender["state"] in name
            assert {picture, step, decode, ratio, first, memory, disk, psnr, ssim} == {"-"}
            continue
        total, ratios = contender["summary"]["total"], contender["ratios"]["total"]
        ends = ("median", "low", "high")
        assert numbers(picture) == pytest.approx([total[end] for end in ends], rel=5e-3)
        assert numbers(step) == pytest.approx([1e3 * contender["summary"]["step"][end] for end in ends], rel=5e-3)
        shown = ends if ratios["low"] < ratios["high"] else ends[:1]
        assert numbers(ratio) == pytest.approx([ratios[end] for end in shown], abs=5.1e-3)
        if contender["summary"].get("vae_decoder"):
            assert numbers(decode)[0] == pytest.approx(1e3 * contender["summary"]["vae_decoder"]["median"], rel=5e-3)
        else:
            assert decode == "-"
        scale = {"s": 1, "ms": 1e-3, "MB": 1e6, "GB": 1e9}
        for cell, value in (
            (first, contender["cold"]["process_to_picture"]),
            (memory, contender["memory"]["peak_rss_bytes"]),
            (disk, contender["disk_bytes"]),
        ):
            number, unit = cell.split()
            assert float(number) * scale[unit] == pytest.approx(value, rel=5e-3)
        assert float(psnr) == pytest.approx(contender["quality"]["psnr"], abs=0.051)
        assert float(ssim) == pytest.approx(contender["quality"]["ssim"], abs=5.1e-5)
        times.append(total["median"])
    assert times == sorted(times)


def test_what_was_extrapolated_is_marked(reports: Any) -> None:
    """Figures of whole images are in italics, with the steps that they are from; what was measured is not."""
    report = reports.make("sd15")
    text = to_markdown(report)
    assert "Figures in italics were not measured: 20 steps, extrapolated from 3 steps." in text
    assert "image of 20 steps (s)" in text
    by_label = {contender["label"]: contender for contender in report["contenders"]}
    for name, picture, step, _, ratio, *_ in rows(text, "## Results"):
        contender = by_label[re.sub(r"\*\*| \((reference|failed|unavailable)\)", "", name)]
        if contender["extrapolated"] is None:
            assert "*" not in picture
            continue
        assert re.fullmatch(r"\*[^*]*\*", picture)
        assert re.fullmatch(r"\*[^*]*\*", ratio)
        assert "*" not in step
        assert numbers(picture)[0] == pytest.approx(contender["extrapolated"]["seconds"]["median"], rel=5e-3)
    assert "italics" not in to_markdown(reports.make())


def test_an_extrapolated_ratio_is_as_wide_as_its_parts_allow(reports: Any) -> None:
    """Its ends are quotients of the ends of both intervals."""
    report = reports.make("sd15")
    mine = next(c for c in report["contenders"] if c["name"] == "latentrt-openvino")
    seconds = mine["extrapolated"]["seconds"]
    theirs = next(c for c in report["contenders"] if c["name"] == reports.REFERENCE)["extrapolated"]["seconds"]
    ratio = figures.image_ratio(report, mine)
    assert ratio is not None
    assert ratio.median == theirs["median"] / seconds["median"]
    assert (ratio.low, ratio.high) == (theirs["low"] / seconds["high"], theirs["high"] / seconds["low"])
    assert ratio.steps == 20


def test_everything_that_is_missing_is_named(reports: Any) -> None:
    """A run that ended early says so, with what it lacks; contenders without figures are there with their reasons."""
    report = reports.make()
    report |= {"complete": False, "missing": ["Rounds 6 to 10: the run was interrupted."]}
    text = to_markdown(report)
    missing = text.partition("## Missing")[2].partition("## Results")[0]
    assert "The run ended early" in missing
    assert "Rounds 6 to 10: the run was interrupted." in missing
    assert "LatentRT, OpenVINO bf16, unavailable: the processor has no bf16 instructions" in missing
    assert "stable-diffusion.cpp, fp32, failed: it ended with signal 6" in missing


def test_all_parts_are_there(reports: Any) -> None:
    """Cold starts, throughput, roofline, load generator, method, versions and notes have the report's figures."""
    report = reports.make()
    text = to_markdown(report)
    cold = {name: cells for name, *cells in rows(text, "## First image of a new process")}
    assert cold["**LatentRT, OpenVINO INT8**"][:4] == ["400 ms", "330 ms", "6.20 s", "800 ms"]
    throughput = {name: cells for name, *cells in rows(text, "## Throughput")}
    first = next(c for c in report["contenders"] if c["name"] == reports.REFERENCE)["throughput"]
    found = [numbers(cell)[0] for cell in throughput["diffusers, fp32 (reference)"]]
    assert found == pytest.approx([entry["per_minute"]["median"] for entry in first], rel=5e-3)
    assert len(rows(text, "## Roofline")) == sum(len(c["roofline"]) for c in report["contenders"])
    assert "product of matrices, bf16: the processor has no bf16 instructions" in text
    assert "copy: 21.0 GB/s" in text
    assert "### Server: INVALID" in text
    assert "    Result is : VALID" in text
    assert "10 of 10 rounds, after 2 images of warm-up" in text
    assert f"varied by {100 * report['control']['cv']:.1f} %" in text
    assert "torch.compile compiles when it first draws" in text


def test_hostile_text_stays_text(reports: Any) -> None:
    """Nothing from outside forms a tag, a cell, a heading or a line of its own."""
    report = reports.hostile()
    text = to_markdown(report)
    assert not re.search(r"(?<!\\)<", text.replace("    " + reports.HOSTILE.split("\u2028")[0], ""))
    assert len(rows(text, "## Results")) == len(report["contenders"])
    assert all(len(row) == 10 for row in rows(text, "## Results"))
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert not any("heading" in line for line in headings)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.99951, "1.00"), (0.012345, "0.0123"), (9.996, "10.0"), (123.4, "123"), (1234.6, "1235")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    """Also where rounding carries."""
    assert figures.significant(value) == text
