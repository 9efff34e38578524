"""Compiling a bundle for OpenVINO ahead of its first use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from latentrt.engines.errors import EngineError
from latentrt.engines.openvino.kind import OPENVINO
from latentrt.engines.records import EngineRecord

from ..bundle.reader import Bundle
from .engine_choice import EngineSettings, FixedSize, engine_arguments
from .engine_probe import check_engine
from .opening import components_for


@dataclass(frozen=True)
class Compiled:
    """A compiled model that the bundle holds.

    Attributes:
        record: Its record.
        reused: Whether it was there before.
    """

    record: EngineRecord
    reused: bool


def compile_openvino(
    bundle: Bundle,
    precision: str | None = None,
    fixed_size: FixedSize | None = None,
    on_component: Callable[[str], None] = lambda component: None,
) -> Iterator[Compiled]:
    """Compile the components that a pipeline opens, and store them in the bundle's ``engines/``.

    A pipeline of the same precision and fixed size finds it there, whatever its number of threads, as long as the
    processor and OpenVINO's version are the same.

    Args:
        bundle: The bundle.
        precision: As of :meth:`Pipeline.load <latentrt.runtime.pipeline.Pipeline.load>`.
        fixed_size: The only size to be drawn; None leaves lengths variable.
        on_component: Called with the name of each component before it is compiled.

    Yields:
        Each model once it is stored.

    Raises:
        EngineUnavailableError: if OpenVINO is missing, or the processor lacks the precision.
        EngineError: if OpenVINO cannot compile a graph.
        OutputError: if the bundle cannot be written.
        BundleError: if the bundle has no graph that fits.
    """
    check_engine(OPENVINO.name, precision)
    settings = EngineSettings(OPENVINO.name, precision, engine_cache="write", fixed_size=fixed_size)
    for component in components_for(bundle):
        on_component(component)
        with OPENVINO.make(engine_arguments(bundle, component, settings, must_keep=True)) as engine:
            opened = engine.opened
        if opened.record is None:
            raise EngineError(f"{engine.label}: the compiled model was not kept")
        yield Compiled(opened.record, opened.reused)
