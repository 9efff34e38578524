"""From the name of an engine to an engine for each component."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latentrt.engines import TensorSpec
from latentrt.engines.errors import BundleError, EngineUnavailableError, InvalidRequestError
from latentrt.engines.onnxrt import OnnxRuntimeEngine, OnnxRuntimeOptions
from latentrt.engines.ov import OpenVinoEngine, OpenVinoOptions
from latentrt.engines.store import EngineStore
from latentrt.engines.trt import TensorRTEngine
from latentrt.runtime import Bundle
from latentrt.runtime.engine_choice import ENGINES, EngineSettings, choose_graph, compiled_engines, make_engine
from latentrt.runtime.manifest import Component, Graph

SPEC = (TensorSpec("x", "float32", (1,)),)


def component(*forms: tuple[int, str]) -> Component:
    """A component with graphs of these operator sets and precisions."""
    graphs = {
        f"opset{opset}-{precision}": Graph(f"{opset}-{precision}.onnx", precision, opset, SPEC, SPEC)
        for opset, precision in forms
    }
    return Component("unet", graphs)


@pytest.mark.parametrize(
    ("forms", "precision", "chosen"),
    [
        ([(20, "fp32")], None, "opset20-fp32"),
        ([(20, "fp16"), (20, "fp32")], None, "opset20-fp32"),
        ([(20, "fp16")], None, "opset20-fp16"),
        ([(20, "fp16"), (20, "fp32")], "fp16", "opset20-fp16"),
        ([(23, "fp32"), (20, "fp32")], None, "opset20-fp32"),
        ([(23, "fp32"), (18, "fp32"), (20, "fp32")], None, "opset18-fp32"),
        ([(23, "fp32")], None, "opset23-fp32"),
    ],
)
def test_the_graph_that_fits(forms: list[tuple[int, str]], precision: str | None, chosen: str) -> None:
    """The precision asked for, else fp32; of two operator sets the decomposed one."""
    name, graph = choose_graph(component(*forms), "onnxruntime", precision)
    assert name == chosen
    assert graph.file == chosen.removeprefix("opset") + ".onnx"


def test_a_component_that_fp16_cannot_hold_serves_it_in_fp32() -> None:
    """A graph that was kept in fp32 when fp16 was asked for goes by the form that was asked for."""
    graph = Graph("kept.onnx", "fp32", 20, SPEC, SPEC)
    assert choose_graph(Component("unet", {"opset20-fp16": graph}), "onnxruntime", "fp16") == ("opset20-fp16", graph)


def test_no_graph_fits() -> None:
    """The sentence says what was asked for and what there is; another precision does not take its place."""
    with pytest.raises(BundleError, match="no graph of unet for onnxruntime at fp16; it has opset20-fp32"):
        choose_graph(component((20, "fp32")), "onnxruntime", "fp16")
    with pytest.raises(BundleError, match="no graph of unet for onnxruntime at fp32; it has opset20-fp16"):
        choose_graph(component((20, "fp16")), "onnxruntime", "fp32")
    with pytest.raises(BundleError, match=r"at any precision; it has none$"):
        choose_graph(component(), "onnxruntime", None)


@pytest.fixture(scope="module")
def bundle(tiny_bundles: dict[str, Path]) -> Bundle:
    return Bundle.open(tiny_bundles["sd1"])


@pytest.mark.parametrize("name", ["onnxruntime", "auto"])
def test_onnx_runtime_serves_every_component(bundle: Bundle, name: str) -> None:
    """Engines come closed, with their label and threads; auto is ONNX Runtime."""
    for part in ("text_encoder", "unet", "vae_decoder"):
        engine = make_engine(bundle, part, EngineSettings(name, threads=3))
        assert isinstance(engine, OnnxRuntimeEngine)
        assert engine.label == f"{part} (onnxruntime)"
        assert engine.options == OnnxRuntimeOptions(threads=3)
        assert engine.path.is_relative_to(bundle.path)
        assert engine._session is None


@pytest.mark.parametrize(("precision", "computed_in"), [(None, "fp32"), ("fp32", "fp32"), ("bf16", "bf16")])
def test_openvino_computes_in_what_is_asked_for(bundle: Bundle, precision: str | None, computed_in: str) -> None:
    """bf16 is computed from the graph of fp32, and the label says what it is."""
    engine = make_engine(bundle, "unet_step", EngineSettings("openvino", precision, threads=2))
    assert isinstance(engine, OpenVinoEngine)
    assert engine.options == OpenVinoOptions(computed_in, 2)
    assert engine.label == f"unet_step (openvino, {computed_in})"
    with pytest.raises(BundleError, match="no graph of unet_step for openvino at fp16"):
        make_engine(bundle, "unet_step", EngineSettings("openvino", "fp16"))


def test_an_unknown_engine_and_an_unknown_component(bundle: Bundle) -> None:
    """What is known is listed."""
    with pytest.raises(InvalidRequestError, match=f"unknown engine 'magic'; known engines: {', '.join(ENGINES)}, auto"):
        make_engine(bundle, "unet", EngineSettings("magic"))
    with pytest.raises(BundleError, match=r"the bundle has no transformer; it has .*unet"):
        make_engine(bundle, "transformer", EngineSettings())


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_a_bundle_without_plans(bundle: Bundle, name: str) -> None:
    """The way out is the command that builds one."""
    with pytest.raises(EngineUnavailableError, match=rf"no {name} plan of unet; build one with: latentrt build-engine"):
        make_engine(bundle, "unet", EngineSettings(name))


def add(bundle: Bundle, key: str, *, created: str = "2026-01-01T00:00:00+00:00", **changes: Any) -> None:
    """Put a plan of random bytes into the bundle."""
    store = EngineStore(bundle.engines_directory)
    facts: dict[str, Any] = {
        "engine": "tensorrt-rtx",
        "component": "unet",
        "file": "unet.plan",
        "precision": "fp32",
        "profile": {"x": ((1,), (1,), (1,))},
        "sdk": "tensorrt-rtx",
        "sdk_version": "1.2.3",
        "target": "sm_80+",
    }
    store.add(key * 24, lambda path: path.write_bytes(key.encode()) and None, **(facts | changes))
    record = store.root / (key * 24) / "engine.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"created": created}))


def test_the_newest_plan_of_the_right_precision(tiny_bundle: Path) -> None:
    """Of several plans the one at the asked precision comes first, then the newest; other parts' are passed over."""
    bundle = Bundle.open(tiny_bundle)
    add(bundle, "a")
    add(bundle, "b", created="2026-01-02T00:00:00+00:00")
    add(bundle, "c", precision="fp16")
    add(bundle, "d", component="vae_decoder", created="2026-01-03T00:00:00+00:00")
    add(bundle, "e", engine="tensorrt", created="2026-01-03T00:00:00+00:00")
    assert {record.key[0] for record in compiled_engines(bundle, "tensorrt-rtx", "unet")} == {"a", "b", "c"}
    for precision, key in ((None, "b"), ("fp32", "b"), ("fp16", "c")):
        engine = make_engine(bundle, "unet", EngineSettings("tensorrt-rtx", precision))
        assert isinstance(engine, TensorRTEngine)
        assert engine.plan.parent.name == key * 24
        assert (engine.engine, engine.target) == ("tensorrt-rtx", "sm_80+")
