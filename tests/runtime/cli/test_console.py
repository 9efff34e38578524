"""What commands write on a console: sizes, durations, tables, JSON, and bars that only a terminal sees."""

from __future__ import annotations

import json
import sys

import pytest

from latentrt.runtime.cli.console import BuildConsole, print_json, seconds, size, table


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (43_700_000, "43.7 MB"), (3_440_000_000, "3.44 GB")],
)
def test_sizes(count: int, text: str) -> None:
    """Bytes are shown in decimal units."""
    assert size(count) == text


def test_durations_and_tables() -> None:
    """Short durations are in milliseconds; columns are as wide as their widest cell."""
    assert (seconds(0.0123), seconds(4.56)) == ("12.3 ms", "4.56 s")
    assert table(("a", "bb"), [("ccc", 1), ("d", 22)]) == "a    bb\nccc  1\nd    22"


def test_json_is_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    """Every terminal takes it, and it is read back as it was."""
    value = {"prompt": "Äpfel \N{RED APPLE}", "steps": [1, 2.5, None]}
    print_json(value)
    text = capsys.readouterr().out
    assert text.isascii()
    assert json.loads(text) == value


@pytest.mark.parametrize("quiet", [False, True])
def test_a_build_tells_its_results_alone_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    """A line for each piece of work, no bar and nothing on standard error; nothing at all where it is quiet."""
    console = BuildConsole(quiet)
    console.stage("export unet")
    console.progress("trace", 1, 2)
    console.result("43.7 MB")
    console.close()
    out, err = capsys.readouterr()
    assert (out.rstrip(), err) == ("" if quiet else "export unet: 43.7 MB", "")


def test_a_terminal_sees_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the work and counts its parts, and goes away before the result is printed."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    console = BuildConsole()
    console.stage("build unet")
    console.progress("tactics", 1, 4)
    console.progress("tactics", 4, 4)
    console.result("done")
    out, err = capsys.readouterr()
    assert "build unet ..." in err
    assert "0/4" in err
    assert err.endswith("\r")
    assert out.rstrip() == "build unet: done"
