"""From a source to a bundle with its engines: what ``latentrt build-engine`` does."""

from __future__ import annotations

import importlib.metadata
import os
import platform
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
from latentrt.runtime.bundle.writer import write_bundle

from ..adapters.controlnet import with_controlnets
from ..adapters.ip_adapter import with_ip_adapter
from ..adapters.lora import with_loras
from ..adapters.safety_checker import with_safety_checker
from ..adapters.tiny_vae import with_tiny_vae
from ..graphs.targets import PORTABLE, Form, exported_form, form_for
from ..progress import Reporter, Silent
from ..source.opening import open_source
from ..source.optimum import GraphFolders
from ..source.source import Source
from .adoption import adopt
from .construction import Construction, loaded_as, picture_key
from .plans import BuiltEngine, compile_component, components_to_compile, profile_ranges
from .request import BuildRequest, defaults_of

_TOOLS = ("latentrt", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "numpy")


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        path: The bundle.
        exported: Graphs that were exported, relative to the bundle; empty where all were there already.
        quality: What was measured: PSNR in dB of each exported graph, by graph, and figures of pictures by engine.
        engines: Compiled engines.
        seconds: How long it took.
    """

    path: Path
    exported: tuple[str, ...]
    quality: Mapping[str, float]
    engines: tuple[BuiltEngine, ...]
    seconds: float


def build_bundle(request: BuildRequest, reporter: Reporter | None = None) -> BuildReport:
    """Export what is missing, write the bundle, and compile engines into it.

    Raises:
        SourceError: if the source cannot be exported.
        ExportError: if an export fails, or does not compute what its source computes.
        InvalidRequestError: before anything is exported, if sizes, steps or sampler do not suit the source.
        EngineUnavailableError: before anything is exported, if an engine cannot be built here.
        OutputError: if the bundle cannot be written; an older bundle is then as it was.
    """
    start = time.perf_counter()
    reporter = reporter or Silent()
    source = with_loras(open_source(request.source, request.reading), request.loras)
    source = with_tiny_vae(source, request.tiny_vae)
    source = with_ip_adapter(with_controlnets(source, request.controlnets), request.ip_adapter)
    source = with_safety_checker(source, request.safety_checker)
    if source.notes:
        reporter.stage(source.name)
        reporter.result("; ".join(source.notes))
    if isinstance(source.weights, GraphFolders):
        return _adopt(request, source, source.weights, reporter, start)
    sdks = {name: load_sdk(name) for name in dict.fromkeys(request.engines) if name in SDK_MODULES}
    for sdk in sdks.values():
        build_target(sdk, request.options)
    ranges = profile_ranges(request, source)
    defaults = defaults_of(request, source)
    source.family.compile_plan(source.scheduler, defaults.sampler, defaults.steps)  # refuses what no request could use
    forms = list(dict.fromkeys(form_for(engine, request.precision) for engine in request.engines))
    bundle, exported = _export(request, source, forms, reporter)
    engines = tuple(
        compile_component(
            bundle, name, form_for(sdk_name, request.precision), sdk, ranges[name], request.options, reporter
        )
        for sdk_name, sdk in sdks.items()
        for name in components_to_compile(bundle)
    )
    pictures = tuple(f"pictures/{engine}/{request.precision}/" for engine in request.engines)
    quality = {
        name: value for name, value in bundle.manifest.quality.items() if name in exported or name.startswith(pictures)
    }
    return BuildReport(bundle.path, exported, quality, engines, time.perf_counter() - start)


def _adopt(
    request: BuildRequest, source: Source, folders: GraphFolders, reporter: Reporter, start: float
) -> BuildReport:
    """Take over graphs that were exported elsewhere."""
    if compiled := [engine for engine in request.engines if engine in SDK_MODULES]:
        raise InvalidRequestError(
            f"{source.name} holds graphs that were exported elsewhere, of which no plans for {compiled[0]} are built; "
            "build from the model's weights"
        )
    defaults = defaults_of(request, source)
    source.family.compile_plan(source.scheduler, defaults.sampler, defaults.steps)
    bundle, taken = adopt(
        source,
        folders,
        request.output,
        precision=request.precision,
        defaults=defaults,
        tools=tool_versions(("latentrt", "onnx")),
        write_tokenizer=lambda name, directory: _write_tokenizer(source, name, directory),
        try_out=request.verify,
        reporter=reporter,
    )
    return BuildReport(bundle.path, taken, {}, (), time.perf_counter() - start)


def tool_versions(tools: Sequence[str] = _TOOLS) -> dict[str, str]:
    """Versions of what decides an export."""
    return {"python": platform.python_version(), **{tool: importlib.metadata.version(tool) for tool in tools}}


def _export(
    request: BuildRequest, source: Source, forms: Sequence[Form], reporter: Reporter
) -> tuple[Bundle, tuple[str, ...]]:
    """Bring the bundle at ``request.output`` to hold all ``forms``; graphs that it has already are kept."""
    older, family = _same_source(request, source), source.family
    found = older.manifest.components if older else {}
    kept = {part: dict(found[part].graphs) if part in found else {} for part in source.all_components}
    quality = dict(older.manifest.quality) if older else {}
    unjudged = [
        engine
        for engine in dict.fromkeys(request.engines)
        if request.precision != "fp32" and request.verify and picture_key(engine, request.precision) not in quality
    ]
    wanted = list(dict.fromkeys(map(exported_form, forms)))
    # Pictures are compared with those of fp32, which are then needed for this build alone.
    exports = list(dict.fromkeys([*wanted, *([PORTABLE] if unjudged else [])]))
    unquantized = [form for form in forms if form.quantized and form.name not in kept[family.stages()[-1]]]

    def lacks(part: str, form: Form) -> bool:
        return form.name not in kept[part] or (request.verify and kept[part][form.name].file not in quality)

    missing = [
        (name, form)
        for name in source.components
        for form in exports
        if lacks(name, form) or lacks(source.with_stages(name)[-1], form)
    ]
    defaults = defaults_of(request, source, older.manifest.defaults if older else None)
    origin = m.Source(source.name, source.licence, source.fingerprint, tuple(lora.adapter for lora in source.loras))
    settings = family.settings(source)
    if (
        older
        and not (missing or unquantized or unjudged)
        and older.manifest.defaults == defaults
        and older.manifest.source == origin
        and older.manifest.settings == settings
    ):
        reporter.stage("ONNX graphs")
        reporter.result("already exported from this source")
        return older, ()
    if older is None and (request.output / m.MANIFEST_FILE).exists():
        reporter.stage(f"{request.output.name}: older bundle")
        reporter.result("from another source or other tool versions, or damaged; replaced together with its engines")
    with write_bundle(request.output) as writer:
        if older:
            for relative in older.manifest.files:
                target = writer.directory / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(older.file(relative), target)
            _carry_engines(older, writer.directory / m.ENGINES_DIRECTORY)
        tokenizers = {name: _write_tokenizer(source, name, writer.directory) for name in family.tokenizers}
        if missing:  # all weights are read once, so that damage in the last does not show after the first is exported
            read = loaded_as(source, [form.precision for form in exports], request.verify)
            for part in source.configs:
                read.load(part)

        def manifest() -> m.Manifest:
            return m.Manifest(
                format_version=m.FORMAT_VERSION,
                family=family.name,
                prediction_type=str(source.scheduler.get("prediction_type", family.prediction)),
                components={name: m.Component(name, graphs) for name, graphs in kept.items() if graphs},
                files={},
                latent=family.latent(source),
                tokenizers=tokenizers,
                scheduler=source.scheduler,
                defaults=defaults,
                source=origin,
                tools=tool_versions(),
                quality=quality,
                settings=settings,
            )

        def preview() -> Bundle:
            return writer.preview(manifest())

        new = Construction(source, writer.directory, request.verify, reporter, kept, quality, preview)
        for name in source.components:
            new.export(name, [form for each, form in missing if each == name])
        if request.calibration is not None:
            size, calibration = _picture_size(request), request.calibration
            for form in dict.fromkeys(form for _, form in missing if form.precision == "fp16"):
                new.widen_where_needed(form, calibration, size)
            for form in unquantized:
                new.quantize(form, calibration, request.quantization, size)
            for engine in unjudged:
                new.judge(engine, request.precision, calibration, size, accept=request.accept_quality)
        if PORTABLE not in wanted and not any(PORTABLE.name in part.graphs for part in found.values()):
            new.drop(PORTABLE)
        writer.commit(manifest())
    return Bundle.open(request.output), tuple(new.exported)


def _picture_size(request: BuildRequest) -> dict[str, int | None]:
    """Width and height in pixels to calibrate with: those that engines are tuned for."""
    return {name: request.ranges[name].opt if name in request.ranges else None for name in ("width", "height")}


def _same_source(request: BuildRequest, source: Source) -> Bundle | None:
    """The bundle at the output, if it was exported from this very source with these very tools and is whole."""
    try:
        older = Bundle.open(request.output, verify_hash=True)
    except (BundleError, OSError):
        return None
    known = older.manifest.source.fingerprint == source.fingerprint and older.manifest.tools == tool_versions()
    complete = set(source.components) <= set(older.manifest.components)
    return older if known and complete else None


def _carry_engines(older: Bundle, directory: Path) -> None:
    """Copy an older bundle's compiled engines, which are still right for the graphs that stay."""
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


def _write_tokenizer(source: Source, name: str, directory: Path) -> m.Tokenizer:
    part, tokenizer = source.family.tokenizers[name], source.load_tokenizer(name)
    (directory / name).mkdir(exist_ok=True)
    # Its own method to save reports a full disk as a bare Exception.
    (directory / name / m.TOKENIZER_FILE).write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    positions = int(source.configs[part.encoder].get("max_position_embeddings", 77))
    length = part.length or min(positions, int(tokenizer.model_max_length))
    return m.Tokenizer(name, length, int(tokenizer.pad_token_id), part.kind)
