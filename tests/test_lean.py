"""The built wheel in an environment of its own, with nothing but its plain dependencies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
ABSENT = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "polygraphy")

pytestmark = pytest.mark.heavy


def call(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    # What a developer exports for the working tree must not reach the lean environment.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, env=environment, **options
    )


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` directory of an environment with the wheel and its dependencies from the package index."""
    root = tmp_path_factory.mktemp("lean")
    for name in ("engines", "runtime", "exporter", "benchmarks"):
        shutil.copytree(ROOT / name, root / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / "tree")
    built = call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", root, root / "tree")
    assert built.returncode == 0, built.stdout + built.stderr
    venv.create(root / "venv", with_pip=True)
    scripts = root / "venv" / ("Scripts" if os.name == "nt" else "bin")
    (wheel,) = root.glob("*.whl")
    installed = call(scripts / "python", "-m", "pip", "--disable-pip-version-check", "install", wheel)
    assert installed.returncode == 0, installed.stderr
    return scripts


def test_only_the_plain_dependencies_are_there(lean: Path) -> None:
    """No training framework came with them."""
    code = f"from importlib.util import find_spec; print(*[n for n in {ABSENT!r} if find_spec(n)])"
    assert call(lean / "python", "-c", code).stdout.strip() == ""


def test_the_command_draws(lean: Path, tiny_bundles: dict[str, Path], tmp_path: Path) -> None:
    """`latentrt generate` writes the picture, with nothing on stderr."""
    output = tmp_path / "o.png"
    done = call(lean / "latentrt", "generate", tiny_bundles["sd1"], "a red apple", "--output", output, "--steps", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert Image.open(output).size == (32, 32)


def test_the_other_commands_answer(lean: Path, tiny_bundles: dict[str, Path], tmp_path: Path) -> None:
    """inspect and doctor work; what needs the exporter says which extra brings it."""
    assert call(lean / "latentrt", "inspect", tiny_bundles["sd1"]).returncode == 0
    report = json.loads(call(lean / "latentrt", "doctor", "--json").stdout)
    engines = {engine["name"]: engine for engine in report["engines"]}
    assert engines["onnxruntime"]["runs"]
    assert 'pip install "latentrt[export]"' in engines["export"]["detail"]
    for command in (("build-engine", tmp_path, "--output", tmp_path / "b"), ("verify", tmp_path, "--source", tmp_path)):
        done = call(lean / "latentrt", *command)
        assert (done.returncode, done.stdout) == (1, "")
        assert 'install it with: pip install "latentrt[export]"' in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_whole_run_loads_what_it_needs(lean: Path, tiny_bundles: dict[str, Path], tmp_path: Path) -> None:
    """Importing the runtime loads no SDK; a drawn picture has loaded ONNX Runtime, and nothing of training."""
    code = (
        "import json, sys, time\n"
        "start = time.perf_counter()\n"
        "import latentrt.runtime\n"
        "package = time.perf_counter() - start\n"
        "from latentrt.runtime import Pipeline\n"
        "pipeline = time.perf_counter() - start\n"
        "imported = list(sys.modules)\n"
        "from latentrt.runtime.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "print(json.dumps([status, package, pipeline, imported, list(sys.modules)]), file=sys.stderr)\n"
    )
    arguments = ("generate", tiny_bundles["sd2"], "a red apple", "--output", tmp_path / "o.png", "--steps", "2")
    done = call(lean / "python", "-c", code, *arguments)
    status, package, pipeline, imported, loaded = json.loads(done.stderr)
    print(f"import latentrt.runtime: {package:.3f} s; with Pipeline: {pipeline:.3f} s")
    assert status == 0
    assert {"onnxruntime", "safetensors", "tqdm", "tensorrt"}.isdisjoint(imported)
    assert "onnxruntime" in loaded
    assert set(ABSENT).isdisjoint(name.split(".")[0] for name in loaded)
