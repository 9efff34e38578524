"""The report as a document: its schema against ``types``, and files that are sound, damaged, hostile or too large."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from jsonschema import Draft202012Validator

from latentrt.benchmarks.report import document, types
from latentrt.benchmarks.report.document import ReportError, read, validate, write
from latentrt.engines.errors import LatentRTError, OutputError

TYPES = {
    "machine": types.Machine,
    "model": types.Model,
    "job": types.Job,
    "method": types.Method,
    "control": types.Control,
    "reference": types.Reference,
    "ceilings": types.Ceilings,
    "cold": types.Cold,
    "samples": types.Samples,
    "interval": types.Interval,
    "ratio": types.Ratio,
    "summary": types.Summary,
    "throughput": types.Throughput,
    "memory": types.Memory,
    "quality": types.Quality,
    "extrapolated": types.Extrapolated,
    "roof": types.Roof,
    "contender": types.ContenderReport,
    "loadgen": types.Loadgen,
    "unavailable": types.Unavailable,
}


def test_the_schema_is_a_schema() -> None:
    """It is valid JSON Schema 2020-12, and every object in it says which members it may have."""
    Draft202012Validator.check_schema(document.schema())
    for definition in document.schema()["$defs"].values():
        if definition.get("type") == "object":
            assert "additionalProperties" in definition


@pytest.mark.parametrize("name", TYPES)
def test_types_have_the_members_of_the_schema(name: str) -> None:
    """Code that fills a type cannot leave out what the schema asks for, nor add what it forbids."""
    definition = document.schema()["$defs"][name]
    assert set(get_type_hints(TYPES[name])) == set(definition["properties"])
    assert set(definition["required"]) == TYPES[name].__required_keys__
    assert definition["additionalProperties"] is False


def test_the_report_has_the_members_of_the_schema() -> None:
    """So does the document itself, and its stages are the schema's."""
    assert set(get_type_hints(types.Report)) == set(document.schema()["properties"])
    assert set(types.STAGES) == set(document.schema()["$defs"]["samples"]["properties"])
    summaries = document.schema()["$defs"]["contender"]["properties"]["summary"]["properties"]
    assert set(get_type_hints(types.Summaries)) == set(summaries)


@pytest.mark.parametrize("kind", ["emoji", "sd15"])
def test_what_is_written_is_read(reports: Any, tmp_path: Path, kind: str) -> None:
    """Every number comes back as it was, and the validator of the library has no objection to the file."""
    report = reports.make(kind, rounds=4)
    write(tmp_path / "r.json", report)
    assert read(tmp_path / "r.json") == report
    Draft202012Validator(document.schema()).validate(json.loads((tmp_path / "r.json").read_text("ascii")))
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_reader_never_sees_half_a_report(reports: Any, tmp_path: Path) -> None:
    """Who has opened the older report when the new one is written reads the older one, whole."""
    write(tmp_path / "r.json", reports.make(rounds=2))
    older = (tmp_path / "r.json").read_bytes()
    with (tmp_path / "r.json").open("rb") as file:
        begin = file.read(100)
        write(tmp_path / "r.json", reports.make("sd15", rounds=2))
        assert begin + file.read() == older
    assert (tmp_path / "r.json").read_bytes() != older


def test_hostile_text_is_kept_as_it_is(reports: Any, tmp_path: Path) -> None:
    """Markup, line separators and lone surrogates in a prompt survive."""
    report = reports.hostile()
    report["job"]["prompt"] += "\ud800"
    write(tmp_path / "r.json", report)
    assert read(tmp_path / "r.json") == report


