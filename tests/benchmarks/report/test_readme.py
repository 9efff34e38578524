"""The README's tables: made from the reports, and those of this repository are up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latentrt.benchmarks.report import readme
from latentrt.benchmarks.report.document import write
from latentrt.benchmarks.report.readme import BEGIN, END, REPOSITORY, leaders, main, replaced, reports, tables

ROOT = Path(__file__).resolve().parents[3]


def test_the_tables_of_this_repository_are_up_to_date() -> None:
    """What the README says of speed is what the reports in benchmarks/results say."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if not reports(ROOT) and BEGIN not in text:
        pytest.skip("there is no report in benchmarks/results yet")
    assert replaced(text, ROOT) == text, "run python -m latentrt.benchmarks.report.readme"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a README that has markers, and with results; it is the current one."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe rest.\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_table_is_made_from_the_report_of_the_largest_model(reports: Any, place: Path) -> None:
    """Five rows of the slowest model; other results are left alone, other text too."""
    results = place / "benchmarks" / "results"
    made = reports.make("sd15")
    write(results / "a-emoji.json", reports.make())
    write(results / "b-sd15.json", made)
    (results / "c-other.json").write_text('{"model": "emoji"}')
    (results / "d-list.json").write_text("[]")
    assert main(["--check"]) == 1
    assert main([]) == 0
    assert main(["--check"]) == 0
    text = (place / "README.md").read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n\n**stable-diffusion-1.5-size**: ")
    assert text.endswith(f"{END}\n\nThe rest.\n")
    assert "old" not in text
    assert f"[All figures]({REPOSITORY}benchmarks/results/b-sd15.json)" in text
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]
    chosen = [each["label"] for each in leaders(made)]
    assert [row.strip("*") for row in rows] == chosen
    assert len(chosen) <= 5
    measured = {each["label"]: each for each in made["contenders"] if each["state"] == "measured"}
    ours = [label for label in chosen if measured[label]["kind"] == "latentrt"]
    times = {label: each["summary"]["total"]["median"] for label, each in measured.items()}
    assert ours == sorted((x for x in times if measured[x]["kind"] == "latentrt"), key=times.__getitem__)[:2]
    reference = next(each for each in measured.values() if each["name"] == made["reference"]["contender"])
    assert reference["label"] in chosen


def test_the_manual_has_the_tables_of_all_reports(reports: Any, place: Path) -> None:
    """One table for each report, in the order of their names."""
    results = place / "benchmarks" / "results"
    made = {"a-emoji.json": reports.make(), "b-sd15.json": reports.make("sd15")}
    for name, report in made.items():
        write(results / name, report)
    text = tables(place)
    assert text.startswith("**emoji**: ")
    first, second = text.split("**stable-diffusion-1.5-size**")
    for part, name in ((first, "a-emoji.json"), (second, "b-sd15.json")):
        assert f"[All figures](benchmarks/results/{name})" in part
        assert "AMD EPYC 7763" in part
        assert "2026-11-22" in part
        assert "stable-diffusion.cpp, fp32 (failed: it ended with signal 6" in part
        lines = [line for line in part.splitlines() if line.startswith("| ") and "---" not in line][1:]
        measured = [contender for contender in made[name]["contenders"] if contender["state"] == "measured"]
        assert len(lines) == len(measured)
    fastest = next(each for each in made["a-emoji.json"]["contenders"] if each["name"] == "latentrt-openvino-int8")
    row = next(line for line in first.splitlines() if "**LatentRT, OpenVINO INT8**" in line)
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    total, ratio = fastest["summary"]["total"], fastest["ratios"]["total"]
    assert cells[0] == f"{total['median']:#.3g} [{total['low']:#.3g}, {total['high']:#.3g}]"
    assert cells[1] == f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    assert cells[3:] == ["330 MB", "31.2"]
    assert "random weights" in second
    assert "20 steps, extrapolated from 3 steps" in second
    assert "*" in next(line for line in second.splitlines() if line.startswith("| diffusers, bf16"))


def test_results_without_markers_are_an_error(reports: Any, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A README that has no place for the tables is not silently left without them."""
    write(place / "benchmarks" / "results" / "a.json", reports.make())
    for text in ("# Title\n", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}\n"):
        (place / "README.md").write_text(text)
        assert main([]) == 1
        assert capsys.readouterr().err == (
            f"error: expected one {BEGIN} and, after it, one {END}; write both where the table should be\n"
        )
        assert (place / "README.md").read_text() == text


@pytest.mark.parametrize("text", ["{", '{"schema": "latentrt-bench/2"}', '{"schema": "latentrt-bench/1"}'])
def test_a_damaged_report_is_an_error(place: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    """The README stays as it is."""
    before = (place / "README.md").read_text()
    (place / "benchmarks" / "results" / "a.json").write_text(text)
    assert main([]) == 1
    assert "a.json" in capsys.readouterr().err
    assert (place / "README.md").read_text() == before


def test_a_missing_readme_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, no traceback."""
    monkeypatch.chdir(tmp_path)
    assert readme.main([]) == 1
    assert capsys.readouterr().err.startswith("error: cannot read README.md: ")
