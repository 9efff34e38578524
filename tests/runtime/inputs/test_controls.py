"""Options of ControlNets: read and checked before anything runs, by name, and given on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime import Bundle, Control
from latentrt.runtime.bundle.manifest import Component
from latentrt.runtime.cli import main
from latentrt.runtime.inputs.controls import take_controls

PICTURE = np.random.default_rng(3).integers(0, 256, (24, 48, 3), dtype=np.uint8)
OPTIONS: dict[str, Any] = {"width": 48, "height": 24, "steps": 3, "seed": 7, "sampler": "euler", "guidance": 4.0}
EDGES = {"name": "edges", "image": PICTURE}


class Manifest:
    """Of a manifest what options of ControlNets need."""

    def __init__(self, *names: str) -> None:
        parts = [part for name in names for part in (f"controlnet_{name}", f"controlnet_{name}_image")]
        self.components = {part: Component(part, {}) for part in ("unet", "unet_control", *parts)}


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ("edges", "control is a str"),
        ([3], r"control\[0\] is a int"),
        ({"name": "edges"}, "has no image"),
        ({**EDGES, "weight": 1}, "unknown entry 'weight'"),
        ({**EDGES, "name": "pose"}, "names 'pose', but the bundle's ControlNets are edges, depth"),
        ({"image": PICTURE}, "names no ControlNet"),
        ({**EDGES, "scale": float("nan")}, "scale is nan"),
        ({**EDGES, "scale": -1}, "scale is -1"),
        ({**EDGES, "scale": "1"}, "scale is '1', expected a number"),
        ({**EDGES, "start": 0.5, "end": 0.5}, "start is 0.5"),
        ([EDGES, EDGES], "names 'edges' twice"),
        ([EDGES] * 9, "has 9 entries"),
        ({**EDGES, "image": b"no picture"}, r"cannot read control\[0\].image"),
        ({**EDGES, "image": "nowhere.png"}, "nowhere.png"),
        ({**EDGES, "image": np.full((4, 4, 3), np.nan)}, r"control\[0\].image"),
    ],
)
def test_wrong_controls_are_refused(control: Any, message: str) -> None:
    """What cannot be done is refused in one sentence that names the entry."""
    with pytest.raises(InvalidRequestError, match=message):
        take_controls({"control": control}, Manifest("edges", "depth"))  # type: ignore[arg-type]


def test_a_bundle_without_controlnets_says_how_to_get_one(tiny_bundles: dict[str, Path]) -> None:
    """The message names the option of build-engine; guess mode alone is refused too."""
    manifest = Bundle.open(tiny_bundles["sd1"]).manifest
    with pytest.raises(InvalidRequestError, match="--controlnet NAME=DIR"):
        take_controls({"control": EDGES}, manifest)
    assert take_controls({"control": None, "steps": 3}, manifest) == ({"steps": 3}, ())
    assert take_controls({"control": []}, manifest) == ({}, ())


def test_the_only_controlnet_needs_no_name() -> None:
    """Names, defaults and a picture's hash are filled in."""
    rest, pictures = take_controls({"control": Control(PICTURE)}, Manifest("edges"))  # type: ignore[arg-type]
    (control,) = rest["control"]
    assert (control.name, control.scale, control.start, control.end) == ("edges", 1.0, 0.0, 1.0)
    assert len(control.image.sha256) == 64
    np.testing.assert_array_equal(pictures[0], PICTURE)


@pytest.mark.heavy
def test_the_command_line_steers(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture with numbers behind it is taken, and told in the result and in the PNG's text."""
    Image.fromarray(PICTURE).save(tmp_path / "edges.png")
    out = tmp_path / "out.png"
    size = ["--width", "48", "--height", "24", "--steps", "2", "--seed", "7", "--engine", "onnxruntime"]
    steer = ["--control", f"edges={tmp_path / 'edges.png'}:0.8:0.1:0.9", "--guess-mode", "--json"]
    steer += ["--ip-adapter-image", str(tmp_path / "edges.png"), "--ip-adapter-scale", "0.5"]
    assert main(["generate", str(tiny.controlled("sd1")), "a red apple", "--output", str(out), *size, *steer]) == 0
    request = json.loads(capsys.readouterr().out)["request"]
    (control,) = request["control"]
    assert (control["name"], control["scale"], control["start"], control["end"]) == ("edges", 0.8, 0.1, 0.9)
    assert control["image"]["path"] == str(tmp_path / "edges.png")
    assert (request["ip_adapter_scale"], request["ip_adapter_image"]["path"]) == (0.5, str(tmp_path / "edges.png"))
    text = Image.open(out).info["parameters"]
    assert "ControlNet 0" in text
    assert "Guess mode: True" in text
    assert "IP-Adapter" in text
    assert main(["generate", str(tiny.controlled("sd1")), "a", "--output", str(out), "--control", "edges"]) == 2
