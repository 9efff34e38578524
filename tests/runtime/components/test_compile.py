"""Compiling a bundle for OpenVINO ahead of its first use."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentrt.engines.errors import EngineUnavailableError, InvalidRequestError
from latentrt.engines.openvino import engine as openvino
from latentrt.engines.openvino.engine import OpenVinoEngine
from latentrt.runtime import Bundle, Pipeline
from latentrt.runtime.components.compile import compile_openvino
from latentrt.runtime.components.opening import components_for


def test_models_are_compiled_once_and_found_by_a_pipeline(tiny_bundle: Path) -> None:
    """Each component is announced and stored; a second time all are there, and a pipeline opens them."""
    pytest.importorskip("openvino")
    bundle, announced = Bundle.open(tiny_bundle), list[str]()
    compiled = list(compile_openvino(bundle, on_component=announced.append))
    assert announced == list(components_for(bundle)) == [each.record.component for each in compiled]
    assert not any(each.reused for each in compiled)
    again = list(compile_openvino(bundle))
    assert all(each.reused for each in again)
    assert [each.record for each in again] == [each.record for each in compiled]
    with Pipeline.load(tiny_bundle, "openvino", threads=1) as pipe:
        engines = [engine for engine in pipe.engines.values() if isinstance(engine, OpenVinoEngine)]
        assert engines
        assert all(engine.opened.reused for engine in engines)


def test_what_cannot_run_is_refused_before_anything_is_compiled(
    tiny_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A precision that OpenVINO never has, and OpenVINO itself missing."""
    bundle = Bundle.open(tiny_bundles["sd1"])
    with pytest.raises(InvalidRequestError, match="openvino does not compute in fp8"):
        next(compile_openvino(bundle, "fp8"))

    def missing() -> None:
        raise EngineUnavailableError("OpenVINO is not installed; install it")

    monkeypatch.setattr(openvino, "load_sdk", missing)
    with pytest.raises(EngineUnavailableError, match="OpenVINO is not installed"):
        next(compile_openvino(bundle))
