"""OpenVINO as a kind of engine: precisions of the processor, and the engine of a component."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentrt.engines import TensorSpec
from latentrt.engines.errors import EngineUnavailableError
from latentrt.engines.kind import PRESENT, EngineArguments
from latentrt.engines.openvino import engine as ov
from latentrt.engines.openvino.kind import OPENVINO
from latentrt.engines.store import EngineStore

openvino = pytest.importorskip("openvino", reason="OpenVINO is an optional extra")


@pytest.mark.parametrize(("has_bf16", "precisions"), [(True, "fp32, bf16"), (False, "fp32")])
def test_precisions_of_the_processor(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, precisions: str) -> None:
    """A probe names them, and one without instructions is refused."""
    monkeypatch.setattr(ov, "has_bf16", lambda core: has_bf16)
    found = OPENVINO.probe()
    assert (found.state, found.detail) == (PRESENT, f"CPU: {precisions}")
    assert openvino.__version__.startswith(found.version)
    OPENVINO.require("fp32")
    OPENVINO.require(None)
    if has_bf16:
        OPENVINO.require("bf16")
    else:
        with pytest.raises(EngineUnavailableError, match="bf16"):
            OPENVINO.require("bf16")


@pytest.mark.parametrize(
    ("asked", "computed"),
    [(None, "fp32"), ("fp32", "fp32"), ("fp16", "fp32"), ("int8-weights", "fp32"), ("bf16", "bf16"), ("int8", "int8")],
)
def test_precision_of_an_engine(asked: str | None, computed: str) -> None:
    """What is neither bf16 nor quantised is computed in fp32, and the label says which it is."""
    x = TensorSpec("x", "float32", ("batch",))
    engine = OPENVINO.make(
        EngineArguments("unet", Path("model.onnx"), (x,), (x,), asked, threads=3, lengths={"batch": 2})
    )
    assert engine.options == ov.OpenVinoOptions(computed, 3, {"batch": 2})
    assert engine.label == f"unet (openvino, {computed})"
    assert engine.cache is None


def test_compiled_models_are_kept_where_there_is_a_store(tmp_path: Path) -> None:
    """An engine of a bundle looks into its store, and adds to it only if it is to keep what it compiled."""
    for keep in (False, True):
        arguments = EngineArguments(
            "unet", Path("model.onnx"), (), (), store=EngineStore(tmp_path), keep_compiled=keep, must_keep=keep
        )
        cache = OPENVINO.make(arguments).cache
        assert cache is not None
        assert (cache.keep, cache.required) == (keep, keep)
