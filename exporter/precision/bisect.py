"""Find the operators of a graph at which an engine or a precision drifts from the reference."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from latentrt.engines import Array
from latentrt.engines.checks import check_choice
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
"""Ways to run the graph under test: with the roundings of its precision emulated, or by an engine for CPUs."""

_AT_ONCE = 64  # values that one call returns: all values of a large model together would not fit into memory
_MOST = 200.0  # dB; stands for infinity in a difference
_ERRORS_ONLY = 3
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Drift:
    """How far the result of an operator is from the reference.

    Attributes:
        node: Name of the node in the graph.
        operator: Its operator, such as ``Conv``.
        psnr: PSNR of its result, in dB.
        before: Lowest PSNR of its inputs, in dB; infinite if all of them are inputs or constants of the graph.
    """

    node: str
    operator: str
    psnr: float
    before: float

    @property
    def lost(self) -> float:
        """PSNR that this operator loses by itself, in dB."""
        return min(self.before, _MOST) - self.psnr


def find_drift(
    bundle: Bundle, component: str, precision: str, *, runner: str = "emulated", opset: int | None = None
) -> list[Drift]:
    """Run a component's graph as the reference and as asked for, and compare the results of every operator.

    Both runs get the inputs of a real image. Operators that only the graph under test has (roundings to 8 bits) are
    passed over.

    Steps:
        1. The form under test is chosen, and inputs are recorded while an image is drawn.
        2. The reference becomes the graph without the roundings of the form, in fp32; the graph under test is rounded
           where the runner does not round by itself.
        3. Both graphs run, some values at a time, and the values that both have are compared by name.

    Args:
        bundle: The bundle; nothing is written to it.
        component: Part of the model that a pipeline opens, such as ``"unet_step"``.
        precision: Precision under test.
        runner: One of :data:`RUNNERS`.
        opset: Operator set of the form; ``None`` prefers the one that ONNX Runtime and OpenVINO take.

    Returns:
        One entry for each operator with a floating-point result, in the graph's order.

    Raises:
        InvalidRequestError: for an unknown runner, or a form that it cannot run.
        BundleError: if the bundle lacks the component or the form.
        EngineError: if a graph cannot be run.
    """
    check_choice("runner", runner, RUNNERS)
    # Step 1.
    form = _form(bundle, component, precision, runner, opset)
    base = exported_form(form)
    feeds = _feeds(bundle, component, base)
    # Step 2.
    reference = ir.load(bundle.graph_path(component, base.name))
    if base.precision != "fp32":
        widen(reference.graph)
    candidate = ir.load(bundle.graph_path(component, form.name))
    if runner != "emulated":
        if widen(candidate.graph):
            raise InvalidRequestError(f"{runner} runs graphs of fp32 and int8 here; compare {precision} emulated")
    elif precision == "bf16" and form == PORTABLE:
        round_values(candidate.graph, ir.DataType.BFLOAT16, keep="update_")  # OpenVINO rounds an fp32 graph by itself
    else:
        widen(candidate.graph, rounded=True)
    # Step 3.
    known = _computed(candidate.graph)
    compared = [
        (node, str(value.name))
        for node in reference.graph
        for value in node.outputs[:1]
        if value.dtype in _FLOATS and value.name in known
    ]
    names = [name for _, name in compared]
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="latentrt-bisect-") as scratch:
        expected = _results(reference, names, Path(scratch, "reference.onnx"), "emulated", precision, feeds)
        received = _results(candidate, names, Path(scratch, "candidate.onnx"), runner, precision, feeds)
        for left, right in zip(expected, received, strict=True):
            found |= {name: psnr(left[name], right[name]) for name in left}
    return [
        Drift(
            str(node.name),
            node.op_type,
            found[name],
            min((found[v.name] for v in node.inputs if v is not None and v.name in found), default=float("inf")),
        )
        for node, name in compared
    ]


def _form(bundle: Bundle, component: str, precision: str, runner: str, opset: int | None) -> Form:
    """Return the first form of a precision that the bundle has and the runner takes."""
    forms = [Form(each, precision) for each in (20, 23) if opset in (None, each)]
    if precision == "bf16" and opset in (None, 20):
        forms.append(PORTABLE)
    if runner != "emulated":
        forms = [form_for(runner, precision)]
    available = bundle.manifest.components[component].graphs if component in bundle.manifest.components else {}
    for form in forms:
        if form.name in available:
            return form
    bundle.graph(component, forms[0].name)  # raises an error that says which forms there are
    raise BundleError(f"{component} has no form of {precision}")


def _feeds(bundle: Bundle, component: str, form: Form) -> Mapping[str, Array]:
    """Return the component's inputs in the last call that is recorded while an image is drawn, in fp32."""
    with emulated(bundle, form.name, rounded=False) as (pipeline, _):
        calls = record(pipeline, Calibration(steps=4, recorded=1, prompts=("a red apple",))).calls
    if component not in calls:
        raise BundleError(f"drawing an image does not run {component}; compare one of {', '.join(calls)}")
    return calls[component][-1]


def _computed(graph: ir.Graph) -> set[str]:
    return {str(value.name) for node in graph for value in node.outputs}


def _results(
    model: ir.Model, names: Sequence[str], file: Path, runner: str, precision: str, feeds: Mapping[str, Array]
) -> Iterator[Mapping[str, Array]]:
    """Run a graph and return the values of these names, some at a time.

    All of them become outputs of the graph in every run, which keeps an engine from fusing their operators.
    """
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
