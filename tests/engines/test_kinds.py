"""The table of engine kinds, and the facts that each ``kind`` declares."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest

from latentrt.engines import Engine
from latentrt.engines.errors import EngineUnavailableError, InvalidRequestError
from latentrt.engines.kind import (
    CPU,
    CUDA,
    DECOMPOSED,
    MISSING,
    NATIVE,
    PRESENT,
    UNUSABLE,
    EngineArguments,
    EngineKind,
    GraphForm,
)
from latentrt.engines.kinds import KINDS, automatic_kinds, kind_of
from latentrt.engines.trt.kind import CudaKind
from latentrt.runtime.bundle.manifest import PRECISIONS

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Pretend(EngineKind):
    """A kind whose SDK, device and library a test takes away."""

    lacks: str = ""

    def version(self) -> str:
        if self.lacks == "sdk":
            raise EngineUnavailableError("install it")
        return "1.2"

    def unusable(self) -> str:
        return "no device" if self.lacks == "device" else ""

    def runs_on(self) -> str:
        if self.lacks == "library":
            raise EngineUnavailableError("install the library")
        return "a device"

    def make(self, arguments: EngineArguments) -> Engine:
        raise AssertionError("only looked at")


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_facts_of_a_kind_are_sound(kind: EngineKind) -> None:
    """The extra exists, precisions and devices are known ones in their order, and what is rounded is computed in."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert kind.extra == "" or kind.extra in extras
    assert kind.device in (CPU, CUDA)
    assert (kind.device == CUDA) == isinstance(kind, CudaKind)
    assert list(kind.precisions) == sorted(kind.precisions, key=PRECISIONS.index)
    assert {*kind.rounds, *kind.rounds.values()} <= set(kind.precisions)
    assert kind.form in (DECOMPOSED, NATIVE)
    assert kind.title
    assert kind_of(kind.name) is kind
    with pytest.raises(FrozenInstanceError):
        kind.name = "another"  # type: ignore[misc]


def test_places_of_automatic_kinds() -> None:
    """They are unique, and the best comes first; kinds without a place are left out."""
    kinds = automatic_kinds()
    assert [kind.name for kind in kinds] == [
        "tensorrt",
        "tensorrt-rtx",
        "onnxruntime-cuda",
        "onnxruntime",
        "openvino",
    ]
    assert len({kind.priority for kind in kinds}) == len(kinds)


def test_forms_have_one_precision_of_unquantized_products() -> None:
    """Two forms of one operator set agree, so that the exporter knows what a graph is quantised from."""
    forms: set[GraphForm] = {kind.form for kind in KINDS.values()}
    assert len({form.opset for form in forms}) == len(forms)


def test_an_unknown_kind() -> None:
    """The message lists those that are known."""
    with pytest.raises(InvalidRequestError, match=r"unknown engine 'magic'; known engines: onnxruntime, .*, auto$"):
        kind_of("magic")


@pytest.mark.parametrize(
    ("lacks", "state", "version", "detail"),
    [
        ("", PRESENT, "1.2", "a device"),
        ("sdk", MISSING, "", "install it"),
        ("device", UNUSABLE, "1.2", "no device"),
        ("library", MISSING, "1.2", "install the library"),
    ],
)
def test_a_probe_says_what_is_lacking(lacks: str, state: str, version: str, detail: str) -> None:
    """The SDK is looked for first, then the device, then what lies between them."""
    found = Pretend("pretend", "Pretend", "", CPU, ("fp32",), DECOMPOSED, lacks=lacks).probe()
    assert (found.name, found.state, found.version, found.detail) == ("pretend", state, version, detail)


def test_what_is_rounded_opens_the_graph_of_another_precision() -> None:
    """Every other precision opens its own graph, and none opens any."""
    kind = Pretend("pretend", "Pretend", "", CPU, ("fp32", "bf16"), DECOMPOSED, rounds={"bf16": "fp32"})
    assert [kind.graph_precision(each) for each in (None, "fp32", "bf16")] == [None, "fp32", "fp32"]
    kind.require("bf16")
    assert not kind.builds_without_device()


def test_the_table_loads_no_sdk() -> None:
    """Nor does the command line's help load numpy."""
    sdks = {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda"}
    for code, forbidden in (
        ("import latentrt.engines.kinds", sdks),
        ("from latentrt.runtime.cli import main; main(['--help'])", {*sdks, "numpy"}),
    ):
        check = f"import sys; {code}; print(*sorted({{n.split('.')[0] for n in sys.modules}}), file=sys.stderr)"
        done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
        assert forbidden.isdisjoint(done.stderr.split()), code
