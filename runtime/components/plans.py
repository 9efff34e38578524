"""Plans of TensorRT and TensorRT-RTX in a bundle: which of them may be opened here.

A plan is opened only if its key is the one that the bundle's present graph has, with the facts that its record states;
so a plan that was built from older weights, or for another profile than it claims, is never found. It must also be for
this machine's GPU and for the version of the SDK that is installed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from latentrt.engines.errors import BundleError, EngineUnavailableError
from latentrt.engines.records import EngineRecord, engine_key
from latentrt.engines.store import EngineStore
from latentrt.engines.trt.cuda import cuda_devices, no_device
from latentrt.engines.trt.sdk import load_sdk

from ..bundle.manifest import PRECISIONS, Graph
from ..bundle.reader import Bundle

_logger = logging.getLogger("latentrt.runtime.components.plans")
_logger.addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Plan:
    """A plan that fits.

    Attributes:
        record: Its record.
        form: Form of the graph that it was built from, such as ``"opset23-fp16"``.
        precision: The form's precision. (The plan's own is higher where a component would overflow in fp16.)
    """

    record: EngineRecord
    form: str
    precision: str


def find_plan(bundle: Bundle, engine: str, component: str, precision: str | None = None) -> Plan:
    """The best plan of a component: of the highest precision, made for just this GPU, the newest.

    Args:
        bundle: The bundle.
        engine: ``"tensorrt"`` or ``"tensorrt-rtx"``.
        component: Part of the model.
        precision: The only one to take; None takes any.

    Raises:
        EngineUnavailableError: if none fits; the message gives the reason and the way out.
    """
    build = f"build one with: latentrt build-engine SOURCE --output {bundle.path} --engine {engine}"
    records = [record for record in _sound_records(bundle) if record.engine == engine and record.component == component]
    if not records:
        raise EngineUnavailableError(f"the bundle has no {engine} plan of {component}; {build}")
    graphs = bundle.manifest.components[component].graphs
    plans = [
        Plan(record, form, form.partition("-")[2])
        for record in records
        for form, graph in graphs.items()
        if fits_graph(record, bundle, graph)
    ]
    if not plans:
        raise EngineUnavailableError(
            f"the {engine} plans of {component} were built from other graphs than the bundle has now; {build}"
        )
    if precision is not None:
        build = f"{build} --precision {precision}"
        if not any(plan.precision == precision for plan in plans):
            there = ", ".join(sorted({plan.precision for plan in plans}))
            raise EngineUnavailableError(
                f"the bundle has no {engine} plan of {component} at {precision}, it has {there}; {build}"
            )
        plans = [plan for plan in plans if plan.precision == precision]
    sdk = load_sdk(engine)
    if not (devices := cuda_devices()):
        raise EngineUnavailableError(no_device(engine))
    architecture = devices[0].architecture
    here = [plan for plan in plans if fits_gpu(plan.record.target, architecture)]
    if not here:
        targets = ", ".join(sorted({plan.record.target for plan in plans}))
        raise EngineUnavailableError(
            f"the {engine} plans of {component} are for {targets}, this GPU is {architecture}; {build}"
        )
    current = [plan for plan in here if _fits_version(plan.record, sdk.version)]
    if not current:
        versions = ", ".join(sorted({plan.record.sdk_version for plan in here}))
        raise EngineUnavailableError(
            f"the {engine} plans of {component} are of version {versions}, {sdk.title} is installed; {build}"
        )
    newest_first = sorted(current, key=lambda plan: plan.record.created, reverse=True)
    return min(newest_first, key=lambda p: (PRECISIONS.index(p.precision), p.record.target != architecture))


def planned(bundle: Bundle, engine: str, component: str) -> set[str]:
    """Precisions that a component has plans of for its present graphs, for whichever GPU and version of the SDK."""
    graphs = bundle.manifest.components[component].graphs
    return {
        form.partition("-")[2]
        for record in _sound_records(bundle)
        if (record.engine, record.component) == (engine, component)
        for form, graph in graphs.items()
        if fits_graph(record, bundle, graph)
    }


def fits_graph(record: EngineRecord, bundle: Bundle, graph: Graph) -> bool:
    """Whether a plan was built from the bundle's present graph and weights, with the facts of its record."""
    from latentrt.engines.trt.build import BuildOptions

    files = bundle.manifest.files
    key = engine_key(
        graph=files[graph.file].sha256,
        weights={name: files[name].sha256 for name in graph.external},
        engine=record.engine,
        sdk=record.sdk,
        sdk_version=record.sdk_version,
        precision=record.precision,
        profile=record.profile,
        flags=BuildOptions().as_flags() if record.flags is None else record.flags,
        target=record.target,
    )
    return key == record.key


def fits_gpu(target: str, architecture: str) -> bool:
    """Whether a plan for ``target``, such as ``"sm_80+"`` or ``"sm_86,sm_89"``, runs on an ``architecture``."""
    own = _number(architecture)
    return any(
        own >= _number(each.removesuffix("+")) if each.endswith("+") else each == architecture
        for each in target.split(",")
    )


def _number(architecture: str) -> int:
    digits = architecture.removeprefix("sm_")
    return int(digits) if digits.isdecimal() else 1 << 30  # a target that is no architecture fits none


def _fits_version(record: EngineRecord, version: str) -> bool:
    if (record.flags or {}).get("version_compatible"):  # it then runs in later versions of the same major version
        return _parts(record.sdk_version)[0] == _parts(version)[0] and _parts(record.sdk_version) <= _parts(version)
    return record.sdk_version == version


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def _sound_records(bundle: Bundle) -> Iterator[EngineRecord]:
    """Records that can be read; a damaged one concerns nobody but itself."""
    store = EngineStore(bundle.engines_directory)
    for key in store.stored_keys():
        try:
            record = store.find(key, verify_hash=False)
        except BundleError as error:
            _logger.warning("%s", error)
            continue
        if record is not None:
            yield record
