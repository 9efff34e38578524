"""Write the README's table of speed, and the manual's tables, from the reports in ``benchmarks/results``.

    python -m latentrt.benchmarks.report.readme [--check]

The program replaces the text between the markers in the README of the current directory; with ``--check`` it only says
whether that is up to date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentrt.engines.errors import LatentRTError

from ..program import make_parser
from . import figures, markdown
from .document import SCHEMA, ReportError, read, write_text
from .types import ContenderReport, Report

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
"""Markers in the README, before and after its table."""

REPOSITORY = "https://github.com/latentrt/latentrt/blob/main/"
"""Where the repository's files are read online; links of the README are absolute, since package indexes show it too."""

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


def table(report: Report, path: Path, chosen: Sequence[ContenderReport] | None = None, base: str = "") -> str:
    """The table of one report, between a line on the request and a line on the machine.

    Args:
        report: The report.
        path: Its place, for the link to all figures.
        chosen: The contenders to show; ``None`` shows all, and says which have no figures.
        base: What to put before ``path`` in the link.
    """
    contenders = figures.ordered(report) if chosen is None else list(chosen)
    reference = figures.reference(report)
    unit = figures.unit_for(map(figures.image, contenders))
    step_unit = figures.unit_for(map(figures.step, contenders))
    compared = f"x {markdown.escape(reference['label'])}" if reference is not None else "x reference"
    header = [
        "",
        f"{figures.image_title(report)} ({unit.name})",
        compared,
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
    what = "; ".join(filter(None, [markdown.escape(figures.job_text(report)), figures.weights_text(report)]))
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
                f"[All figures]({base}{path.as_posix()}).",
            ]
        ),
    ]
    return "\n\n".join(lines)


def tables(root: Path) -> str:
    """The tables of all reports below ``root``, for the manual; links lead to paths from there.

    Raises:
        ReportError: if a report is not valid.
    """
    return "\n\n".join(table(report, path) for path, report in reports(root).items())


def leaders(report: Report) -> list[ContenderReport]:
    """At most five contenders that stand for all: our two fastest, the fastest other runtime, and the reference.

    Of the reference's own library the fastest is there too. All are in the order of their times.
    """
    timed = [each for each in figures.ordered(report) if figures.image(each) is not None]
    reference = figures.reference(report)
    library = "" if reference is None else _library(reference)
    ours = [each for each in timed if each["kind"] == "latentrt"][:2]
    peers = [each for each in timed if each["kind"] != "latentrt"]
    others = [each for each in peers if _library(each) != library][:1]
    same = [each for each in peers if _library(each) == library and each is not reference][:1]
    chosen = [*ours, *others, *same, *([] if reference is None else [reference])]
    return [each for each in timed if each in chosen]


def _library(contender: ContenderReport) -> str:
    return contender["label"].split()[0].rstrip(",")


def largest(found: Mapping[Path, Report]) -> Path:
    """The report whose fastest image took longest: the model that is most like one that people use."""
    return max(found, key=lambda path: min(each.median for each in _images(found[path])))


def _images(report: Report) -> list[figures.Figure]:
    return [figure for each in report["contenders"] if (figure := figures.image(each)) is not None]


def replaced(text: str, root: Path) -> str:
    """A README's text with a new table: five rows of the largest model's report.

    Args:
        text: The README.
        root: The repository with the reports.

    Raises:
        ReportError: if the text has not exactly one pair of markers, or a report is not valid, or none has figures.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ReportError(f"expected one {BEGIN} and, after it, one {END}; write both where the table should be")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    found = {path: report for path, report in reports(root).items() if _images(report)}
    if not found:
        raise ReportError(f"no report in {RESULTS} has figures; measure first, with make bench")
    path = largest(found)
    made = table(found[path], path, leaders(found[path]), REPOSITORY)
    return before + "\n\n".join([BEGIN, made, END]) + after


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
