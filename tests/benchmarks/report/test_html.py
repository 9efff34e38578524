"""The page, its ``plots`` and ``screenshot``: well formed, complete, alone; text from outside never becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from latentrt.benchmarks.report import plots, screenshot
from latentrt.benchmarks.report.document import ReportError
from latentrt.benchmarks.report.html import to_html

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """A page's elements and texts; fails where a tag is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"an attribute of {tag} is there twice"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        """Attributes of all elements of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self) -> str:
        """All text that is shown, with single spaces."""
        shown = " ".join(data for tag, each in self.texts.items() if tag not in ("script", "style") for data in each)
        return " ".join(shown.split())


@pytest.fixture(scope="module")
def pages(reports: Any) -> dict[str, tuple[dict[str, Any], str]]:
    """Reports and their pages."""
    found = {"emoji": reports.make(), "sd15": reports.make("sd15"), "hostile": reports.hostile()}
    pictures = {reports.REFERENCE: reports.picture(0), "latentrt-openvino": reports.picture(9)}
    return {name: (report, to_html(report, pictures)) for name, report in found.items()}


@pytest.mark.parametrize("name", ["emoji", "sd15", "hostile"])
def test_the_page_is_well_formed_and_alone(pages: dict[str, tuple[dict[str, Any], str]], name: str) -> None:
    """Tags close in order, references lead somewhere, nothing is loaded, no program is in it, styles are its own."""
    page = Page(pages[name][1])
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    for tag, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on") or key == "style"], tag
        for key in ("src", "href", "xlink:href", "action", "srcset", "poster", "data"):
            assert attributes.get(key, "data:").startswith("data:"), attributes
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in identifiers
    assert [attributes["type"] for attributes in page.all("script")] == ["application/json"]
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
    (style,) = page.texts["style"]
    assert set(re.findall(r"url\(([^)]*)\)", style)) == {"#hatch-ours", "#hatch-peer", "#hatch-reference"}
    assert "@import" not in style
    assert {"hatch-ours", "hatch-peer", "hatch-reference"} <= set(identifiers)


