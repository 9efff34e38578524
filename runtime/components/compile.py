"""Compiling a bundle for OpenVINO ahead of its first use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from latentrt.engines.errors import EngineError
from latentrt.engines.store import EngineRecord

from ..bundle.reader import Bundle
from .engine_choice import EngineSettings, FixedSize, openvino_engine
from .engine_probe import check_engine
from .opening import components_for


@dataclass(frozen=True)
class Compiled:
    """A model that is in the bundle now.

    Attributes:
        record: Its record.
        reused: Whether it was there already.
    """

    record: EngineRecord
    reused: bool


def compile_openvino(
    bundle: Bundle,
    precision: str | None = None,
    fixed_size: FixedSize | None = None,
    on_component: Callable[[str], None] = lambda component: None,
) -> Iterator[Compiled]:
    """Compile what a pipeline opens, and store it in the bundle's ``engines/``.

    A pipeline of the same precision and fixed size finds it there, whatever its number of threads, as long as the
    processor and OpenVINO's version are the same.

    Args:
        bundle: The bundle.
        precision: As of :meth:`Pipeline.load <latentrt.runtime.pipeline.Pipeline.load>`.
        fixed_size: The only size that is to be drawn; None leaves lengths variable.
        on_component: Called with the name of each component before it is compiled.

    Yields:
        Each model as it is done.

    Raises:
        EngineUnavailableError: if OpenVINO is missing, or the processor lacks the precision.
        EngineError: if OpenVINO cannot compile a graph.
        OutputError: if the bundle cannot be written.
        BundleError: if the bundle has no graph that fits.
    """
    check_engine("openvino", precision)
    settings = EngineSettings("openvino", precision, engine_cache="write", fixed_size=fixed_size)
    for component in components_for(bundle):
        on_component(component)
        with openvino_engine(bundle, component, settings, required=True) as engine:
            opened = engine.opened
        if opened.record is None:
            raise EngineError(f"{engine.label}: the compiled model was not kept")
        yield Compiled(opened.record, opened.reused)
