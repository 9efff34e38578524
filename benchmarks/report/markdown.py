"""The report as Markdown: every contender with its figures, or the reason why it has none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from . import figures
from .figures import Figure, Unit
from .types import ContenderReport, Interval, Report

# An underscore within a word is one; elsewhere it may begin emphasis.
_SPECIAL = re.compile(r"([\\`*\[\]<|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def to_markdown(report: Report) -> str:
    """The report as GitHub's Markdown with tables.

    Text from outside (prompt, labels, reasons) is escaped: it can neither form markup nor leave its cell.
    """
    parts = [
        f"# Benchmark: {escape(report['model']['name'])}",
        _introduction(report),
        _missing(report),
        "## Results",
        results(report),
        _remarks(report),
        _section("## First image of a new process", _cold(report)),
        _section("## Throughput", _throughput(report)),
        _section("## Roofline", _roofline(report)),
        _section("## MLPerf's load generator", _loadgen(report)),
        "## Method",
        _method(report),
        _section("## Versions", _versions(report)),
        _section("## Notes", _notes(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: object) -> str:
    """Escape text so that Markdown shows it unchanged, in one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split())).replace("&", "&amp;")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are figures; the cells are Markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def results(report: Report) -> str:
    """The table of all contenders, fastest first."""
    contenders = figures.ordered(report)
    unit = figures.unit_for(map(figures.image, contenders))
    step_unit = figures.unit_for(map(figures.step, contenders))
    decode_unit = figures.unit_for(map(figures.decode, contenders))
    header = [
        "contender",
        f"{figures.image_title(report)} ({unit.name})",
        f"step ({step_unit.name})",
        f"VAE decode ({decode_unit.name})",
        "x reference",
        "first image",
        "peak memory",
        "on disk",
        "PSNR (dB)",
        "SSIM",
    ]
    rows = []
    for contender in contenders:
        memory, quality, cold = contender["memory"], contender["quality"], contender["cold"]
        rows.append(
            [
                name(report, contender),
                cell(figures.image(contender), unit),
                cell(figures.step(contender), step_unit),
                cell(figures.decode(contender), decode_unit),
                ratio(figures.image_ratio(report, contender)),
                figures.seconds(cold["process_to_picture"] if cold else None),
                figures.size(memory["peak_rss_bytes"] if memory else None),
                figures.size(contender["disk_bytes"]),
                f"{quality['psnr']:.1f}" if quality else "-",
                f"{quality['ssim']:.4f}" if quality else "-",
            ]
        )
    return table(header, rows)


def name(report: Report, contender: ContenderReport) -> str:
    """A contender's label, bold for LatentRT, with its state unless that is ``"measured"``."""
    text = escape(contender["label"])
    text = f"**{text}**" if contender["kind"] == "latentrt" else text
    if report["reference"] is not None and contender["name"] == report["reference"]["contender"]:
        text += " (reference)"
    return text if contender["state"] == "measured" else f"{text} ({contender['state']})"


def cell(figure: Figure | None, unit: Unit) -> str:
    """A figure with its interval; in italics if it is extrapolated."""
    if figure is None:
        return "-"
    text = f"{unit.text(figure.median)} {unit.interval(figure)}".rstrip()
    return f"*{text}*" if figure.extrapolated else text


def ratio(figure: Figure | None) -> str:
    """A ratio with its interval; in italics if it is extrapolated."""
    if figure is None:
        return "-"
    text = f"{figure.median:.2f} [{figure.low:.2f}, {figure.high:.2f}]" if figure.spread else f"{figure.median:.2f}"
    return f"*{text}*" if figure.extrapolated else text


def extrapolations(report: Report) -> str:
    """The explanation of figures in italics; empty if there are none."""
    found = {figures.extrapolation_text(report, c) for c in report["contenders"] if c["extrapolated"] is not None}
    if not found:
        return ""
    return f"Figures in italics were not measured: {'; '.join(sorted(found))}."


def _section(heading: str, body: str) -> str:
    return f"{heading}\n\n{body}" if body else ""


def _introduction(report: Report) -> str:
    job, model = report["job"], report["model"]
    parameters = figures.count(sum(model["parameters"].values()))  # type: ignore[arg-type]
    lines = [
        f"- **Drawn:** {escape(figures.job_text(report))}; seed {job['seed']}, prompt {_quoted(job['prompt'])}",
        "- **Model:** "
        + ", ".join(filter(None, [escape(model["name"]), f"{parameters} parameters", figures.weights_text(report)])),
        f"- **Machine:** {escape(figures.machine_text(report))}",
        f"- **System:** {escape(report['machine']['system'])}; LatentRT {escape(report['machine']['latentrt'])}, "
        f"Python {escape(report['machine']['python'])}",
        f"- **When:** {report['created']}",
    ]
    if job["negative_prompt"]:
        lines[0] += f", negative prompt {_quoted(job['negative_prompt'])}"
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return f'"{escape(text)}"'


def _missing(report: Report) -> str:
    known = report["missing"]  # most contenders that were not measured have a sentence here
    without = [
        c
        for c in figures.ordered(report)
        if c["state"] != "measured" and not any(sentence.startswith(c["label"]) for sentence in known)
    ]
    lines = [f"- {escape(sentence)}" for sentence in known]
    lines += [f"- {escape(c['label'])}, {c['state']}: {escape(c['reason'])}" for c in without]
    if not report["complete"]:
        lines.insert(0, "- **The run ended early; these are its results until then.**")
    return _section("## Missing", "\n".join(lines))