def test_the_policy_lets_only_its_own_style_apply(pages: dict[str, tuple[dict[str, Any], str]]) -> None:
    """The content security policy names the hash of the style sheet, as CSP level 3 computes it, and nothing else."""
    page = Page(pages["emoji"][1])
    (policy,) = [each["content"] for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    directives = dict(each.strip().split(" ", 1) for each in policy.split(";"))
    (style,) = page.texts["style"]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert directives == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


@pytest.mark.parametrize("name", ["emoji", "sd15", "hostile"])
def test_the_report_is_in_the_page(pages: dict[str, tuple[dict[str, Any], str]], name: str) -> None:
    """As data in the page and as a file to keep, both with every measurement."""
    report, text = pages[name]
    page = Page(text)
    embedded = "".join(page.texts["script"])
    assert "<" not in embedded  # after "<!--<script" a parser no longer ends the script where it should
    assert json.loads(embedded) == report
    (link,) = [each for each in page.all("a") if "download" in each]
    assert json.loads(base64.b64decode(link["href"].partition("base64,")[2])) == report


def test_hostile_text_is_shown_and_does_nothing(reports: Any, pages: dict[str, tuple[dict[str, Any], str]]) -> None:
    """Labels, reasons and the prompt are there word by word, none of them as an element."""
    report, text = pages["hostile"]
    page = Page(text)
    expected = " ".join(reports.HOSTILE.split())
    assert page.text().count(expected) > 3 * len(report["contenders"])
    assert all(set(attributes) <= {"class"} for attributes in page.all("b"))
    assert text.count("<script") == 1


def test_every_contender_is_there(pages: dict[str, tuple[dict[str, Any], str]]) -> None:
    """With its figures as the report has them, or with the reason why it has none."""
    report, text = pages["emoji"]
    shown = Page(text).text()
    for contender in report["contenders"]:
        assert contender["label"] in shown
        if contender["reason"]:
            assert contender["reason"] in shown
        else:
            total = contender["summary"]["total"]
            assert f"{total['median']:#.3g} s" in shown
            assert f"[{total['low']:#.3g}, {total['high']:#.3g}]" in shown


def test_bars_are_as_long_as_their_figures(pages: dict[str, tuple[dict[str, Any], str]]) -> None:
    """Lengths of the first chart's bars are in the ratio of the medians."""
    report, text = pages["emoji"]
    chart = text.partition('<ul class="chart"')[2].partition("</ul>")[0]
    lengths = [float(width) for width in re.findall(r'<rect class="bar [^>]*width="([0-9.]+)%"', chart)]
    medians = sorted(c["summary"]["total"]["median"] for c in report["contenders"] if c["state"] == "measured")
    assert [length / lengths[0] for length in lengths] == pytest.approx([m / medians[0] for m in medians], rel=1e-3)


def test_extrapolated_bars_are_hatched(pages: dict[str, tuple[dict[str, Any], str]]) -> None:
    """Those of images that were never drawn in full, and only those; the text says from how many steps."""
    assert "hatched" not in pages["emoji"][1].partition("<body>")[2]
    report, text = pages["sd15"]
    measured = [contender for contender in report["contenders"] if contender["state"] == "measured"]
    assert len(re.findall(r'<rect class="bar [a-z]+ hatched"', text)) == len(measured)
    assert "extrapolated from 3 steps" in Page(text).text()


def test_plots_are_told_to_those_who_do_not_see_them(pages: dict[str, tuple[dict[str, Any], str]]) -> None:
    """Each plot has a title, or is hidden from readers where its text says the same; images have texts."""
    text = pages["emoji"][1]
    for opening, after in re.findall(r"(<svg class=\"plot[^>]*>)(<title>)?", text):
        assert after or 'aria-hidden="true"' in opening
    assert all(image["alt"] for image in Page(text).all("img"))


def test_a_report_without_anything_has_a_page(reports: Any) -> None:
    """A run that ended early before the first image says what is missing, and why."""
    report = reports.make()
    report |= {"complete": False, "missing": ["Everything: it was interrupted."], "ceilings": None, "loadgen": []}
    report["contenders"] = [c for c in report["contenders"] if c["state"] != "measured"]
    report |= {"reference": None, "control": report["control"] | {"samples": [], "cv": None}}
    shown = Page(to_html(report)).text()
    assert "This run ended early" in shown
    assert "Everything: it was interrupted." in shown
    assert "the processor has no bf16 instructions" in shown


def test_memory_of_a_device_is_shown(reports: Any) -> None:
    """Beside that of the process, on the same scale."""
    report = reports.make()
    for contender in report["contenders"]:
        if contender["memory"]:
            contender["memory"]["device_peak_bytes"] = 5_000_000_000
    assert "5.00 GB on the device" in Page(to_html(report)).text()


def test_images_must_be_images(reports: Any) -> None:
    """One of nobody, or one that is no PNG, is refused."""
    report = reports.make()
    with pytest.raises(ReportError, match="'nobody', which is none of the contenders"):
        to_html(report, {"nobody": reports.picture(0)})
    with pytest.raises(ReportError, match="is no PNG file"):
        to_html(report, {reports.REFERENCE: b"<svg onload=alert(1)>"})


@pytest.mark.parametrize(
    ("top", "expected"),
    [(1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (7.0, [0, 2, 4, 6]), (0.0421, [0, 0.01, 0.02, 0.03, 0.04]), (0, [0])],
)
def test_ticks_are_round(top: float, expected: list[float]) -> None:
    """Steps of 1, 2, 2.5 or 5 times a power of ten, none beyond the top."""
    assert plots.ticks(top) == pytest.approx(expected)


def test_the_roofline_is_where_it_should_be() -> None:
    """A stage that reaches the ceiling lies on its line, and the slope meets the level line at peak over copy."""
    dot = plots.Dot(100.0, 1e11, "step", "circle", "fp32", "A")
    text = plots.roofline([dot], {"fp32": 1e11}, 1e10, "title", "description")
    (level,) = re.findall(r'class="ceiling fp32" x1="([0-9.]+)%" x2="100%" y1="([0-9.]+)"', text)
    (slope,) = re.findall(r'class="ceiling memory" x1="[0-9.]+%" x2="([0-9.]+)%" y1="[0-9.]+" y2="([0-9.]+)"', text)
    (place,) = re.findall(r'class="place" x="([0-9.]+)%" y="([0-9.]+)"', text)
    assert slope == level
    assert place[1] == level[1]
    # From 10 / 2.5 to 100 * 2.5 operations a byte, so that 100 is at log(25) / log(62.5) of the width.
    assert float(place[0]) == pytest.approx(77.84, abs=0.01)


def test_without_a_browser_there_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way to get one is named."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert screenshot.main([str(tmp_path / "page.html")]) == 1
    assert capsys.readouterr().err == (
        "error: there is no Chromium on the path; install it, on Debian with: apt-get install chromium\n"
    )


@pytest.mark.heavy
def test_the_page_does_not_scroll_sideways_on_a_phone(
    pages: dict[str, tuple[dict[str, Any], str]], tmp_path: Path
) -> None:
    """Laid out by a browser 390 pixels wide, not even hostile text makes the page wider."""
    try:
        screenshot.browser()
    except ReportError:
        pytest.skip("there is no Chromium here")
    for name in ("emoji", "hostile"):
        path = tmp_path / f"{name}.html"
        path.write_text(pages[name][1], encoding="utf-8")
        assert screenshot.measure(path, 390)[0] == 390
