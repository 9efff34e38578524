"""Where does an engine drift from the reference? The first operators of a graph whose results differ."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from latentrt.engines import Array
from latentrt.engines.errors import BundleError, InvalidRequestError, translated
from latentrt.engines.onnxrt import load_sdk
from latentrt.engines.openvino.engine import OpenVinoEngine, OpenVinoOptions
from latentrt.runtime.bundle.reader import Bundle

from ..graphs.export import EXTERNAL_THRESHOLD
from ..graphs.targets import PORTABLE, Form, exported_form, form_for
from ..passes.widen import round_values, widen
from ..verification.components import psnr
from ..verification.emulate import emulated
from .calibration import Calibration, record

RUNNERS = ("emulated", "onnxruntime", "openvino")
"""What the drift of can be found: the roundings of a precision, or an engine that runs on a CPU."""

_AT_ONCE = 64  # values read in one call: all of those of a large model would not fit into memory
_ERRORS_ONLY = 3
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Drift:
    """How far the result of an operator is from the reference.

    Attributes:
        node: Name of the operator in the graph.
        operator: Its kind, e.g. ``Conv``.
        psnr: Of its result, in dB.
        before: Of the worst of what it takes, in dB; infinite where it takes inputs alone.
    """

    node: str
    operator: str
    psnr: float
    before: float

    @property
    def lost(self) -> float:
        """What this operator loses by itself, in dB."""
        return min(self.before, 200.0) - self.psnr


def find_drift(
    bundle: Bundle, component: str, precision: str, *, runner: str = "emulated", opset: int | None = None
) -> list[Drift]:
    """Run a component's graph twice, in fp32 by ONNX Runtime and as asked for, and compare every operator's result.

    The inputs are those of a real picture. Both runs see the same graph; operators that only the reduced one has
    (roundings to 8 bits) are passed over.

    Args:
        bundle: The bundle; nothing is written to it.
        component: Part of the model that a pipeline opens, e.g. ``"unet_step"``.
        precision: What to compute in.
        runner: One of :data:`RUNNERS`.
        opset: Operator set of the form; ``None`` takes the one that ONNX Runtime and OpenVINO take, else the other.

    Returns:
        One entry for each operator with a floating-point result, in the graph's order.

    Raises:
        InvalidRequestError: for an unknown runner.
        BundleError: if the bundle lacks the component or the form.
        EngineError: if a graph cannot be run.
    """
    if runner not in RUNNERS:
        raise InvalidRequestError(f"unknown runner {runner!r}; known runners: {', '.join(RUNNERS)}")
    form = _form(bundle, component, precision, runner, opset)
    base, feeds = exported_form(form), _feeds(bundle, component, exported_form(form))
    reference = ir.load(bundle.graph_path(component, base.name))
    candidate = ir.load(bundle.graph_path(component, form.name))
    if base.precision != "fp32":
        widen(reference.graph)
    if runner == "emulated":
        if precision == "bf16" and form == PORTABLE:
            round_values(candidate.graph, ir.DataType.BFLOAT16, keep="update_")
        else:
            widen(candidate.graph, rounded=True)
    elif widen(candidate.graph):
        raise InvalidRequestError(f"{runner} runs graphs of fp32 and int8 here; compare {precision} emulated")
    names = [
        (node, str(value.name))
        for node in reference.graph
        for value in node.outputs[:1]
        if value.dtype in _FLOATS and value.name in _made(candidate.graph)
    ]
    values = [name for _, name in names]
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="latentrt-bisect-") as scratch:
        expected = _results(reference, values, Path(scratch, "reference.onnx"), "emulated", precision, feeds)
        received = _results(candidate, values, Path(scratch, "candidate.onnx"), runner, precision, feeds)
        for left, right in zip(expected, received, strict=True):
            found |= {name: psnr(left[name], right[name]) for name in left}
    return [
        Drift(
            str(node.name),
            node.op_type,
            found[name],
            min((found[v.name] for v in node.inputs if v is not None and v.name in found), default=float("inf")),
        )
        for node, name in names
    ]


def _form(bundle: Bundle, component: str, precision: str, runner: str, opset: int | None) -> Form:
    forms = [Form(each, precision) for each in (20, 23) if opset in (None, each)]
    if precision == "bf16" and opset in (None, 20):
        forms.append(PORTABLE)
    if runner != "emulated":
        forms = [form_for(runner, precision)]
    there = bundle.manifest.components[component].graphs if component in bundle.manifest.components else {}
    for form in forms:
        if form.name in there:
            return form
    bundle.graph(component, forms[0].name)
    raise BundleError(f"{component} has no form of {precision}")


def _feeds(bundle: Bundle, component: str, form: Form) -> Mapping[str, Array]:
    """Inputs of one call in the middle of drawing a picture, in fp32."""
    with emulated(bundle, form.name, rounded=False) as (pipeline, _):
        calls = record(pipeline, Calibration(steps=4, recorded=1, prompts=("a red apple",))).calls
    if component not in calls:
        raise BundleError(f"no picture needs {component}; compare one of {', '.join(calls)}")
    return calls[component][-1]


def _made(graph: ir.Graph) -> set[str]:
    return {str(value.name) for node in graph for value in node.outputs}


def _results(
    model: ir.Model, names: Sequence[str], file: Path, runner: str, precision: str, feeds: Mapping[str, Array]
) -> Iterator[Mapping[str, Array]]:
    """Values of a graph, some at a time. All are outputs of it, which keeps an engine from merging their operators."""
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    model.graph.outputs.clear()
    model.graph.outputs.extend(values[name] for name in names)
    size = sum(each.const_value.nbytes for each in model.graph.initializers.values() if each.const_value is not None)
    if size > EXTERNAL_THRESHOLD:
        ir.save(model, file, external_data=f"{file.name}.data")
    else:
        ir.save(ir.external_data.load_to_model(model), file)
    parts = [names[first : first + _AT_ONCE] for first in range(0, len(names), _AT_ONCE)]
    if runner == "openvino":
        with OpenVinoEngine(file, OpenVinoOptions("int8" if precision == "int8" else "fp32")) as engine:
            results = engine.run(feeds)
        yield from ({name: results[name] for name in part} for part in parts)
        return
    ort = load_sdk()
    settings = ort.SessionOptions()
    settings.log_severity_level = _ERRORS_ONLY
    settings.add_session_config_entry("session.disable_quant_qdq", "1" if runner == "emulated" else "0")
    settings.add_session_config_entry("session.x64quantprecision", "1")
    with translated(f"{file.name} could not be run"):
        session = ort.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        wanted = {node.name for node in session.get_inputs()}
        known = {name: array for name, array in feeds.items() if name in wanted}
        for part in parts:
            yield dict(zip(part, session.run(part, known), strict=True))
