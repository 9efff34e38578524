"""The README's tables of speed, made from the reports in ``benchmarks/results``; nobody types them.

    python -m latentrt.benchmarks.report.readme [--check]

Rewrites what is between the markers in the README of the current directory, or says whether that is up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from latentrt.engines.errors import LatentRTError

from . import figures, markdown
from .document import SCHEMA, ReportError, read, write_text
from .types import Report

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
"""Markers in the README; the tables are between them."""

RESULTS = Path("benchmarks", "results")
"""Where the reports are, from the README."""


def reports(root: Path) -> dict[Path, Report]:
    """The reports below ``root``, by their path from there, in the order of their names.

    Other measurements are kept in the same folder; a report is known by its ``schema``.

    Raises:
        ReportError: if a file cannot be read, or a report is not sound.
    """
    found = {}
    for path in sorted((root / RESULTS).glob("*.json")):
        try:
            document = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ReportError(f"cannot read {path} as JSON: {error}") from error
        name = document.get("schema") if isinstance(document, dict) else None
        if isinstance(name, str) and name.partition("/")[0] == SCHEMA.partition("/")[0]:
            found[path.relative_to(root)] = read(path)
    return found


def table(report: Report, path: Path) -> str:
    """The table of one report, with a line that says where it is from."""
    contenders = figures.ordered(report)
    reference = figures.reference(report)
    unit = figures.unit_for(map(figures.picture, contenders))
    step_unit = figures.unit_for(map(figures.step, contenders))
    base = f"x {markdown.escape(reference['label'])}" if reference is not None else "x reference"
    header = [
        "",
        f"{figures.picture_title(report)} ({unit.name})",
        base,
        f"step ({step_unit.name})",
        "peak memory",
        "PSNR (dB)",
    ]
    rows, without = [], []
    for contender in contenders:
        label = markdown.escape(contender["label"])
        time, step, ratio = (
            figures.picture(contender),
            figures.step(contender),
            figures.picture_ratio(report, contender),
        )
        if time is None:
            without.append(f"{label} ({contender['state']}: {markdown.escape(contender['reason'] or 'no figure')})")
            continue
        memory, quality = contender["memory"], contender["quality"]
        rows.append(
            [
                f"**{label}**" if contender["kind"] == "latentrt" else label,
                markdown.cell(time, unit),
                "1" if contender is reference else markdown.ratio(ratio),
                step_unit.text(step.median) if step is not None else "-",
                figures.size(memory["peak_rss_bytes"] if memory else None),
                f"{quality['psnr']:.1f}" if quality else "-",
            ]
        )
    rounds, percent = report["method"]["rounds_done"], f"{100 * report['method']['confidence']:g} %"
    medians = "one picture each" if rounds == 1 else f"medians of {rounds} rounds with {percent} intervals"
    what = f"{markdown.escape(figures.job_text(report))}; {figures.weights_text(report)}"
    lines = [
        f"**{markdown.escape(report['model']['name'])}**: {what}",
        markdown.table(header, rows),
        " ".join(
            [
                f"{markdown.escape(figures.machine_text(report))}; {report['created'][:10]};",
                f"{medians}; PSNR against the reference's picture, 100 where equal.",
                *([markdown.extrapolations(report)] if markdown.extrapolations(report) else []),
                *([f"No figures: {'; '.join(without)}."] if without else []),
                *(["The run was cut short."] if not report["complete"] else []),
                f"[All figures]({path.as_posix()}).",
            ]
        ),
    ]
    return "\n\n".join(lines)


def replaced(text: str, root: Path) -> str:
    """A README's text with its tables made anew.

    Raises:
        ReportError: if it has not just one pair of markers, or a report is not sound.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ReportError(f"expected one {BEGIN} and, after it, one {END}; write both where the tables should be")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    tables = [table(report, path) for path, report in reports(root).items()]
    return before + "\n\n".join([BEGIN, *tables, END]) + after


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite or check the README; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m latentrt.benchmarks.report.readme", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if the tables are not as made"
    )
    arguments = parser.parse_args(argv)
    readme = Path("README.md")
    try:
        try:
            text = readme.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ReportError(f"cannot read {readme}: {error}") from error
        wanted = replaced(text, Path())
        if arguments.check and wanted != text:
            raise ReportError(f"{readme} is not up to date; run python -m latentrt.benchmarks.report.readme")
        if wanted != text:
            write_text(readme, wanted)
    except LatentRTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
