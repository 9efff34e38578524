"""The tests mirror the rooms, so that whoever reads a module finds its tests without searching."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("benchmarks", "exporter", "runtime", "engines")
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def first_line(path: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def modules() -> list[str]:
    """Modules with code of their own: no ``__init__``, and no old name that only re-exports."""
    found = []
    for layer in LAYERS:
        for path in sorted((ROOT / layer).rglob("*.py")):
            if path.name not in ("__init__.py", "__main__.py") and not first_line(path).startswith("Moved to"):
                found.append(path.relative_to(ROOT).as_posix())
    return found


FIRST_LINES: dict[Path, list[str]] = {path.relative_to(ROOT / "tests").parent: [] for path in TESTS}
for _path in TESTS:
    FIRST_LINES[_path.relative_to(ROOT / "tests").parent].append(first_line(_path))


@pytest.mark.parametrize("module", modules())
def test_a_module_has_its_tests(module: str) -> None:
    """In a file of its name at its place below ``tests/``, or in one of its room whose first line names the module.

    Its name stands there in double backticks; a test that lies elsewhere gives the path, such as ``vae/tiling.py``.
    """
    path = Path(module)
    own = ROOT / "tests" / path.parent / f"test_{path.name}"
    places = [path.parent, *path.parent.parents][:-1]
    named = any(f"``{path.stem}``" in line for place in places for line in FIRST_LINES.get(place, []))
    by_path = any(f"``{'/'.join(path.parts[1:])}``" in line for lines in FIRST_LINES.values() for line in lines)
    assert own.is_file() or named or by_path


@pytest.mark.parametrize("path", [path.relative_to(ROOT / "tests").as_posix() for path in TESTS])
def test_a_folder_of_tests_is_a_room(path: str) -> None:
    """No tests lie in a folder that mirrors nothing."""
    folder = Path(path).parent
    assert folder == Path() or (ROOT / folder).is_dir()
