"""Write the README's tables of speed from the reports in ``benchmarks/results``.

    python -m latentrt.benchmarks.report.readme [--check]

The program replaces the text between the markers in the README of the current directory; with ``--check`` it only says
whether that is up to date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from latentrt.engines.errors import LatentRTError

from ..program import make_parser
from . import figures, markdown
from .document import SCHEMA, ReportError, read, write_text
from .types import Report

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
"""Markers in the README, before and after the tables."""

RESULTS = Path("benchmarks", "results")
"""The folder of the reports, relative to the README."""


def reports(root: Path) -> dict[Path, Report]:
    """The reports of a repository by their path from ``root``, in the order of their names.

    The folder holds other measurements too; reports are the files with a ``schema``.

    Raises:
        ReportError: if a file cannot be read, or is no valid report.
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
    """The table of one report, between a line on the request and a line on the machine."""
    contenders = figures.ordered(report)
    reference = figures.reference(report)
    unit = figures.unit_for(map(figures.image, contenders))
    step_unit = figures.unit_for(map(figures.step, contenders))
    base = f"x {markdown.escape(reference['label'])}" if reference is not None else "x reference"
    header = [
        "",
        f"{figures.image_title(report)} ({unit.name})",
        base,
        f"step ({step_unit.name})",
        "peak memory",
        "PSNR (dB)",
    ]
    rows, without = [], []
    for contender in contenders:
        label = markdown.escape(contender["label"])
        time, step, ratio = (
            figures.image(contender),
            figures.step(contender),
            figures.image_ratio(report, contender),
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
    medians = "one image each" if rounds == 1 else f"medians of {rounds} rounds with {percent} intervals"
    what = f"{markdown.escape(figures.job_text(report))}; {figures.weights_text(report)}"
    lines = [
        f"**{markdown.escape(report['model']['name'])}**: {what}",
        markdown.table(header, rows),
        " ".join(
            [
                f"{markdown.escape(figures.machine_text(report))}; {report['created'][:10]};",
                f"{medians}; PSNR against the reference's image, 100 where equal.",
                *([markdown.extrapolations(report)] if markdown.extrapolations(report) else []),
                *([f"No figures: {'; '.join(without)}."] if without else []),
                *(["The run ended early."] if not report["complete"] else []),
                f"[All figures]({path.as_posix()}).",
            ]
        ),
    ]
    return "\n\n".join(lines)


def replaced(text: str, root: Path) -> str:
    """A README's text with new tables.

    Args:
        text: The README.
        root: The repository with the reports.

    Raises:
        ReportError: if the text has not exactly one pair of markers, or a report is not valid.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ReportError(f"expected one {BEGIN} and, after it, one {END}; write both where the tables should be")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    tables = [table(report, path) for path, report in reports(root).items()]
    return before + "\n\n".join([BEGIN, *tables, END]) + after


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite or check the README; returns the exit status."""
    parser = make_parser("report.readme", __doc__, json_file=False)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with status 1 if the tables are not up to date"
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
