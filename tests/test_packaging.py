"""What is built is what is in the tree: package list, wheel, metadata."""

from __future__ import annotations

import configparser
import email
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("engines", "runtime", "exporter", "benchmarks")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_modules_is_a_package() -> None:
    """setup.py finds packages by a scan, and a scan passes over a folder without ``__init__.py``."""
    folders = {path.parent for layer in LAYERS for path in (ROOT / layer).rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_every_layer_is_mapped_and_typed() -> None:
    """The mapping and the typing marker cover the four layers; there is no latentrt folder."""
    mapping = {f"latentrt.{layer}": layer for layer in LAYERS}
    assert PROJECT["tool"]["setuptools"]["package-dir"] == mapping
    data = PROJECT["tool"]["setuptools"]["package-data"]
    assert {name: data[name] for name in mapping} == {name: ["py.typed"] for name in mapping}
    assert all((ROOT / layer / "py.typed").is_file() for layer in LAYERS)
    assert not (ROOT / "latentrt").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the tree so that no older build leaks into it."""
    copy = tmp_path_factory.mktemp("tree")
    for name in (*LAYERS, "tests", "examples/emoji/training"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_layers_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    """Every module and typing marker, what the data patterns name, its metadata, no test and no example."""
    files = {path for layer in LAYERS for path in (ROOT / layer).rglob("*") if path.suffix in (".py", ".typed")}
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        named = [set(folder.glob(pattern)) for pattern in patterns]
        assert all(named), f"{package}: a pattern of its package-data names no file"
        files.update(*named)
    expected = {f"latentrt/{path.relative_to(ROOT).as_posix()}" for path in files}
    actual = {
        name for name in wheel.namelist() if not name.startswith(f"latentrt-{PROJECT['project']['version']}.dist-")
    }
    assert actual == expected
    assert f"latentrt-{PROJECT['project']['version']}.dist-info/licenses/LICENSE" in wheel.namelist()


def test_the_wheel_holds_the_files_of_the_tree(wheel: zipfile.ZipFile) -> None:
    """Each module is byte for byte the tree's."""
    for name in wheel.namelist():
        if name.startswith("latentrt/"):
            assert wheel.read(name) == (ROOT / name.removeprefix("latentrt/")).read_bytes(), name


def test_the_wheel_has_one_command(wheel: zipfile.ZipFile) -> None:
    """The console script is latentrt, and what it names exists."""
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    parser = configparser.ConfigParser()
    parser.read_string(wheel.read(name).decode())
    assert {section: dict(parser[section]) for section in parser.sections()} == {
        "console_scripts": {"latentrt": "latentrt.runtime.cli:main"}
    }


def test_the_bare_install_is_lean(wheel: zipfile.ZipFile) -> None:
    """Without an extra, six packages are required, none of them a training framework."""
    (name,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    metadata = email.message_from_bytes(wheel.read(name))
    required = {
        re.split(r"[<>=!~\[ ;]", line)[0] for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line
    }
    assert required == {"numpy", "tokenizers", "pillow", "onnxruntime", "safetensors", "tqdm"}
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = set(metadata.get_all("Provides-Extra", []))
    assert extras >= {"export", "tensorrt", "tensorrt-rtx", "cuda", "openvino", "bench", "dev"}