def _remarks(report: Report) -> str:
    percent = f"{100 * report['method']['confidence']:g} %"
    remarks = [
        f"Medians, with their {percent} bootstrap intervals in brackets. *First image* is from the start of the "
        "process. PSNR and SSIM are of the image against the reference's; 100 dB means that they are equal."
    ]
    if report["reference"] is not None:
        label = next(c["label"] for c in report["contenders"] if c["name"] == report["reference"]["contender"])
        remarks.append(
            f"The reference is {escape(label)}: {escape(report['reference']['why'])}. Ratios are its time over the "
            "contender's, pair by pair within a round; above 1 is faster."
        )
    remarks.append(extrapolations(report))
    return "\n\n".join(remark for remark in remarks if remark)


def _cold(report: Report) -> str:
    rows = []
    for contender in figures.ordered(report):
        cold = contender["cold"]
        if cold is not None:
            times = (
                cold["import"],
                cold["load"],
                cold["compile"],
                cold["compile_cached"],
                cold["first_picture"],
                cold["process_to_picture"],
                contender["build_seconds"],
            )
            rows.append([name(report, contender), *map(figures.seconds, times)])
    header = ["contender", "import", "load", "compile", "compile, cached", "first image", "in all", "built once in"]
    return table(header, rows) if rows else ""


def _throughput(report: Report) -> str:
    having = [contender for contender in figures.ordered(report) if contender["throughput"]]
    sizes = sorted({entry["images"] for contender in having for entry in contender["throughput"]})
    rows = []
    for contender in having:
        found = {entry["images"]: entry["per_minute"] for entry in contender["throughput"]}
        rows.append([name(report, contender), *(_per_minute(found.get(images)) for images in sizes)])
    if not rows:
        return ""
    header = ["images a minute", *(f"{images} at once" for images in sizes)]
    return table(header, rows)


def _per_minute(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    low, high = figures.significant(interval["low"]), figures.significant(interval["high"])
    return f"{figures.significant(interval['median'])} [{low}, {high}]"


def _roofline(report: Report) -> str:
    parts = []
    if (ceilings := report["ceilings"]) is not None:
        lines = []
        for precision, entry in ceilings["matmul"].items():
            found = escape(entry["unavailable"]) if "unavailable" in entry else figures.rate(entry["flops_per_second"])
            library = "" if "unavailable" in entry else f" ({escape(entry['library'])})"
            lines.append(f"- product of matrices, {precision}: {found}{library}")
        copy = ceilings["copy"]
        lines.append(
            f"- copy: {escape(copy['unavailable'])}"
            if "unavailable" in copy
            else f"- copy: {figures.rate(copy['bytes_per_second'], 'B/s')}"
        )
        parts.append("The machine's highest rates, measured in the same run:\n\n" + "\n".join(lines))
    rows = [
        [
            f"{name(report, contender)}: {escape(roof['stage'])}",
            escape(roof["precision"]),
            figures.significant(roof["flops"] / 1e9),
            figures.significant(roof["flops"] / roof["bytes"]) if roof["bytes"] else "-",
            figures.rate(roof["achieved_flops"]),
            figures.rate(roof["ceiling_flops"]) if roof["ceiling_flops"] is not None else "-",
            f"{roof['percent']:.0f} %" if roof["percent"] is not None else "-",
            roof["bound"] or "-",
        ]
        for contender in figures.ordered(report)
        for roof in contender["roofline"]
    ]
    if rows:
        header = ["stage", "precision", "GFLOP", "FLOP a byte", "achieved", "ceiling", "of it", "bound by"]
        parts.append(table(header, rows))
    return "\n\n".join(parts)


def _loadgen(report: Report) -> str:
    parts = []
    for entry in report["loadgen"]:
        versions = ", ".join(f"{escape(key)} {escape(value)}" for key, value in entry["versions"].items())
        parts.append(f"### {entry['scenario']}: {'VALID' if entry['valid'] else 'INVALID'}\n\n{versions}".rstrip())
        # Indented code needs no fence, so nothing in the text can end it.
        lines = entry["summary"].replace("\r", "\n").splitlines()
        parts.append("\n".join(f"    {line}" for line in lines))
    return "\n\n".join(part for part in parts if part.strip())


def _method(report: Report) -> str:
    method, machine = report["method"], report["machine"]
    kept = "stayed in memory" if method["residency"] == "resident" else "was loaded again for its turn"
    budget = "" if method["budget_seconds"] is None else f", within {figures.seconds(method['budget_seconds'])}"
    governor = "unknown" if machine["governor"] is None else escape(machine["governor"])
    return "\n".join(
        [
            f"- {method['rounds_done']} of {method['rounds_asked']} rounds{budget}, after {method['warm_up']} images "
            f"of warm-up; order: {escape(method['order'])}; each contender {kept}.",
            f"- Intervals: bootstrap, {100 * method['confidence']:g} %, {method['resamples']} samples.",
            f"- {escape(figures.noise_text(report))}",
            f"- Load before the run: {machine['load_before']:.2f}. Frequency governor: {governor}. "
            f"Instructions: {escape(', '.join(machine['instructions'])) or 'unknown'}.",
        ]
    )


def _versions(report: Report) -> str:
    lines = []
    for contender in figures.ordered(report):
        versions = ", ".join(f"{escape(key)} {escape(value)}" for key, value in contender["versions"].items())
        options = f"; options {escape(json.dumps(contender['options']))}" if contender["options"] else ""
        if versions or options:
            lines.append(f"- {escape(contender['label'])}: {versions}{options}")
    return "\n".join(lines)


def _notes(report: Report) -> str:
    return "\n".join(
        f"- {escape(contender['label'])}: {escape(note)}"
        for contender in figures.ordered(report)
        for note in contender["notes"]
    )
