"""MkDocs hooks of the manual: tables made from the code, files of the repository, and no load from other hosts.

A page says ``<!-- generated: KIND NAME -->`` on a line of its own, and the site has a table there:

- ``command build-engine``: the options of a command, from its parser
- ``request options``: the fields of a request, from ``docs/request.schema.json``
- ``dataclass module:Class``: the fields of a dataclass, from its docstring and its types
- ``reports all``: the tables of all reports in ``benchmarks/results``
- ``table NAME``: ``docs/data/NAME.json``, which a test writes
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from latentrt.benchmarks.report.readme import tables
from latentrt.runtime.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("engines", "runtime", "exporter", "benchmarks")
PAGES = {
    "ARCHITECTURE.md": "internals/architecture.md",
    "CONTRIBUTING.md": "internals/contributing.md",
    "CHANGELOG.md": "internals/changelog.md",
}
"""Pages of the repository that the site has too, by their place there."""

RESULTS = PurePosixPath("benchmarks/results")
"""Raw figures of benchmarks, which the site has under ``results/``."""

GENERATED = re.compile(r"^<!-- generated: (\w+) (\S+) -->$", re.MULTILINE)
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_LOADED = re.compile(r"""(?:\bsrc|<link[^>]*\bhref|\burl\(|@import)\s*[=(]?\s*["']?((?:https?:)?//[^"')\s>]+)""")

_log = logging.getLogger("mkdocs.hooks.manual")


# --- tables ----------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *(line(row) for row in rows)])


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of a command of ``latentrt``."""
    importlib.import_module(COMMANDS[name].module).add_arguments(parser)


def command_parser(name: str) -> argparse.ArgumentParser:
    """A parser with the arguments of a command, and no others."""
    parser = argparse.ArgumentParser(prog=f"latentrt {name}", add_help=False, allow_abbrev=False)
    add_arguments(name, parser)
    return parser


def command_options(name: str) -> str:
    """The table of a command's arguments, in the order of its ``--help``."""
    parser = command_parser(name)
    formatter = argparse.HelpFormatter(parser.prog)
    rows = []
    for action in parser._actions:
        if action.help is argparse.SUPPRESS:
            continue
        if action.option_strings:
            shown = action.option_strings[-1]
            if action.nargs != 0:
                metavar = formatter._get_default_metavar_for_optional(action)
                shown += f" {metavar if action.choices else formatter._format_args(action, metavar)}"
        else:
            shown = formatter._format_args(action, formatter._get_default_metavar_for_positional(action))
        text = formatter._expand_help(action) if action.help else ""
        notes = [text]
        if action.choices:
            notes.append(f"One of {', '.join(f'`{choice}`' for choice in action.choices)}.")
        if action.required and action.option_strings:
            notes.append("Required.")
        if isinstance(action, argparse._AppendAction) and "repeated" not in text:
            notes.append("May be repeated.")
        rows.append((f"`{shown}`", _sentences(notes)))
    return table(("argument", "meaning"), rows)


def _sentences(parts: Iterable[str]) -> str:
    """Phrases of help texts as sentences."""
    written = [f"{part[0].upper()}{part[1:]}" for part in parts if part]
    return " ".join(part if part.endswith((".", "!", "?")) else f"{part}." for part in written)


def request_options(_: str) -> str:
    """The table of the fields that a request file may have."""
    schema = json.loads((ROOT / "docs" / "request.schema.json").read_text(encoding="utf-8"))
    rows = [
        (f"`{name}`", _schema_type(value), value.get("description", ""))
        for name, value in schema["properties"].items()
        if not name.startswith("$")
    ]
    return table(("field", "JSON", "meaning"), rows)


def _schema_type(value: Mapping[str, Any]) -> str:
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_schema_type(each) for each in value["anyOf"]))
    if "enum" in value:
        return ", ".join(f"`{json.dumps(each)}`" for each in value["enum"])
    if "const" in value:
        return f"`{json.dumps(value['const'])}`"
    if value.get("type") == "array":
        if "prefixItems" in value:
            return f"array of {len(value['prefixItems'])} {_schema_type(value['prefixItems'][0])}s"
        items = value.get("items", {})
        return f"array, each {_schema_type(items)}"
    if value.get("type") == "object" and value.get("properties"):
        return f"object with {', '.join(f'`{name}`' for name in value['properties'])}"
    return str(value.get("type", "any"))


def dataclass_fields(path: str) -> str:
    """The table of a dataclass's fields: key in JSON, type, and what its docstring says of it."""
    module, _, name = path.partition(":")
    kind = getattr(importlib.import_module(module), name)
    said = _attributes(inspect.getdoc(kind) or "")
    rows = [
        (f"`{each.metadata.get('key', each.name)}`", json_type(str(each.type)), said.get(each.name, ""))
        for each in dataclasses.fields(kind)
    ]
    if not any(meaning for *_, meaning in rows):
        return table(("key", "type"), [row[:2] for row in rows])
    return table(("key", "type", "meaning"), rows)


_JSON = {"bool": "boolean", "float": "number", "int": "integer", "None": "null", "str": "string", "Any": "any value"}


def json_type(annotation: str) -> str:
    """An annotation of Python in the words of JSON; a dataclass keeps its name."""
    either = _split(annotation, "|")
    if len(either) > 1:
        return " or ".join(json_type(each) for each in either)
    match = re.fullmatch(r"(\w+)\[(.*)\]", annotation)
    if match is None:
        return _JSON.get(annotation, annotation)
    inner = [each for each in _split(match[2], ",") if each != "..."]
    if match[1] in ("Mapping", "dict"):
        return f"object of {json_type(inner[-1])}"
    return f"array of {json_type(inner[0])}"


def _split(text: str, separator: str) -> list[str]:
    """Split outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _attributes(docstring: str) -> dict[str, str]:
    """The section ``Attributes`` of a Google docstring."""
    section = re.search(r"^Attributes:\n((?:[ ]{4}.*\n?|\n)*)", docstring, re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+)(?: \([^)]*\))?: (.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE)
    return {name: _without_roles(" ".join(text.split())) for name, text in entries}


def _without_roles(text: str) -> str:
    return re.sub(r":\w+:`~?\.*([^`<]*?)(?:\s*<[^`>]*>)?`", r"`\1`", text)


def data_table(name: str) -> str:
    """A table that a test keeps as JSON."""
    data = json.loads((ROOT / "docs" / "data" / f"{name}.json").read_text(encoding="utf-8"))
    rows = [[f'<span class="long">{cell}</span>' if len(cell) > 40 else cell for cell in row] for row in data["rows"]]
    return table(data["columns"], rows)


def bench_tables(name: str) -> str:
    """The tables of all reports in ``benchmarks/results``, for a page in ``docs/`` itself."""
    text = tables(ROOT)
    return re.sub(r"\]\((?!\w+:)", "](../", text)


KINDS: dict[str, Callable[[str], str]] = {
    "command": command_options,
    "dataclass": dataclass_fields,
    "reports": bench_tables,
    "request": request_options,
    "table": data_table,
}


# --- what MkDocs calls -----------------------------------------------------------------------------------------


def on_startup(**_: Any) -> None:
    """Link the layers as one package, which is how mkdocstrings finds ``latentrt.*`` without importing it."""
    package = ROOT / "build" / "docs" / "latentrt"
    package.mkdir(parents=True, exist_ok=True)
    for layer in LAYERS:
        link = package / layer
        if not link.is_symlink():
            link.symlink_to(ROOT / layer, target_is_directory=True)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's own pages, and the raw figures that the benchmarks page links to."""
    for source, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    for path in sorted((ROOT / RESULTS).glob("*.json")):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Write the generated tables, and turn links into the repository to what the site has of it."""
    here = page.file.src_uri
    origin = next((PurePosixPath(source) for source, place in PAGES.items() if place == here), None)
    folder = (PurePosixPath("docs") / here).parent if origin is None else origin.parent

    def generated(match: re.Match[str]) -> str:
        if match[1] not in KINDS:
            raise PluginError(f"{here} asks for the generated table {match[1]!r}, expected one of {', '.join(KINDS)}")
        return KINDS[match[1]](match[2])

    def linked(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        place = _site_path(_normal(folder / target))
        if place is None:  # a file of the repository that the site does not have
            path = f"`{_normal(folder / target)}`"
            return path if text.strip("`") == path.strip("`") else f"{text} ({path})"
        return f"[{text}]({_relative(place, PurePosixPath(here).parent)}{anchor})"

    return _outside_code(_LINK, linked, GENERATED.sub(generated, markdown))


def on_post_build(config: MkDocsConfig, **_: Any) -> None:
    """Refuse a site that would load something from another host."""
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css"):
            for url in _LOADED.findall(path.read_text(encoding="utf-8")):
                _log.warning("%s loads %s from another host", path.relative_to(config.site_dir), url)


def _outside_code(pattern: re.Pattern[str], change: Callable[[re.Match[str]], str], markdown: str) -> str:
    """Replace matches, except in fenced blocks."""
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else pattern.sub(change, part) for part in parts)


def _normal(path: PurePosixPath) -> PurePosixPath:
    """A path of the repository without ``..``."""
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)
    return PurePosixPath(*parts)


def _site_path(path: PurePosixPath) -> PurePosixPath | None:
    """Where the site has a file of the repository; ``None`` if it has not."""
    if str(path) in PAGES:
        return PurePosixPath(PAGES[str(path)])
    if path.is_relative_to("docs"):
        return path.relative_to("docs")
    if path.is_relative_to(RESULTS) and path.suffix == ".json":
        return PurePosixPath("results") / path.name
    return None


def _relative(place: PurePosixPath, folder: PurePosixPath) -> str:
    common = 0
    while common < min(len(place.parts) - 1, len(folder.parts)) and place.parts[common] == folder.parts[common]:
        common += 1
    return "/".join([".."] * (len(folder.parts) - common) + list(place.parts[common:]))
