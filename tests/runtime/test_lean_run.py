"""A whole run of every family, in a process that refuses to import what only training and export need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

FORBIDDEN = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir", "polygraphy")
CODE = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in forbidden:
            raise RuntimeError(f"a lean run imported {name}")  # no ImportError, which somebody might expect

forbidden = frozenset(json.loads(sys.argv[1]))
sys.meta_path.insert(0, Refuse())
from latentrt.runtime.cli import main
sys.exit(main(sys.argv[2:]))
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, json.dumps(FORBIDDEN), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.heavy
def test_every_family_runs_without_training_frameworks(tiny: Any, tiny_models: Any, tmp_path: Path) -> None:
    """`latentrt generate` draws with the tiny model of every row, and nothing asks for torch or its like."""
    picture = tmp_path / "picture.png"
    Image.effect_noise((32, 32), 64).save(picture)
    for kind in tiny_models.WRITERS:
        output = tmp_path / f"{kind}.png"
        options = ["--output", output, "--steps", "2", "--threads", "1", "--width", "32", "--height", "32"]
        if kind in tiny_models.WITH_SAFETY_CHECKER:
            options += ["--safety", "black"]
        if kind.endswith("inpaint"):
            options += ["--image", picture, "--mask", picture]
        done = run("generate", tiny.bundle(kind), "a red apple", *options)
        assert (done.returncode, done.stderr) == (0, ""), f"{kind}: {done.stderr}"
        assert Image.open(output).size == (32, 32), kind


@pytest.mark.parametrize("name", ["torch", "onnx.checker", "transformers"])
def test_the_guard_bites(name: str) -> None:
    """The process of the other test does fail where such a package is imported."""
    code = CODE.replace("from latentrt.runtime.cli import main", f"import {name}")
    done = subprocess.run([sys.executable, "-c", code, json.dumps(FORBIDDEN)], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"a lean run imported {name.partition('.')[0]}" in done.stderr
