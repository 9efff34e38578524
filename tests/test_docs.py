"""The manual against the code: links, lines, option lists, the table of samplers, and every example that runs here."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from latentrt.benchmarks.report.readme import BEGIN, END, REPOSITORY
from latentrt.runtime import RequestOptions
from latentrt.runtime.cli import COMMANDS, main
from latentrt.runtime.images import write_png
from latentrt.runtime.images.png import SAMPLER_LABELS
from latentrt.runtime.pipeline import DrawOptions
from latentrt.runtime.samplers import SAMPLERS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MANUAL = sorted(DOCS.rglob("*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *MANUAL, *(ROOT / "examples").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    """A page's path in the repository."""
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    """A page's fenced blocks of some languages."""
    return [code for language, code in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page: Path) -> Iterator[list[str]]:
    """Arguments of every ``latentrt`` command line in a page's shell blocks, and in its code spans."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(latentrt [a-z-]+ [^-`][^`]*--[^`]*)`", FENCE.sub("", text))
    for line in lines:
        words = shlex.split(line, comments=True)
        if len(words) > 1 and Path(words[0]).name == "latentrt" and words[1] in COMMANDS:
            yield words[1:]


PYTHON_PAGES = [page for page in [*MANUAL, ROOT / "README.md"] if blocks(page, "python")]
SHELL_PAGES = [page for page in [*MANUAL, ROOT / "README.md"] if list(commands(page))]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """The module ``docs/hooks.py``, which makes tables for the site."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("manual_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- links and lines -------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Names of a page's headings as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Relative links of a page: the file, and the heading in it, which may be empty."""
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" not in target and not target.startswith("mailto:"):
            path, _, heading = target.partition("#")
            yield (page.parent / path if path else page), heading


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    """Every relative link names a file that is there, and a heading that is in it."""
    for path, heading in links(page):
        assert path.exists(), f"{page.name} links to {path}"
        assert not heading or heading in anchors(path), f"{page.name} links to #{heading} in {path.name}"


def test_links_of_the_readme_are_absolute_and_lead_somewhere() -> None:
    """Package indexes show the README too, so each link has a host; those to this repository name files of it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not list(links(ROOT / "README.md"))
    targets = LINK.findall(text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)
    raw = REPOSITORY.replace("github.com", "raw.githubusercontent.com").replace("/blob/", "/")
    own = [target.removeprefix(base) for target in targets for base in (REPOSITORY, raw) if target.startswith(base)]
    assert len(own) > 5
    assert not [path for path in own if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", [*MANUAL, ROOT / "README.md"], ids=name_of)
def test_no_line_of_the_manual_is_too_long(page: Path) -> None:
    """No line of a page has more than 120 characters, but for what is generated."""
    lines = re.sub(f"{BEGIN}.*{END}", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).splitlines()
    lines = [re.sub(r"^!?\[[^]]*\]\(\S+\)$", "", line) for line in lines]  # an image or a link cannot be broken
    assert not [f"line {number}" for number, line in enumerate(lines, start=1) if len(line) > 120]


def test_every_page_is_in_the_navigation() -> None:
    """The site's navigation has every page of the manual once, and the repository's own pages."""
    named = re.findall(r"^ +- .*?: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    repository = [f"internals/{name}.md" for name in ("architecture", "contributing", "changelog")]
    assert sorted(named) == sorted([*(page.relative_to(DOCS).as_posix() for page in MANUAL), *repository])


# --- lists that must be complete -------------------------------------------------------------------------------


def test_the_tables_of_samplers_are_complete() -> None:
    """Both tables list every sampler in the code's order, the first with the web UI's name where it has one."""
    text = (DOCS / "reference" / "samplers.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| [^|]* \| ([^|]*) \|", text, re.MULTILINE)
    names, calls = rows[: len(SAMPLERS)], rows[len(SAMPLERS) :]
    assert [name for name, _ in names] == [name for name, _ in calls] == list(SAMPLERS)
    assert {name: label.strip() for name, label in names if label.strip() != "-"} == dict(SAMPLER_LABELS)


def test_every_option_of_a_request_is_described() -> None:
    """The tables of options name exactly the keywords of a request, prompt and latents included."""
    text = (DOCS / "reference" / "request.md").read_text(encoding="utf-8").partition("## As JSON")[0]
    cells = re.findall(r"^\| (`[^|]*`) \|", text, re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert len(named) == len(set(named))
    options = RequestOptions.__annotations__ | DrawOptions.__annotations__
    assert set(named) == {"prompt", *options}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_section_with_its_options(command: str, hooks: ModuleType) -> None:
    """A command's section asks for the table of its parser, and the table has every option with a meaning."""
    page = (DOCS / "reference" / "command-line.md").read_text(encoding="utf-8")
    section = page.partition(f"\n## latentrt {command}\n")[2].partition("\n## ")[0]
    assert f"<!-- generated: command {command} -->" in section
    rows = re.findall(r"^\| `(--[a-z0-9-]+)[^|]*\| (.*) \|$", hooks.command_options(command), re.MULTILINE)
    parser = hooks.command_parser(command)
    shown = [action for action in parser._actions if action.help is not argparse.SUPPRESS]
    assert [name for name, _ in rows] == [action.option_strings[-1] for action in shown if action.option_strings]
    assert all(meaning.strip() for _, meaning in rows)


