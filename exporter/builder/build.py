"""From a source to a bundle with its engines: the work of ``latentrt build-engine``."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from latentrt.engines.errors import BundleError, InvalidRequestError
from latentrt.engines.records import RECORD_NAME
from latentrt.engines.store import EngineStore
from latentrt.engines.trt import SDK_MODULES, build_target, load_sdk
from latentrt.runtime.bundle import manifest as m
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.bundle.writer import BundleWriter, write_bundle

from ..adapters.registry import open_model
from ..graphs.targets import PORTABLE, Form, exported_form, form_for
from ..model import Model
from ..progress import Reporter, Silent
from ..source.opening import open_source
from ..source.optimum import GraphFolders
from .adoption import adopt
from .construction import Construction, loaded_as, picture_key
from .manifest import ManifestFactory, tool_versions, write_tokenizers
from .plans import BuiltEngine, compile_component, components_to_compile, profile_ranges
from .request import BuildRequest, defaults_of

_OWN_TOOLS = ("latentrt", "onnx")  # take part where graphs are taken over


@dataclass(frozen=True)
class BuildReport:
    """The result of a build.

    Attributes:
        path: The bundle.
        exported: Graphs that were exported, relative to the bundle; empty where all were there already.
        quality: PSNR in dB of each exported graph against torch, by graph, and figures of images by engine.
        engines: Compiled engines.
        seconds: How long the build took.
    """

    path: Path
    exported: tuple[str, ...]
    quality: Mapping[str, float]
    engines: tuple[BuiltEngine, ...]
    seconds: float


@dataclass(frozen=True)
class _Work:
    """The work that a build has left, given the bundle that is at its output.

    Attributes:
        older: That bundle, if it is of the same source and tools.
        graphs: Its graphs by component and form, with an entry for every component of the model.
        quality: Its figures.
        wanted: Forms that the build was asked for, as torch exports them.
        missing: Components and forms to export.
        unquantized: Forms to make by quantisation.
        unjudged: Engines whose images are not yet compared with those of fp32.
    """

    older: Bundle | None
    graphs: dict[str, dict[str, m.Graph]]
    quality: dict[str, float]
    wanted: Sequence[Form]
    missing: Sequence[tuple[str, Form]]
    unquantized: Sequence[Form]
    unjudged: Sequence[str]

    @property
    def done(self) -> bool:
        """Whether nothing is left."""
        return not (self.missing or self.unquantized or self.unjudged)

    @property
    def had_portable(self) -> bool:
        """Whether the older bundle has graphs of the portable form."""
        components = self.older.manifest.components.values() if self.older else ()
        return any(PORTABLE.name in component.graphs for component in components)


def build_bundle(request: BuildRequest, reporter: Reporter | None = None) -> BuildReport:
    """Export what is missing, write the bundle, and compile engines into it.

    Args:
        request: The source, the bundle, and all settings.
        reporter: Receives the progress of the build; ``None`` reports to nobody.

    Raises:
        SourceError: if the source cannot be exported.
        ExportError: if an export fails, or a graph does not compute what its source computes.
        InvalidRequestError: before anything is exported, if sizes, steps or sampler do not suit the source.
        EngineUnavailableError: before anything is exported, if an engine cannot be built here.
        OutputError: if the bundle cannot be written; an older bundle is then as it was.
    """
    start = time.perf_counter()
    reporter = reporter or Silent()
    model = open_model(open_source(request.source, request.reading), request.adapter_files)
    if model.notes:
        reporter.stage(model.name)
        reporter.result("; ".join(model.notes))
    if isinstance(model.source.weights, GraphFolders):
        return _adopt(request, model, model.source.weights, reporter, start)
    sdks = {name: load_sdk(name) for name in dict.fromkeys(request.engines) if name in SDK_MODULES}
    for sdk in sdks.values():
        build_target(sdk, request.options)
    ranges = profile_ranges(request, model)
    _check_defaults(model, defaults_of(request, model.source))
    forms = list(dict.fromkeys(form_for(engine, request.precision) for engine in request.engines))
    bundle, exported = _export(request, model, forms, reporter)
    engines = tuple(
        compile_component(
            bundle, name, form_for(sdk_name, request.precision), sdk, ranges[name], request.options, reporter
        )
        for sdk_name, sdk in sdks.items()
        for name in components_to_compile(bundle)
    )
    judged = tuple(f"pictures/{engine}/{request.precision}/" for engine in request.engines)
    quality = {
        name: value for name, value in bundle.manifest.quality.items() if name in exported or name.startswith(judged)
    }
    return BuildReport(bundle.path, exported, quality, engines, time.perf_counter() - start)


def _check_defaults(model: Model, defaults: m.Defaults) -> None:
    """Refuse defaults that no request could use."""
    model.family.compile_plan(model.source.scheduler, defaults.sampler, defaults.steps)


def _adopt(request: BuildRequest, model: Model, folders: GraphFolders, reporter: Reporter, start: float) -> BuildReport:
    """Take over graphs that were exported elsewhere."""
    if compiled := [engine for engine in request.engines if engine in SDK_MODULES]:
        raise InvalidRequestError(
            f"{model.name} holds graphs that were exported elsewhere, of which no plans for {compiled[0]} are built; "
            "build from the model's weights"
        )
    factory = ManifestFactory(model, defaults_of(request, model.source), tool_versions(_OWN_TOOLS))
    _check_defaults(model, factory.defaults)
    bundle, taken = adopt(
        factory,
        folders,
        request.output,
        precision=request.precision,
        try_out=request.verify,
        reporter=reporter,
    )
    return BuildReport(bundle.path, taken, {}, (), time.perf_counter() - start)


def _export(
    request: BuildRequest, model: Model, forms: Sequence[Form], reporter: Reporter
) -> tuple[Bundle, tuple[str, ...]]:
    """Bring the bundle at ``request.output`` to hold all ``forms``; graphs that it has already are kept."""
    work = _work(request, model, forms)
    defaults = defaults_of(request, model.source, work.older.manifest.defaults if work.older else None)
    factory = ManifestFactory(model, defaults, tool_versions())
    if work.older and work.done and factory.describes(work.older.manifest):
        reporter.stage("ONNX graphs")
        reporter.result("already exported from this source")
        return work.older, ()
    if work.older is None and (request.output / m.MANIFEST_FILE).exists():
        reporter.stage(f"{request.output.name}: older bundle")
        reporter.result("from another source or other tool versions, or damaged; replaced together with its engines")
    with write_bundle(request.output) as writer:
        new = _construct(request, factory, work, writer, reporter)
    return Bundle.open(request.output), tuple(new.exported)


def _work(request: BuildRequest, model: Model, forms: Sequence[Form]) -> _Work:
    """Compare what is asked for with the bundle that is there."""
    older = _same_source(request, model)
    found = older.manifest.components if older else {}
    graphs = {part: dict(found[part].graphs) if part in found else {} for part in model.all_components}
    quality = dict(older.manifest.quality) if older else {}
    reduced = request.precision != "fp32" and request.verify
    engines = dict.fromkeys(request.engines) if reduced else {}
    unjudged = [engine for engine in engines if picture_key(engine, request.precision) not in quality]
    wanted = list(dict.fromkeys(map(exported_form, forms)))
    # Images are compared with those of fp32, which are then needed for this build alone.
    exports = list(dict.fromkeys([*wanted, *([PORTABLE] if unjudged else [])]))
    step = model.family.stages()[-1]
    unquantized = [form for form in forms if form.quantized and form.name not in graphs[step]]

    def lacks(part: str, form: Form) -> bool:
        return form.name not in graphs[part] or (request.verify and graphs[part][form.name].file not in quality)

    missing = [
        (name, form)
        for name in model.components
        for form in exports
        if lacks(name, form) or lacks(model.with_stages(name)[-1], form)
    ]
    return _Work(older, graphs, quality, wanted, missing, unquantized, unjudged)


def _construct(
    request: BuildRequest, factory: ManifestFactory, work: _Work, writer: BundleWriter, reporter: Reporter
) -> Construction:
    """Do the work in the directory of a writer, and commit it."""
    model, directory = factory.model, writer.directory
    if work.older:
        _carry_files(work.older, directory)
        _carry_engines(work.older, directory / m.ENGINES_DIRECTORY)
    tokenizers = write_tokenizers(model.source, directory)
    if work.missing:  # all weights are read once, so that damage in the last does not show after the first is exported
        read = loaded_as(model, [form.precision for _, form in work.missing], request.verify)
        for part in model.configs:
            read.load(part)

    def manifest() -> m.Manifest:
        components = {name: m.Component(name, graphs) for name, graphs in work.graphs.items() if graphs}
        return factory.make(components, tokenizers, work.quality)

    def preview() -> Bundle:
        return writer.preview(manifest())

    new = Construction(model, directory, request.verify, reporter, work.graphs, work.quality, preview)
    for name in model.components:
        new.export(name, [form for each, form in work.missing if each == name])
    if request.calibration is not None:
        size, calibration = _image_size(request), request.calibration
        for form in dict.fromkeys(form for _, form in work.missing if form.precision == "fp16"):
            new.widen_where_needed(form, calibration, size)
        for form in work.unquantized:
            new.quantize(form, calibration, request.quantization, size)
        for engine in work.unjudged:
            new.judge(engine, request.precision, calibration, size, accept=request.accept_quality)
    if PORTABLE not in work.wanted and not work.had_portable:
        new.drop(PORTABLE)
    writer.commit(manifest())
    return new


def _image_size(request: BuildRequest) -> dict[str, int | None]:
    """Width and height in pixels to calibrate with: those that engines are tuned for."""
    return {name: request.ranges[name].opt if name in request.ranges else None for name in ("width", "height")}


def _same_source(request: BuildRequest, model: Model) -> Bundle | None:
    """The bundle at the output, if it was exported from this very model with these very tools and is whole."""
    try:
        older = Bundle.open(request.output, verify_hash=True)
    except (BundleError, OSError):
        return None
    known = older.manifest.source.fingerprint == model.fingerprint and older.manifest.tools == tool_versions()
    complete = set(model.components) <= set(older.manifest.components)
    return older if known and complete else None


def _carry_files(older: Bundle, directory: Path) -> None:
    """Copy an older bundle's files."""
    for relative in older.manifest.files:
        target = directory / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(older.file(relative), target)


def _carry_engines(older: Bundle, directory: Path) -> None:
    """Copy an older bundle's compiled engines; those of graphs that change have other keys and are not found."""
    store = EngineStore(older.engines_directory)
    for key in sorted(os.listdir(store.root)) if store.root.is_dir() else []:
        try:
            record = store.find(key, verify_hash=False)
        except (BundleError, ValueError):
            continue  # a damaged one is built anew; other names are no engines
        if record is not None:
            (directory / key).mkdir(parents=True)
            for name in (record.file, RECORD_NAME):
                shutil.copyfile(store.root / key / name, directory / key / name)
