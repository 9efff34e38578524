"""The house rules of imports: downward between layers, relative inside one, no training framework at run time."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
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


def test_the_contracts_of_import_linter_hold() -> None:
    """import-linter, which follows indirect imports as well, finds no broken contract."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Contracts: 2 kept, 0 broken." in done.stdout


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
