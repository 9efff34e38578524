"""The house rules of imports: downward between layers, relative inside one, no training framework at run time."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("benchmarks", "exporter", "runtime", "engines")
"""From the top downward."""
TRAINING = {"torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "polygraphy"}


def modules(*layers: str) -> list[Path]:
    return [path for layer in layers for path in sorted((ROOT / layer).rglob("*.py"))]


def absolute_imports(source: str) -> Iterator[str]:
    """Dotted names of all absolute imports, those inside functions and conditions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def relative_paths(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def test_imports_are_found_wherever_they_are() -> None:
    """The scan sees top-level, nested, aliased and from-imports, and passes relative ones over."""
    source = (
        "import a.b as c\nfrom d import e\nfrom . import f\nfrom .g import h\n"
        "def i():\n    import j\n    if 0:\n        from k.l import m"
    )
    assert set(absolute_imports(source)) == {"a.b", "d.e", "j", "k.l.m"}


@pytest.mark.parametrize("module", relative_paths(modules(*LAYERS)))
def test_a_layer_is_imported_by_its_full_name(module: str) -> None:
    """No module says `import runtime`, which works in a checkout and nowhere else."""
    assert not {name for name in absolute_imports((ROOT / module).read_text()) if name.split(".")[0] in LAYERS}


@pytest.mark.parametrize("module", relative_paths(modules(*LAYERS)))
def test_imports_point_downward(module: str) -> None:
    """A module names lower layers by their full name, and its own only by relative imports."""
    names = [name.split(".") for name in absolute_imports((ROOT / module).read_text())]
    imported = {parts[1] for parts in names if parts[0] == "latentrt"}
    below = LAYERS[LAYERS.index(module.split("/")[0]) + 1 :]
    assert imported <= set(below)


@pytest.mark.parametrize("module", relative_paths(modules("runtime", "engines")))
def test_the_runtime_names_no_training_framework(module: str) -> None:
    """Not even inside a function."""
    assert TRAINING.isdisjoint(name.split(".")[0] for name in absolute_imports((ROOT / module).read_text()))


def test_every_layer_is_known() -> None:
    """A new top-level package cannot escape the rules: the contracts and this list name all that there are."""
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(LAYERS)


def lint(root: Path) -> str:
    """What import-linter says of a tree, with its exit status as the last word."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    environment = os.environ | {"PYTHONUTF8": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return f"{done.stdout}{done.stderr}\n{done.returncode}"


def test_the_contracts_of_import_linter_hold() -> None:
    """import-linter, which follows indirect imports as well, finds no broken contract."""
    assert lint(ROOT).endswith("Contracts: 6 kept, 0 broken.\n\n0"), lint(ROOT)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the layers, importable as ``latentrt`` from its root."""
    for layer in LAYERS:
        shutil.copytree(ROOT / layer, tmp_path / "latentrt" / layer, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


TYPING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
PLANTED = {
    "engines": ("engines/errors.py", "from .trt import build", "latentrt.engines.errors -> latentrt.engines.trt.build"),
    "runtime": (
        "runtime/samplers/plan.py",
        "from ..components import opening",
        "latentrt.runtime.samplers.plan -> latentrt.runtime.components.opening",
    ),
    "exporter": (
        "exporter/source/weights.py",
        "from ..builder import build",
        "latentrt.exporter.source.weights -> latentrt.exporter.builder.build",
    ),
    "benchmarks": (
        "benchmarks/report/plots.py",
        "from .. import cli",
        "latentrt.benchmarks.report.plots -> latentrt.benchmarks.cli",
    ),
    "between layers": (
        "engines/base.py",
        "def plant():\n    from latentrt.runtime import files",
        "latentrt.engines.base -> latentrt.runtime.files",
    ),
    "typing only": (
        "runtime/files.py",
        f"{TYPING}from .pipeline import Pipeline",
        "latentrt.runtime.files -> latentrt.runtime.pipeline",
    ),
}


@pytest.mark.parametrize(("module", "line", "arrow"), PLANTED.values(), ids=PLANTED)
def test_an_import_that_points_upward_is_found(tree: Path, module: str, line: str, arrow: str) -> None:
    """In every layer, between two, inside a function, and where it is for type checkers alone."""
    path = tree / "latentrt" / module
    path.write_text(f"{path.read_text()}\n{line}\n")
    said = lint(tree)
    assert said.endswith("\n1")
    assert "Contracts: 6 kept" not in said
    assert arrow in " ".join(said.split())


@pytest.mark.parametrize("layer", LAYERS)
def test_a_room_that_no_contract_names_is_found(tree: Path, layer: str) -> None:
    """Whoever adds a room decides where it stands."""
    room = tree / "latentrt" / layer / "attic"
    room.mkdir()
    (room / "__init__.py").write_text("")
    said = lint(tree)
    assert said.endswith("\n1")
    assert "attic" in said


def imported(layer: str) -> dict[str, set[str]]:
    """By module of a layer, modules of the layer that it imports: for typing and inside functions, too."""
    names = {}
    for path in modules(layer):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(("latentrt", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, node.module] if node.module else above)
                candidates = {f"{base}.{alias.name}" for alias in node.names}
                found[name] |= {each if each in names else base for each in candidates}
        found[name] = {each for each in found[name] if each in names and each != name}
    return found


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """Some modules that import each other in a circle; nothing if there is none."""
    left = {name: set(targets) for name, targets in arrows.items()}
    while ends := [name for name, targets in left.items() if not targets]:  # these lead nowhere
        for name in ends:
            del left[name]
        for targets in left.values():
            targets.difference_update(ends)
    return sorted(left)


def test_a_circle_is_found() -> None:
    """Two modules that import each other are, and one that only imports them is not the reason."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"a", "c"}, "c": set()}) == ["a", "b"]


@pytest.mark.parametrize("layer", LAYERS)
def test_no_module_imports_in_a_circle(layer: str) -> None:
    """Modules of a layer can be read one after the other, each after all that it imports."""
    arrows = imported(layer)
    assert sum(map(len, arrows.values())) > 10
    assert circle(arrows) == []


TABLES = {"runtime/request/options.py"}
"""Modules that are one table of data: the options of a request, each with its help."""


@pytest.mark.parametrize("module", sorted({*relative_paths(modules(*LAYERS))} - TABLES))
def test_no_module_is_longer_than_a_reader_can_hold(module: str) -> None:
    """At most 450 lines; who needs more has two things in one file."""
    assert len((ROOT / module).read_text().splitlines()) <= 450


def test_a_whole_run_loads_no_training_framework(tiny_bundles: dict[str, Path], tmp_path: Path) -> None:
    """From the command line to the PNG, with all of them installed beside it."""
    code = (
        "import sys; from latentrt.runtime.cli import main; status = main();"
        "print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr); sys.exit(status)"
    )
    output = tmp_path / "o.png"
    arguments = ["generate", str(tiny_bundles["sd1"]), "a red apple", "--output", str(output), "--steps", "1"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.split())
    assert loaded >= {"onnxruntime", "PIL", "tokenizers", "numpy"}
    assert loaded.isdisjoint({*TRAINING, "safetensors"}), "which reads LoRAs, and this run has none"
    assert output.exists()
