"""Emulate hardware of reduced precision with ONNX Runtime on a CPU, to draw the images that it would draw."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from latentrt.engines import Array, TensorSpec
from latentrt.engines.base import BaseEngine
from latentrt.engines.errors import translated
from latentrt.engines.onnxrt import load_sdk
from latentrt.runtime.bundle.manifest import Graph
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.components.opening import components_for
from latentrt.runtime.pipeline import Pipeline

from ..graphs.export import EXTERNAL_THRESHOLD
from ..passes.widen import round_values, widen

_ERRORS_ONLY = 3


class EmulatedEngine(BaseEngine):
    """Runs a graph whose values are all fp32, with every rounding that is written into it.

    Args:
        path: The graph's file, see :func:`widened_copy`.
        graph: Its entry in the manifest; inputs and outputs of half precision there are fp32 here.
        label: Name of the engine in messages.
    """

    def __init__(self, path: Path, graph: Graph, label: str) -> None:
        super().__init__(label)
        self._path, self._graph = path, graph
        self._session: Any = None

    def _open(self) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
        ort = load_sdk()
        settings = ort.SessionOptions()
        settings.log_severity_level = _ERRORS_ONLY
        # ONNX Runtime's kernels for 8 bits may overflow on older processors, and would fuse roundings that hardware
        # makes.
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
        with translated(f"{self.label} could not load {self._path.name}"):
            self._session = ort.InferenceSession(str(self._path), settings, providers=["CPUExecutionProvider"])
        inputs, outputs = (
            {spec.name: _in_fp32(spec) for spec in specs} for specs in (self._graph.inputs, self._graph.outputs)
        )
        return inputs, outputs

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        names = list(self._outputs)
        with translated(f"{self.label} failed"):
            return dict(zip(names, self._session.run(names, feeds), strict=True))

    def _close(self) -> None:
        self._session = None


def _in_fp32(spec: TensorSpec) -> TensorSpec:
    return replace(spec, dtype="float32") if spec.dtype in ("float16", "bfloat16") else spec


@contextlib.contextmanager
def widened_copy(
    path: Path,
    *,
    rounded: bool,
    lowered: ir.DataType | None = None,
    scratch: Path | None = None,
    weights: bool = True,
) -> Iterator[Path]:
    """Yield a temporary copy of a graph in fp32; it is removed at the end of the ``with`` statement.

    Args:
        path: The graph's file. If no value is of half precision and ``lowered`` is ``None``, it is yielded itself.
        rounded: Round every value as half precision does, see :func:`~latentrt.exporter.passes.widen.widen`.
        lowered: Round the values of the model to this type, as an engine does that lowers fp32 by itself.
        scratch: Folder of the copy; ``None`` puts it beside the graph.
        weights: Turn the weights into fp32 in the copy. ``False`` converts each where it is used; the copy then uses
            the graph's file of weights, and must be beside it.
    """
    model = ir.load(path)
    widened = widen(model.graph, rounded=rounded, weights=weights)
    if lowered is not None:
        round_values(model.graph, lowered, keep="update_")  # guidance and the sampler's update stay fp32
    elif not widened:
        yield path
        return
    copy = (scratch or path.parent) / f".{path.stem}.{'rounded' if rounded else 'widened'}.onnx"
    data = copy.with_suffix(".onnx.data")
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    try:
        if not weights:
            ir.save(model, copy)
        elif size > EXTERNAL_THRESHOLD:
            ir.save(model, copy, external_data=data.name)
        else:
            ir.save(ir.external_data.load_to_model(model), copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)
        data.unlink(missing_ok=True)


@contextlib.contextmanager
def emulated(
    bundle: Bundle, form: str, *, rounded: bool, lowered: ir.DataType | None = None
) -> Iterator[tuple[Pipeline, dict[str, Path]]]:
    """Yield a pipeline that runs one form of a bundle's graphs in fp32, and the graphs' files by component.

    Args:
        bundle: The bundle. Temporary copies are put beside its graphs.
        form: The form of every component.
        rounded: Round values to half precision where the form has it.
        lowered: Round the values of the model to this type, as for :func:`widened_copy`.

    Raises:
        BundleError: if a component lacks the form.
        EngineError: if a graph cannot be run.
    """
    with ExitStack() as stack:
        engines, paths = {}, {}
        for name in components_for(bundle):
            paths[name] = stack.enter_context(
                widened_copy(bundle.graph_path(name, form), rounded=rounded, lowered=lowered)
            )
            engine = EmulatedEngine(paths[name], bundle.graph(name, form), f"{name} ({form}, emulated)")
            engines[name] = stack.enter_context(engine)
        with Pipeline(bundle, engines) as pipeline:
            yield pipeline, paths
