"""The manual against the code: links, option lists, the table of samplers, and every Python block of some pages."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from latentrt.runtime.cli import COMMANDS
from latentrt.runtime.images.png import SAMPLER_LABELS
from latentrt.runtime.samplers import SAMPLERS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "examples").rglob("*.md")])


def anchors(page: Path) -> set[str]:
    """Names of a page's headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Relative links of a page: the file, and the heading in it, which may be empty."""
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" not in target and not target.startswith("mailto:"):
            path, _, heading = target.partition("#")
            yield (page.parent / path if path else page), heading


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file that is there, and a heading that is in it."""
    for path, heading in links(page):
        assert path.exists(), f"{page.name} links to {path}"
        assert not heading or heading in anchors(path), f"{page.name} links to #{heading} in {path.name}"


def test_every_page_is_in_the_table_of_contents() -> None:
    """The index links to all pages of the manual."""
    linked = {path.resolve() for path, _ in links(DOCS / "index.md")}
    assert set(DOCS.rglob("*.md")) - {DOCS / "index.md"} <= linked


def test_the_table_of_samplers_is_complete() -> None:
    """The table lists every sampler in the code's order, with the web UI's name where it has one."""
    rows = re.findall(
        r"^\| `([a-z0-9-]+)` \| [^|]* \| ([^|]*) \|", (DOCS / "samplers.md").read_text("utf-8"), re.MULTILINE
    )
    assert [name for name, _ in rows] == list(SAMPLERS)
    assert {name: label.strip() for name, label in rows if label.strip() != "-"} == dict(SAMPLER_LABELS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_described(command: str) -> None:
    """A command's section names exactly the options of its parser."""
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## latentrt {command}\n")[2].partition("\n## ")[0]
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(COMMANDS[command].module).add_arguments(parser)
    options = {name for name in parser._option_string_actions if name.startswith("--")}
    assert set(re.findall(r"^\| `(--[a-z0-9-]+)", section, re.MULTILINE)) == options


PAGES = ("python-api.md", "embedding.md", "samplers.md", "loop.md", "memory.md", "tasks.md", "prompts.md")


@pytest.mark.parametrize("name", PAGES)
def test_python_blocks_run(
    name: str, tiny_bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python blocks of a page run in order, with a bundle at build/emoji."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "emoji").symlink_to(tiny_bundles["sd1"])
    monkeypatch.chdir(tmp_path)
    blocks = [
        code for language, code in FENCE.findall((DOCS / name).read_text(encoding="utf-8")) if language == "python"
    ]
    assert blocks
    namespace: dict[str, object] = {}
    for number, code in enumerate(blocks, start=1):
        exec(compile(code, f"{name}, block {number}", "exec"), namespace)
