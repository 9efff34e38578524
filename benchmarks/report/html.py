"""The report as one HTML page that contains its style, plots and images, and the report itself.

The page has no scripts, and a content security policy that lets none run and nothing be loaded; all text from outside
(prompt, labels, reasons) is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import median
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from . import figures, plots
from .document import ReportError, to_json
from .figures import Figure, Unit
from .types import ContenderReport, Report

SAME_IMAGE = 40.0
"""PSNR in dB from which two images count as the same: an error of 2.5 of 255 levels."""

_PNG = b"\x89PNG\r\n\x1a\n"
_STAGE_SHAPES = {"step": "circle", "vae_decoder": "square", "text_encoder": "triangle", "prompt": "diamond"}


@dataclass(frozen=True)
class Row:
    """A row of a chart: a contender with its bar, or the reason why it has none."""

    contender: ContenderReport
    kind: str
    svg: Markup | None
    text: str
    detail: str
    quality: str


@dataclass(frozen=True)
class Chart:
    """Rows of bars with their common axis."""

    rows: list[Row]
    axis: Markup
    unit: str


@dataclass(frozen=True)
class Panel:
    """A small plot of one contender."""

    label: str
    kind: str
    text: str
    svg: Markup


def to_html(report: Report, images: Mapping[str, bytes] | None = None) -> str:
    """The report as a page.

    Args:
        report: The report.
        images: The contenders' images by their names, as small PNG files.

    Raises:
        ReportError: if the report is not valid, or if an image belongs to no contender or is no PNG file.
    """
    text = to_json(report)
    style = files(__package__).joinpath("templates/report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    contenders = figures.ordered(report)
    reference = figures.reference(report)
    times = [figures.image(contender) for contender in contenders]
    steps = [figures.step(contender) for contender in contenders]
    return _template().render(
        report=report,
        figures=figures,
        style=Markup(style),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'",
        contenders=contenders,
        reference=reference,
        tiles=_tiles(report),
        image_chart=_times(report, contenders, times, figures.image_title(report), reasons=True),
        step_chart=_times(report, contenders, steps, "step"),
        step_unit=figures.unit_for(steps),
        image_unit=figures.unit_for(times),
        decode_unit=figures.unit_for(map(figures.decode, contenders)),
        memory_chart=_memory(report, contenders),
        traces=_traces(report, contenders),
        throughput=_throughput(report, contenders),
        roofline=_roofline(report, contenders),
        images=_images(report, images or {}),
        kind=lambda contender: _kind(report, contender),
        extrapolations=sorted({figures.extrapolation_text(report, c) for c in contenders} - {""}),
        options=lambda contender: json.dumps(contender["options"], ensure_ascii=False),
        # In a script element only "<" can end the element; within JSON's strings it may be written as an escape.
        embedded=Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")),
        download=f"data:application/json;base64,{base64.b64encode(text.encode()).decode()}",
    )


@cache
def _template() -> Template:
    source = files(__package__).joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)


def _kind(report: Report, contender: ContenderReport) -> str:
    if report["reference"] is not None and contender["name"] == report["reference"]["contender"]:
        return "reference" if contender["kind"] == "peer" else "ours"
    return "ours" if contender["kind"] == "latentrt" else "peer"


def _quality(contender: ContenderReport) -> str:
    quality = contender["quality"]
    if quality is None:
        return ""
    return "equal to the last bit" if quality["psnr"] >= 100 else f"PSNR {quality['psnr']:.1f} dB"


def _tiles(report: Report) -> list[dict[str, str]]:
    """The main results; a peer is among them only if it draws the same image as the reference."""

    def same(contender: ContenderReport) -> bool:
        return contender["quality"] is not None and contender["quality"]["psnr"] >= SAME_IMAGE

    drawn = [contender for contender in figures.ordered(report) if figures.image(contender) is not None]
    ours = [contender for contender in drawn if contender["kind"] == "latentrt"]
    peers = [contender for contender in drawn if contender["kind"] == "peer"]
    alike = next((contender for contender in ours if same(contender)), None)
    tiles = []
    if ours and ours[0] is not alike:
        tiles.append(_tile(report, ours[0], "fastest LatentRT", _quality(ours[0]) or "its image was not compared"))
    if alike is not None:
        tiles.append(_tile(report, alike, "fastest LatentRT with the same image", _quality(alike)))
    if peer := next(filter(same, peers), None):
        detail = _quality(peer)
        if alike is not None and (one := figures.image(alike)) and (other := figures.image(peer)):
            ratio = other.median / one.median
            detail = (
                f"LatentRT is {ratio:.2f} times as fast" if ratio >= 1 else f"{1 / ratio:.2f} times as fast as LatentRT"
            )
        tiles.append(_tile(report, peer, "fastest peer with the same image", detail))
    cv = report["control"]["cv"]
    if cv is not None:
        tiles.append(
            {
                "value": f"{100 * cv:.1f} %",
                "what": "noise of the machine",
                "who": "coefficient of variation",
                "detail": "of the control, the same work once a round",
                "kind": "plain",
            }
        )
    return tiles


def _tile(report: Report, contender: ContenderReport, what: str, detail: str) -> dict[str, str]:
    time, ratio = figures.image(contender), figures.image_ratio(report, contender)
    assert time is not None
    kind = _kind(report, contender)
    who = contender["label"]
    if ratio is not None and contender is not figures.reference(report):
        detail = f"{ratio.median:.2f} times as fast as the reference; {detail}"
    if time.extrapolated:
        detail = f"extrapolated from {figures.measured_text(report, contender)}; {detail}"
    unit = figures.unit_for(map(figures.image, report["contenders"]))
    value = f"{unit.text(time.median)} {unit.name}"
    return {
        "value": f"~ {value}" if time.extrapolated else value,
        "what": what,
        "who": who,
        "detail": detail,
        "kind": kind,
    }


def _times(
    report: Report,
    contenders: Sequence[ContenderReport],
    times: Sequence[Figure | None],
    what: str,
    reasons: bool = False,
) -> Chart | None:
    """Times of all contenders; ``reasons`` says whether those that drew nothing appear, with their reasons."""
    known = [time for time in times if time is not None]
    if not known:
        return None
    unit, top = figures.unit_for(known), max(time.high for time in known) * 1.02
    base = figures.reference(report)
    mark = next((t.median for c, t in zip(contenders, times, strict=True) if c is base and t is not None), None)
    rows = []
    for contender, time in zip(contenders, times, strict=True):
        kind = _kind(report, contender)
        if time is None and not reasons and figures.image(contender) is None:
            continue
        if time is None:
            why = contender["reason"] or f"it does not report the time of {what}"
            rows.append(Row(contender, kind, None, why, contender["state"], ""))
            continue
        text, interval = f"{unit.text(time.median)} {unit.name}", unit.interval(time)
        detail = figures.extrapolation_text(report, contender) if time.extrapolated else ""
        title = (
            f"{contender['label']}: {what} in {text}, interval {interval} {unit.name}{', ' if detail else ''}{detail}"
        )
        shape = plots.Bar(time.median, time.low, time.high, title, kind, time.extrapolated)
        svg = Markup(plots.bar(shape, top, mark))
        below = [_quality(contender), f"extrapolated from {figures.measured_text(report, contender)}" if detail else ""]
        rows.append(Row(contender, kind, svg, text, interval, ", ".join(filter(None, below))))
    return Chart(rows, _axis(top, unit), unit.name)


def _axis(top: float, unit: Unit) -> Markup:
    places = plots.ticks(top)
    return Markup(plots.axis(top, {place: f"{place * unit.factor:g} {unit.name}" for place in places}))


def _memory(report: Report, contenders: Sequence[ContenderReport]) -> Chart | None:
    most = [_peak(contender) for contender in contenders]
    top = max(most, default=0) * 1.02
    if top == 0:
        return None
    rows = []
    for contender in contenders:
        memory, kind = contender["memory"], _kind(report, contender)
        if memory is None:
            if figures.image(contender) is not None:
                rows.append(Row(contender, kind, None, "its memory was not measured", contender["state"], ""))
            continue
        device = memory["device_peak_bytes"]
        loaded = f"{figures.size(memory['loaded_rss_bytes'])} loaded"
        text = figures.size(memory["peak_rss_bytes"])
        detail = loaded if device is None else f"{loaded}; {figures.size(device)} on the device"
        title = f"{contender['label']}: {text} at most, {detail}"
        shape = plots.Bar(memory["peak_rss_bytes"], 0, 0, title, kind, inner=memory["loaded_rss_bytes"])
        svg = plots.bar(shape, top)
        if device is not None:
            svg += plots.bar(
                plots.Bar(device, 0, 0, f"{contender['label']}: {figures.size(device)} on the device", kind), top
            )
        rows.append(Row(contender, kind, Markup(svg), text, detail, ""))
    axis = plots.axis(top, {place: figures.size(place) if place else "0" for place in plots.ticks(top)})
    return Chart(rows, Markup(axis), "")


def _peak(contender: ContenderReport) -> int:
    memory = contender["memory"]
    return 0 if memory is None else max(memory["peak_rss_bytes"], memory["device_peak_bytes"] or 0)


def _traces(report: Report, contenders: Sequence[ContenderReport]) -> list[Panel]:
    """Each contender's steps: the median over rounds, with the quartiles."""
    having = [contender for contender in contenders if contender["samples"]["step"]]
    lines = []
    for contender in having:
        rounds = [steps for steps in contender["samples"]["step"] if steps]
        columns = [sorted(column) for column in zip(*rounds, strict=False)]
        lines.append(
            plots.Line(
                list(range(1, len(columns) + 1)),
                [median(column) for column in columns],
                [column[len(column) // 4] for column in columns],
                [column[-1 - len(column) // 4] for column in columns],
                _kind(report, contender),
            )
        )
    unit = figures.unit_for(map(figures.step, having))
    last = max((x for line in lines for x in line.x), default=1)
    return _panels(
        having,
        lines,
        {1.0: "step 1", float(last): f"step {last:g}"},
        lambda value: f"{value * unit.factor:g}",
        lambda contender, line: _step_text(contender, unit),
    )


def _step_text(contender: ContenderReport, unit: Unit) -> str:
    time = figures.step(contender)
    return "" if time is None else f"{unit.text(time.median)} {unit.name}"


def _throughput(report: Report, contenders: Sequence[ContenderReport]) -> list[Panel]:
    having = [contender for contender in contenders if contender["throughput"]]
    lines = []
    for contender in having:
        entries = sorted(contender["throughput"], key=lambda entry: entry["images"])
        rates = [entry["per_minute"] for entry in entries]
        lines.append(
            plots.Line(
                [math.log2(entry["images"]) for entry in entries],
                [rate["median"] for rate in rates],
                [rate["low"] for rate in rates],
                [rate["high"] for rate in rates],
                _kind(report, contender),
            )
        )
    return _panels(
        having,
        lines,
        {math.log2(entry["images"]): str(entry["images"]) for c in having for entry in c["throughput"]},
        lambda value: f"{value:g}",
        lambda contender, line: f"{figures.significant(max(line.y))} a minute",
    )


def _panels(
    contenders: Sequence[ContenderReport],
    lines: Sequence[plots.Line],
    below: Mapping[float, str],
    tick: Callable[[float], str],
    text: Callable[[ContenderReport, plots.Line], str],
) -> list[Panel]:
    pairs = [(contender, line) for contender, line in zip(contenders, lines, strict=True) if line.x]
    drawn = [line for _, line in pairs]
    top = max((value for line in drawn for value in line.high), default=0) * 1.05
    if top == 0:
        return []
    labels = {place: tick(place) for place in plots.ticks(top, 3)}
    panels = []
    for index, (contender, line) in enumerate(pairs):
        values = ", ".join(
            f"{below.get(x, f'{x:g}')}: {figures.significant(y)}" for x, y in zip(line.x, line.y, strict=True)
        )
        svg = plots.trace(drawn, index, top, labels, below, f"{contender['label']}; {values}")
        panels.append(Panel(contender["label"], line.kind, text(contender, line), Markup(svg)))
    return panels


def _roofline(report: Report, contenders: Sequence[ContenderReport]) -> dict[str, Any] | None:
    """The roofline's plot and legend; ``None`` without measured ceilings or stages."""
    ceilings = report["ceilings"]
    having = [contender for contender in contenders if contender["roofline"]]
    if ceilings is None or "unavailable" in ceilings["copy"] or not having:
        return None
    peaks, copy = figures.rates(ceilings), ceilings["copy"]["bytes_per_second"]
    if not peaks:
        return None
    stages = list(dict.fromkeys(roof["stage"] for contender in having for roof in contender["roofline"]))
    left = [shape for shape in plots.SHAPES if shape not in _STAGE_SHAPES.values()]
    shapes = {stage: _STAGE_SHAPES.get(stage) or (left.pop(0) if left else plots.SHAPES[-1]) for stage in stages}
    letters = {contender["name"]: chr(ord("A") + index % 26) for index, contender in enumerate(having)}
    dots = [
        plots.Dot(
            roof["flops"] / roof["bytes"],
            roof["achieved_flops"],
            f"{contender['label']}, {roof['stage']}, {roof['precision']}: {figures.rate(roof['achieved_flops'])}",
            shapes[roof["stage"]],
            roof["precision"] if roof["precision"] in peaks else "other",
            letters[contender["name"]],
        )
        for contender in having
        for roof in contender["roofline"]
        if roof["bytes"] > 0 and roof["flops"] > 0 and roof["achieved_flops"] > 0
    ]
    if not dots:
        return None
    description = "; ".join(dot.title for dot in dots)
    svg = plots.roofline(dots, peaks, copy, "Roofline: operations a second over operations a byte", description)
    return {
        "svg": Markup(svg),
        "stages": [(stage, Markup(plots.marker(shape))) for stage, shape in shapes.items()],
        "letters": [(letters[contender["name"]], contender["label"]) for contender in having],
        "precisions": sorted({dot.precision for dot in dots}),
        "memory": figures.rate(copy, "B/s"),
    }


def _images(report: Report, images: Mapping[str, bytes]) -> list[dict[str, str]]:
    names = {contender["name"] for contender in report["contenders"]}
    for name, data in images.items():
        if name not in names:
            raise ReportError(f"there is an image of {name!r}, which is none of the contenders")
        if not data.startswith(_PNG):
            raise ReportError(f"the image of {name!r} is no PNG file")
    return [
        {
            "label": contender["label"],
            "kind": _kind(report, contender),
            "quality": _quality(contender),
            "source": f"data:image/png;base64,{base64.b64encode(images[contender['name']]).decode()}",
        }
        for contender in figures.ordered(report)
        if contender["name"] in images
    ]
