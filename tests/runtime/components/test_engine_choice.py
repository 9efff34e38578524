"""From the name of an engine to an engine for each component."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from latentrt.engines import TensorSpec
from latentrt.engines.errors import BundleError, EngineUnavailableError, InvalidRequestError
from latentrt.engines.kind import Availability
from latentrt.engines.onnxrt import OnnxRuntimeEngine, OnnxRuntimeOptions
from latentrt.engines.onnxrt_gpu import OnnxRuntimeGpuEngine
from latentrt.engines.openvino import engine as openvino
from latentrt.engines.openvino import winograd
from latentrt.engines.openvino.engine import OpenVinoEngine, OpenVinoOptions
from latentrt.engines.trt import kind as trt_kind
from latentrt.engines.trt.cuda import CudaDevice
from latentrt.runtime import Bundle
from latentrt.runtime.bundle.manifest import Component, Graph
from latentrt.runtime.components import engine_choice, engine_probe
from latentrt.runtime.components.engine_choice import (
    ENGINES,
    EngineSettings,
    FixedSize,
    choose_engine,
    choose_graph,
    make_engine,
    most_pictures,
)

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


def test_tensorrt_of_every_kind_takes_native_operators() -> None:
    """ONNX Runtime's CUDA provider lacks some of them, and takes the decomposed graph like a CPU."""
    forms = component((20, "fp32"), (23, "fp32"))
    chosen = {name: choose_graph(forms, name, None)[0] for name in ENGINES}
    assert {name for name, form in chosen.items() if form == "opset23-fp32"} == {
        *("tensorrt", "tensorrt-rtx", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"),
    }


def test_the_highest_precision_that_the_engine_has() -> None:
    """Without a precision an engine passes over graphs that it cannot compute."""
    forms = component((23, "fp8"), (20, "int8"))
    assert choose_graph(forms, "onnxruntime", None)[0] == "opset20-int8"
    assert choose_graph(component((23, "fp8")), "tensorrt", None)[0] == "opset23-fp8"
    with pytest.raises(BundleError, match="no graph of unet for onnxruntime at any precision; it has opset23-fp8"):
        choose_graph(component((23, "fp8")), "onnxruntime", None)


@pytest.mark.parametrize("name", ["onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-tensorrt-rtx"])
def test_providers_for_gpus(bundle: Bundle, name: str) -> None:
    """Engines come closed, with their label; what they compute stays on the GPU."""
    engine = make_engine(bundle, "unet_step", EngineSettings(name))
    assert isinstance(engine, OnnxRuntimeGpuEngine)
    assert (engine.engine, engine.label) == (name, f"unet_step ({name})")
    assert engine.gpu_options.device_outputs


def test_fixed_lengths(bundle: Bundle) -> None:
    """Each part fixes what does not vary; rows do, and so do timesteps."""
    settings = EngineSettings("openvino", fixed_size=FixedSize(64, 32, 3))
    shapes = {
        part: make_engine(bundle, part, settings).options.shapes  # type: ignore[attr-defined]
        for part in ("text_encoder", "unet", "unet_schedule", "unet_step", "vae_decoder")
    }
    size = {"latent_height": 16, "latent_width": 32}
    assert shapes == {
        "text_encoder": {"batch": 1},
        "unet": {**size, "text_length": 77},
        "unet_schedule": {},
        "unet_step": {**size, "batch": 3, "text_length": 77},
        "vae_decoder": {**size, "batch": 3},
    }


def test_plans_limit_the_pictures_of_a_call(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least of what the step and the decoder were compiled for counts; rows, and engines without plans, do not."""
    shapes = {
        "unet_step": {"registers": ((1, 1, 4, 8, 8), (2, 2, 4, 8, 8), (6, 8, 4, 8, 8)), "rows": ((1,), (4,), (12,))},
        "vae_decoder": {"latent_sample": ((1, 4, 8, 8), (2, 4, 8, 8), (4, 4, 8, 8))},
        "text_encoder": {},
    }

    def plan(bundle: Bundle, engine: str, component: str, precision: str | None) -> SimpleNamespace:
        return SimpleNamespace(record=SimpleNamespace(profile=shapes[component]))

    monkeypatch.setattr(engine_choice, "find_plan", plan)
    assert most_pictures(bundle, shapes, EngineSettings("tensorrt-rtx")) == 4
    assert most_pictures(bundle, ["text_encoder", "unet_step"], EngineSettings("tensorrt-rtx")) == 6
    assert most_pictures(bundle, ["text_encoder"], EngineSettings("tensorrt-rtx")) is None
    assert most_pictures(bundle, shapes, EngineSettings("onnxruntime")) is None


def test_the_cache_of_compiled_models(bundle: Bundle) -> None:
    """It is keyed by the manifest's hashes, read unless told otherwise, and written only when asked."""
    for name, expected in (("read", False), ("write", True)):
        engine = make_engine(bundle, "unet_step", EngineSettings("openvino", engine_cache=name))
        assert isinstance(engine, OpenVinoEngine)
        cache = engine.cache
        assert cache is not None
        assert cache.keep is expected
        files = bundle.manifest.files
        assert cache.graph == files["unet/step.onnx"].sha256
        assert cache.weights == {"unet/model.onnx.data": files["unet/model.onnx.data"].sha256}
    off = make_engine(bundle, "unet_step", EngineSettings("openvino", engine_cache="off"))
    assert isinstance(off, OpenVinoEngine)
    assert off.cache is None
    with pytest.raises(InvalidRequestError, match="engine_cache is 'on', expected one of read, write, off"):
        EngineSettings(engine_cache="on")


PARTS = ("text_encoder", "unet_step", "vae_decoder")


class Machine:
    """What a machine has: patched into every module that asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpus: tuple[CudaDevice, ...] = ()
        self.plans: dict[tuple[str, str], str] = {}
        self.states = dict.fromkeys(ENGINES, "present")
        for module in (engine_choice, trt_kind):
            monkeypatch.setattr(module, "cuda_devices", lambda: self.gpus)
        monkeypatch.setattr(engine_choice, "find_plan", self.find_plan)
        monkeypatch.setattr(engine_probe, "probe", self.probe)
        monkeypatch.setattr(openvino, "load_core", lambda: self)

    def probe(self, name: str) -> Availability:
        return Availability(name, self.states[name], "1", f"{name} is {self.states[name]}")

    def find_plan(self, bundle: Bundle, engine: str, component: str, precision: str | None) -> None:
        if self.plans.get((engine, component)) != precision:
            raise EngineUnavailableError(f"no {engine} plan of {component} at {precision}")

    def get_property(self, device: str, name: str) -> list[str]:
        return ["FP32", "BF16"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


H100 = CudaDevice("NVIDIA H100", "sm_90")


def test_auto_on_a_cpu(bundle: Bundle, machine: Machine) -> None:
    """It is ONNX Runtime, with the reason; no SDK of a GPU is asked about."""
    choice = choose_engine(bundle, PARTS, EngineSettings())
    assert (choice.name, choice.reason) == ("onnxruntime", "the fastest on a CPU")
    assert choice.passed_over == dict.fromkeys(
        ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda"), "no CUDA device was found"
    )


def test_auto_takes_plans_that_fit_all_parts(bundle: Bundle, machine: Machine) -> None:
    """Plans come first, if there is one of every part and the SDK is there."""
    machine.gpus = (H100,)
    machine.plans = {("tensorrt-rtx", part): "fp32" for part in PARTS}
    choice = choose_engine(bundle, PARTS, EngineSettings())
    assert (choice.name, choice.reason) == ("tensorrt-rtx", "the bundle has plans for this NVIDIA H100")
    assert choice.passed_over == {"tensorrt": "no tensorrt plan of text_encoder at fp32"}
    del machine.plans["tensorrt-rtx", "vae_decoder"]
    choice = choose_engine(bundle, PARTS, EngineSettings())
    assert choice.name == "onnxruntime-cuda"
    assert choice.passed_over["tensorrt-rtx"] == "no tensorrt-rtx plan of vae_decoder at fp32"
    machine.plans["tensorrt-rtx", "vae_decoder"] = "fp32"
    machine.states["tensorrt-rtx"] = "missing"
    choice = choose_engine(bundle, PARTS, EngineSettings())
    assert (choice.name, choice.passed_over["tensorrt-rtx"]) == ("onnxruntime-cuda", "tensorrt-rtx is missing")


def test_auto_never_lowers_precision(bundle: Bundle, machine: Machine) -> None:
    """Plans of fp16 are passed over in a bundle that has fp32, until fp16 is asked for."""
    machine.gpus = (H100,)
    machine.plans = {("tensorrt", part): "fp16" for part in PARTS}
    assert choose_engine(bundle, PARTS, EngineSettings()).name == "onnxruntime-cuda"
    assert choose_engine(bundle, PARTS, EngineSettings(precision="fp16")).name == "tensorrt"


def test_auto_on_a_gpu_that_nothing_can_use(bundle: Bundle, machine: Machine) -> None:
    """ONNX Runtime without CUDA is passed over with what to install, and the CPU runs."""
    machine.gpus = (H100,)
    machine.states["onnxruntime-cuda"] = "missing"
    choice = choose_engine(bundle, PARTS, EngineSettings())
    assert (choice.name, choice.reason) == ("onnxruntime", "nothing else can use the GPU here")
    assert choice.passed_over["onnxruntime-cuda"] == "onnxruntime-cuda is missing"


def test_auto_with_bf16(bundle: Bundle, machine: Machine) -> None:
    """On a CPU OpenVINO alone computes in it, from the graphs of fp32."""
    choice = choose_engine(bundle, PARTS, EngineSettings(precision="bf16"))
    assert (choice.name, choice.reason) == ("openvino", "the one that computes in bf16 on this CPU")
    assert "onnxruntime" not in choice.passed_over
    machine.states["openvino"] = "missing"
    with pytest.raises(EngineUnavailableError, match=r"^openvino is missing$"):
        choose_engine(bundle, PARTS, EngineSettings(precision="bf16"))


def test_auto_with_int8(bundle: Bundle, machine: Machine) -> None:
    """OpenVINO goes before ONNX Runtime, which is taken where that is missing."""
    components = {
        name: replace(part, graphs={"opset20-int8": part.graphs["opset20-fp32"]})
        for name, part in bundle.manifest.components.items()
    }
    bundle = replace(bundle, manifest=replace(bundle.manifest, components=components))
    choice = choose_engine(bundle, PARTS, EngineSettings(precision="int8"))
    assert (choice.name, choice.reason) == ("openvino", "the fastest in int8 on this CPU")
    machine.states["openvino"] = "missing"
    choice = choose_engine(bundle, PARTS, EngineSettings(precision="int8"))
    assert (choice.name, choice.passed_over["openvino"]) == ("onnxruntime", "openvino is missing")
    assert choice.reason == "engines that are faster cannot run it here"


def test_auto_with_a_large_unet(bundle: Bundle, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 OpenVINO goes first, unless what is asked for suits ONNX Runtime alone."""
    graph = bundle.graph("unet_step", "opset20-fp32")
    weights = sum(bundle.manifest.files[path].size for path in (graph.file, *graph.external))
    monkeypatch.setattr(engine_choice, "LARGE", weights)
    monkeypatch.setattr(winograd, "largest_tile", lambda _: 4)
    for precision in (None, "fp32"):
        choice = choose_engine(bundle, PARTS, EngineSettings(precision=precision))
        assert (choice.name, choice.reason) == ("openvino", "the fastest for a U-Net of this size on a CPU")
        assert "onnxruntime" not in choice.passed_over
    for settings in (EngineSettings(low_memory=True), EngineSettings(switchable=True)):
        assert choose_engine(bundle, PARTS, settings).name == "onnxruntime"
    machine.states["openvino"] = "missing"
    choice = choose_engine(bundle, PARTS, EngineSettings())
    assert (choice.name, choice.passed_over["openvino"]) == ("onnxruntime", "openvino is missing")
    machine.states["openvino"] = "present"
    monkeypatch.setattr(winograd, "largest_tile", lambda _: 0)  # a processor without tiles
    assert choose_engine(bundle, PARTS, EngineSettings()).name == "onnxruntime"
    monkeypatch.setattr(winograd, "largest_tile", lambda _: 4)
    monkeypatch.setattr(engine_choice, "LARGE", weights + 1)
    assert choose_engine(bundle, PARTS, EngineSettings()).name == "onnxruntime"


def test_auto_where_nothing_fits(bundle: Bundle, machine: Machine) -> None:
    """The last engine's reason is the error; an unknown precision is refused as such."""
    with pytest.raises(BundleError, match="no graph of text_encoder for openvino at fp16; it has opset20-fp32"):
        choose_engine(bundle, PARTS, EngineSettings(precision="fp16"))
    with pytest.raises(InvalidRequestError, match="unknown precision 'fp7'; known precisions: fp32"):
        choose_engine(bundle, PARTS, EngineSettings(precision="fp7"))


def test_what_is_named_is_what_runs(bundle: Bundle, machine: Machine) -> None:
    """An engine that was asked for is never exchanged for another."""
    assert choose_engine(bundle, PARTS, EngineSettings("openvino")).reason == "asked for"
    machine.states["openvino"] = "missing"
    with pytest.raises(EngineUnavailableError, match="openvino is missing"):
        choose_engine(bundle, PARTS, EngineSettings("openvino"))