def _put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(report: dict[str, Any]) -> None:
        target: Any = report
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_put("job", "seed", value="7"), r"job\.seed: '7' is not of type 'integer'"),
        (_put("more", value=1), "Additional properties are not allowed"),
        (_put("contenders", 1, "kind", value="other"), r"contenders\[1\]\.kind: 'other' is not one of"),
        (_put("contenders", 0, "samples", "total", 2, value=-1.0), r"contenders\[0\]\.samples\.total\[2\]: -1\.0"),
        (_put("contenders", 0, "samples", "total", 2, value=float("nan")), r"samples\.total\[2\]: .* not finite"),
        (_put("control", "samples", 0, value=float("inf")), r"control\.samples\[0\]: .* not finite"),
        (_put("contenders", 0, "name", value="optimum-onnx"), "'optimum-onnx' is there twice"),
        (_put("reference", "contender", value="nobody"), "'nobody' is none of the contenders"),
        (_put("complete", value=False), "missing: "),
        (_put("contenders", 0, "state", value="failed"), r"contenders\[0\]\.reason"),
        (_put("contenders", 0, "summary", value={}), r"contenders\[0\]\.summary: 'total' is a required property"),
        (_put("created", value="yesterday"), "created: 'yesterday' does not match"),
        (_put("ceilings", "matmul", "fp32", value={"samples": []}), r"ceilings\.matmul\.fp32"),
    ],
)
def test_what_is_no_report_is_not_written(
    reports: Any, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    """The sentence names the place, and the file that was there stays."""
    report = reports.make(rounds=4)
    (tmp_path / "r.json").write_text("older")
    change(report)
    with pytest.raises(ReportError, match=message) as caught:
        write(tmp_path / "r.json", report)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "r.json").read_text() == "older"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[1]", "it names no schema"),
        (b'{"schema": "latentrt-bench/2"}', "its schema is 'latentrt-bench/2', expected 'latentrt-bench/1'"),
        (b'{"schema": "latentrt-bench/1"}', "is no sound report of latentrt bench: .* is a required property"),
        (b'{"schema": NaN}', "NaN is no number in JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    ],
)
def test_what_is_no_report_is_not_read(tmp_path: Path, data: bytes, message: str) -> None:
    """Anything else is refused in one sentence."""
    (tmp_path / "r.json").write_bytes(data)
    with pytest.raises(ReportError, match=message) as caught:
        read(tmp_path / "r.json")
    assert isinstance(caught.value, LatentRTError)
    assert "\n" not in str(caught.value)


def test_numbers_that_overflow_are_found(reports: Any, tmp_path: Path) -> None:
    """1e999 is valid JSON and infinite in Python."""
    write(tmp_path / "r.json", reports.make(rounds=4))
    text = (tmp_path / "r.json").read_text().replace('"load_before": 0.42', '"load_before": 1e999')
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ReportError, match=r"machine\.load_before: the number is not finite"):
        read(tmp_path / "r.json")


def test_a_report_with_deep_options_is_refused(reports: Any) -> None:
    """Options are free, but not bottomless."""
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"a": deep}
    report = reports.make(rounds=2)
    report["contenders"][0]["options"] = deep
    with pytest.raises(ReportError, match="nested too deeply"):
        validate(report)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file, a directory and an oversized file end in one sentence."""
    with pytest.raises(ReportError, match="No such file"):
        read(tmp_path / "none.json")
    with pytest.raises(ReportError, match="Is a directory"):
        read(tmp_path)
    (tmp_path / "r.json").write_bytes(bytes(101))
    monkeypatch.setattr(document, "MAX_BYTES", 100)
    with pytest.raises(ReportError, match="is larger than"):
        read(tmp_path / "r.json")


def test_a_failing_disk_keeps_the_older_report(reports: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the data cannot be brought to the disk, the older report is as it was and nothing else is there."""
    older = reports.make(seed=1, rounds=2)
    write(tmp_path / "r.json", older)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        write(tmp_path / "r.json", reports.make(seed=2, rounds=2))
    assert read(tmp_path / "r.json") == older
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_full_disk_keeps_the_older_report(reports: Any, tmp_path: Path) -> None:
    """On a file system that has room for a small report, a large one does not take its place."""
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "latentrt-test", str(tmp_path)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        small = reports.make(rounds=2) | {"contenders": [], "reference": None}
        write(tmp_path / "r.json", small)
        with pytest.raises(OutputError, match="No space left on device"):
            write(tmp_path / "r.json", reports.make(rounds=20))
        assert read(tmp_path / "r.json") == small
        assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