@pytest.mark.parametrize("page", MANUAL, ids=name_of)
def test_tables_made_from_the_code_can_be_made(page: Path, hooks: ModuleType) -> None:
    """Every table that a page asks for has rows, all as wide as its head."""
    for kind, name in hooks.GENERATED.findall(page.read_text(encoding="utf-8")):
        lines = hooks.KINDS[kind](name).splitlines()
        assert len(lines) > 2
        assert kind == "reports" or len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_the_table_of_request_fields_is_that_of_the_schema(hooks: ModuleType) -> None:
    """The reference has every field of the schema."""
    schema = json.loads((DOCS / "request.schema.json").read_text(encoding="utf-8"))
    rows = re.findall(r"^\| `(\w+)` \|", hooks.request_options("options"), re.MULTILINE)
    assert rows == [name for name in schema["properties"] if name != "$schema"]


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        ("int", "integer"),
        ("Mapping[str, Component]", "object of Component"),
        ("tuple[str, ...]", "array of string"),
        ("Mapping[str, bool | int] | None", "object of boolean or integer or null"),
    ],
)
def test_types_are_shown_in_the_words_of_json(annotation: str, expected: str, hooks: ModuleType) -> None:
    """A field's type is what JSON calls it."""
    assert hooks.json_type(annotation) == expected


def test_a_link_out_of_the_manual_becomes_what_the_site_has(hooks: ModuleType) -> None:
    """A page of the repository and raw figures are linked; of a source file the site has the name alone."""

    class File:
        src_uri = "how-to/precision.md"

    class Page:
        file = File

    text = "[a](../../CONTRIBUTING.md#tests) [b](../../benchmarks/results/x.json) [c](../../engines/base.py) [d](x.md)"
    expected = "[a](../internals/contributing.md#tests) [b](../results/x.json) c (`engines/base.py`) [d](x.md)"
    assert hooks.on_page_markdown(text, page=Page) == expected
    code = f"```text\n{text}\n```"
    assert hooks.on_page_markdown(code, page=Page) == code


def test_what_a_site_would_load_from_elsewhere_is_found(
    hooks: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Scripts, styles, fonts and images of other hosts are named; a link that a reader may follow is none of them."""
    (tmp_path / "page.html").write_text(
        '<a href="https://a.example/">x</a><script src="https://b.example/x.js"></script>'
        '<link rel="stylesheet" href="//c.example/x.css"><img src="images/x.png">'
    )
    (tmp_path / "style.css").write_text("@font-face { src: url(https://d.example/f.woff2) } a { color: url(#x) }")
    hooks.on_post_build(config=argparse.Namespace(site_dir=str(tmp_path)))
    named = re.findall(r"//([a-d])\.example", "\n".join(record.getMessage() for record in caplog.records))
    assert named == ["b", "c", "d"]


# --- examples --------------------------------------------------------------------------------------------------


@pytest.fixture
def place(emoji_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory as the manual has it: the emoji bundle at build/emoji, its source, and a mask."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "emoji").symlink_to(emoji_bundle)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[16:48, 16:48] = 255
    write_png(tmp_path / "mask.png", mask)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name_of)
def test_python_blocks_run(page: Path, place: Path) -> None:
    """The Python blocks of a page run in order, with the emoji model's bundle at build/emoji."""
    namespace: dict[str, object] = {}
    for number, code in enumerate(blocks(page, "python"), start=1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", SHELL_PAGES, ids=name_of)
def test_command_lines_are_right(page: Path, hooks: ModuleType) -> None:
    """The real parsers take every ``latentrt`` command line that a page shows."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> None:  # type: ignore[override]
            raise AssertionError(f"latentrt {shlex.join(words)}: {message}")

    for words in commands(page):
        parser = Parser(prog="latentrt", allow_abbrev=False)
        hooks.add_arguments(words[0], parser)
        parser.parse_args(words[1:])


RUN = {"generate", "inspect", "doctor"}
"""Commands that take a second or two with the emoji bundle; the others build or measure."""


@pytest.mark.parametrize("page", [page for page in SHELL_PAGES if page.parent != ROOT], ids=name_of)
def test_cheap_command_lines_run(page: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Command lines that draw with or look at the emoji bundle do so, in the order of their page."""
    for words in commands(page):
        on_emoji = words[1:2] == ["build/emoji"] or words[0] == "doctor"
        if words[0] in RUN and on_emoji and "openvino" not in words:
            assert main(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", MANUAL, ids=name_of)
def test_modules_that_a_page_runs_exist(page: Path) -> None:
    """Every ``python -m latentrt...`` of a page names a module, and a file where it runs one of the repository."""
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m (latentrt[\w.]+)", text):
        if module != "latentrt.runtime":
            assert importlib.util.find_spec(module) is not None, module
    for script in re.findall(r"\bpython (examples/\S+\.py)", text):
        assert (ROOT / script).is_file(), script
