"""Take screenshots of a page at the width of a desktop and of a phone, in light and in dark.

    python -m latentrt.benchmarks.report.screenshot PAGE.html --output DIRECTORY

The program needs Chromium on the path. Chromium has no window narrower than 500 pixels, so the phone is a frame within
a page. That page also measures whether the report would scroll sideways; the exit status is 1 if so.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path

from latentrt.engines.errors import LatentRTError

from ..program import make_parser
from .document import ReportError

WIDTHS = {"desktop": 1280, "phone": 390}
"""Widths of windows in pixels."""

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FRAME = """<!DOCTYPE html><meta charset="utf-8"><style>html, body {{ margin: 0; background: #888 }}
iframe {{ display: block; border: 0; width: {width}px; height: {height}px }}</style>
<iframe id="page" src="{source}"></iframe><script>
onload = () => {{ const root = document.getElementById("page").contentDocument.documentElement;
  document.title = `${{root.scrollWidth}} ${{root.scrollHeight}}`; }};
</script>"""


def browser() -> str:
    """Path of Chromium.

    Raises:
        ReportError: if it is not installed.
    """
    found = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if found is None:
        raise ReportError("there is no Chromium on the path; install it, on Debian with: apt-get install chromium")
    return found


def measure(page: Path, width: int) -> tuple[int, int]:
    """Width and height of a page's content in a window of some width, in pixels; a wider page scrolls sideways."""
    with tempfile.TemporaryDirectory() as folder:
        outer = _outer(Path(folder), page, width, 800)
        text = _chromium(["--dump-dom", outer.as_uri()])
    title = text.partition("<title>")[2].partition("</title>")[0].split()
    if len(title) != 2:
        raise ReportError(f"Chromium did not lay out {page}")
    return int(title[0]), int(title[1])


def shoot(page: Path, output: Path, width: int, *, dark: bool = False, height: int | None = None) -> None:
    """Take a screenshot of a page.

    Args:
        page: The HTML file.
        output: The PNG file.
        width: Width of the window in pixels.
        dark: Whether the reader prefers dark pages.
        height: Pixels from the top; the whole page by default.
    """
    height = height or measure(page, width)[1]
    with tempfile.TemporaryDirectory() as folder:
        outer = _outer(Path(folder), page, width, height)
        window = [f"--window-size={width},{height}", f"--screenshot={output}"]
        _chromium([*window, *(["--blink-settings=preferredColorScheme=0"] if dark else []), outer.as_uri()])
    if not output.is_file():
        raise ReportError(f"Chromium wrote no screenshot of {page}")


def main(argv: Sequence[str] | None = None) -> int:
    """Take the four screenshots; returns the exit status."""
    parser = make_parser("report.screenshot", __doc__, json_file=False)
    parser.add_argument("page", type=Path, help="the HTML file")
    parser.add_argument("--output", type=Path, default=Path(), help="directory for the screenshots (default: this one)")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    status = 0
    try:
        for name, width in WIDTHS.items():
            needed, height = measure(arguments.page, width)
            if needed > width:
                print(f"at {width} pixels the page is {needed} wide: it would scroll sideways", file=sys.stderr)
                status = 1
            for dark in (False, True):
                output = arguments.output / f"{arguments.page.stem}-{name}-{'dark' if dark else 'light'}.png"
                shoot(arguments.page, output, width, dark=dark, height=height)
                print(output)
    except LatentRTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return status


def _outer(folder: Path, page: Path, width: int, height: int) -> Path:
    outer = folder / "outer.html"
    source = escape(page.resolve().as_uri())
    outer.write_text(_FRAME.format(width=width, height=height, source=source), encoding="utf-8")
    return outer


def _chromium(arguments: Sequence[str]) -> str:
    with tempfile.TemporaryDirectory() as profile:
        command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--allow-file-access-from-files", "--virtual-time-budget=5000", f"--user-data-dir={profile}"]
        try:
            done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ReportError(f"Chromium did not run: {error}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise ReportError(f"Chromium failed with status {done.returncode}: {last[:200]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
