"""A kind of engine that is registered in a test serves a bundle: no part of the runtime knows the kinds by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.engines import Engine
from latentrt.engines.errors import EngineUnavailableError, InvalidRequestError
from latentrt.engines.kind import CPU, DECOMPOSED, EngineArguments, EngineKind
from latentrt.engines.kinds import KINDS
from latentrt.engines.onnxrt import OnnxRuntimeEngine, OnnxRuntimeOptions
from latentrt.exporter.graphs.targets import PORTABLE, form_for
from latentrt.runtime import Bundle, Pipeline
from latentrt.runtime.abilities import abilities
from latentrt.runtime.cli import main


@dataclass(frozen=True)
class MakeBelieve(EngineKind):
    """Computes with ONNX Runtime, and remembers what it was given."""

    def version(self) -> str:
        return "3.1"

    def require(self, precision: str | None) -> None:
        if precision == "bf16":
            raise EngineUnavailableError("this processor has no instructions for bf16")

    def make(self, arguments: EngineArguments) -> Engine:
        MADE.append(arguments)
        return OnnxRuntimeEngine(
            arguments.path, OnnxRuntimeOptions(arguments.threads), f"{arguments.component} ({self.name})"
        )


MADE: list[EngineArguments] = []
NAME = "make-believe"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of the table."""
    kind = MakeBelieve(
        NAME, "Make-believe", "", CPU, ("fp32", "bf16"), DECOMPOSED, rounds={"bf16": "fp32"}, priority=1, compiles=True
    )
    monkeypatch.setitem(KINDS, NAME, kind)
    MADE.clear()


@pytest.mark.parametrize("name", [NAME, "auto"])
def test_a_pipeline_on_a_registered_kind(tiny_bundles: dict[str, Path], name: str) -> None:
    """It draws what ONNX Runtime draws, whether it is named or the first of those that auto tries."""
    options: dict[str, Any] = {"steps": 2, "seed": 7, "guidance": 4}
    with Pipeline.load(tiny_bundles["sd1"], name, threads=1) as pipe:
        assert pipe.engine_choice.name == NAME
        received = pipe("a red apple", **options)
    with Pipeline.load(tiny_bundles["sd1"], "onnxruntime", threads=1) as pipe:
        expected = pipe("a red apple", **options)
    np.testing.assert_array_equal(received.images, expected.images)
    assert {arguments.component for arguments in MADE} >= {"text_encoder", "unet_step", "vae_decoder"}


def test_arguments_of_a_kind(tiny_bundles: dict[str, Path]) -> None:
    """A kind gets the graph that fits with its hashes and tensors, and the options that the caller gave."""
    bundle = Bundle.open(tiny_bundles["sd1"])
    with Pipeline.load(bundle.path, NAME, threads=2, fixed_size=(32, 64, 3), low_memory=False, engine_cache="write"):
        (step,) = [arguments for arguments in MADE if arguments.component == "unet_step"]
    graph = bundle.graph("unet_step", "opset20-fp32")
    assert step.path == bundle.path / graph.file
    assert (step.inputs, step.outputs) == (graph.inputs, graph.outputs)
    assert (step.precision, step.threads, step.low_memory, step.keep_compiled) == (None, 2, False, True)
    assert step.lengths["batch"] == 3
    assert step.graph_sha256 == bundle.manifest.files[graph.file].sha256
    assert step.weights_sha256.keys() == set(graph.external)
    assert step.store is not None
    assert step.store.root == bundle.engines_directory
    assert (step.exchangeable, step.weights, step.target) == ((), None, "")


def test_what_the_machine_lacks_is_refused(tiny_bundles: dict[str, Path]) -> None:
    """The kind's own sentence reaches the caller; a precision that it never has is refused before."""
    with pytest.raises(EngineUnavailableError, match="no instructions for bf16"):
        Pipeline.load(tiny_bundles["sd1"], NAME, precision="bf16")
    with pytest.raises(InvalidRequestError, match="make-believe does not compute in fp8; choose fp32, bf16, or"):
        Pipeline.load(tiny_bundles["sd1"], NAME, precision="fp8")


def test_commands_know_a_registered_kind(
    tiny_bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Doctor and inspect list it, the exporter has a form for it, and `build-engine` takes its name."""
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["engines"][-2] == {
        "name": NAME,
        "state": "present",
        "version": "3.1",
        "runs": True,
        "builds": True,
        "detail": "CPU",
    }
    assert report["auto"]["otherwise"] == NAME
    assert abilities(Bundle.open(tiny_bundles["sd1"]))["engines"][NAME] == ["fp32", "bf16"]
    assert form_for(NAME, "bf16") == form_for(NAME, "fp32") == PORTABLE
    assert main(["build-engine", str(tmp_path / "none"), "--output", str(tmp_path / "out"), "--engine", NAME]) == 1
    assert "invalid choice" not in capsys.readouterr().err
