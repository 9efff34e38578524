"""From a source to a bundle with its engines: what ``latentrt build-engine`` does."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from latentrt.engines.errors import BundleError, InvalidRequestError
from latentrt.engines.onnxrt import OnnxRuntimeEngine
from latentrt.engines.store import RECORD_NAME, EngineRecord, EngineStore, engine_key
from latentrt.engines.trt import SDK_MODULES, BuildOptions, Profile, Range, Sdk, build_plan, build_target, load_sdk
from latentrt.runtime import manifest as m
from latentrt.runtime.bundle import Bundle, write_bundle
from latentrt.runtime.request import MAX_SIDE
from latentrt.runtime.samplers import SAMPLERS, compile_plan, default_sampler

from .components import NAMES, latent_factor, load_component
from .onnx_export import export_component, parameter_count
from .progress import Reporter, Silent
from .source import Source
from .targets import OPSETS, Form, form_for
from .verify import check_component, overflows

_TOOLS = ("latentrt", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "numpy")
_LONGEST = {"batch": 4096, "height": MAX_SIDE, "width": MAX_SIDE}
_MOST_STEPS, _MOST_GUIDANCE = 10_000, 1000  # what a manifest takes


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        source: A diffusers directory.
        output: The bundle's directory; a bundle that is there already is replaced, or extended if it comes from the
            same source.
        engines: Engines to build for, keys of :data:`latentrt.exporter.targets.OPSETS`.
        precision: ``"fp32"`` or ``"fp16"``.
        ranges: Lengths that compiled engines are built for: ``batch`` (pictures), ``height`` and ``width`` (pixels).
            What is left out is one picture of the model's own size.
        verify: Compare every exported component with torch.
        options: Settings of TensorRT builds.
        steps: Sampler steps that the bundle uses by default; ``None`` keeps those of a bundle that is extended, or
            takes 20.
        guidance: Guidance scale that the bundle uses by default; ``None`` likewise, or 7.5.
        sampler: Sampler that the bundle uses by default; ``None`` likewise, or the one of the source's scheduler.
    """

    source: Path
    output: Path
    engines: Sequence[str] = ("onnxruntime",)
    precision: str = "fp32"
    ranges: Mapping[str, Range] = field(default_factory=dict)
    verify: bool = True
    options: BuildOptions = field(default_factory=BuildOptions)
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None

    def __post_init__(self) -> None:
        if not self.engines:
            raise InvalidRequestError(f"no engine is named; known engines: {', '.join(OPSETS)}")
        for engine in self.engines:
            form_for(engine, self.precision)
        for name, lengths in self.ranges.items():
            if name not in _LONGEST:
                raise InvalidRequestError(f"unknown profile entry {name!r}; known entries: {', '.join(_LONGEST)}")
            if lengths.max > _LONGEST[name]:
                raise InvalidRequestError(f"profile for {name!r}: {lengths} exceeds {_LONGEST[name]}")
        steps, guidance = self.steps, self.guidance
        if steps is not None and (type(steps) is not int or not 1 <= steps <= _MOST_STEPS):
            raise InvalidRequestError(f"steps is {steps!r}, expected a whole number from 1 to {_MOST_STEPS}")
        if guidance is not None and not 0 <= guidance <= _MOST_GUIDANCE:  # also when it is NaN
            raise InvalidRequestError(
                f"guidance is {guidance}, expected 0 to {_MOST_GUIDANCE} (7.5 is usual, 1 is none)"
            )
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise InvalidRequestError(f"unknown sampler {self.sampler!r}; known samplers: {', '.join(SAMPLERS)}")


@dataclass(frozen=True)
class BuiltEngine:
    """A compiled engine that a build made or found.

    Attributes:
        record: Its record in the bundle.
        reused: Whether it was there already.
    """

    record: EngineRecord
    reused: bool


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Attributes:
        path: The bundle.
        exported: Graphs that were exported, relative to the bundle; empty where all were there already.
        quality: PSNR in dB of each exported graph against torch, by graph.
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
    source = Source.open(request.source)
    sdks = {name: load_sdk(name) for name in dict.fromkeys(request.engines) if name in SDK_MODULES}
    for sdk in sdks.values():
        build_target(sdk, request.options)
    ranges = _ranges(request, source)
    defaults = _defaults(request, source)
    compile_plan(defaults.sampler, source.scheduler, defaults.steps)  # refuses what no request could use
    forms = list(dict.fromkeys(form_for(engine, request.precision) for engine in request.engines))
    bundle, exported = _export(request, source, forms, reporter)
    engines = tuple(
        _compile(bundle, name, form_for(sdk_name, request.precision), sdk, ranges[name], request.options, reporter)
        for sdk_name, sdk in sdks.items()
        for name in NAMES
    )
    quality = {graph: bundle.manifest.quality[graph] for graph in exported if graph in bundle.manifest.quality}
    return BuildReport(bundle.path, exported, quality, engines, time.perf_counter() - start)


def tool_versions() -> dict[str, str]:
    """Versions of what decides an export."""
    return {"python": platform.python_version(), **{tool: importlib.metadata.version(tool) for tool in _TOOLS}}


def _export(
    request: BuildRequest, source: Source, forms: Sequence[Form], reporter: Reporter
) -> tuple[Bundle, tuple[str, ...]]:
    """Bring the bundle at ``request.output`` to hold all ``forms``; graphs that it has already are kept."""
    older = _same_source(request, source)
    kept = {name: dict(older.manifest.components[name].graphs) if older else {} for name in NAMES}
    quality = dict(older.manifest.quality) if older else {}
    missing = [
        (name, form)
        for name in NAMES
        for form in forms
        if form.name not in kept[name] or (request.verify and kept[name][form.name].file not in quality)
    ]
    defaults = _defaults(request, source, older.manifest.defaults if older else None)
    origin = m.Source(source.name, source.licence, source.fingerprint)
    if older and not missing and older.manifest.defaults == defaults and older.manifest.source == origin:
        reporter.stage("ONNX graphs")
        reporter.result("already exported from this source")
        return older, ()
    if older is None and (request.output / m.MANIFEST_FILE).exists():
        reporter.stage(f"{request.output.name}: older bundle")
        reporter.result("from another source or other tool versions, or damaged; replaced together with its engines")
    exported: list[str] = []
    with write_bundle(request.output) as writer:
        if older:
            for relative in older.manifest.files:
                target = writer.directory / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(older.file(relative), target)
            _carry_engines(older, writer.directory / m.ENGINES_DIRECTORY)
        tokenizer = _write_tokenizer(source, writer.directory)
        if missing:  # all weights are read once, so that damage in the last does not show after the first is exported
            for part in source.configs:
                source.load(part)
        for name in NAMES:
            wanted = [form for each, form in missing if each == name]
            if wanted:
                graphs = _export_component(source, name, wanted, writer.directory, request.verify, quality, reporter)
                exported += [graph.file for graph in graphs.values()]
                kept[name] |= graphs
        writer.commit(
            m.Manifest(
                format_version=m.FORMAT_VERSION,
                family=source.family,
                prediction_type=str(source.scheduler.get("prediction_type", "epsilon")),
                components={name: m.Component(name, graphs) for name, graphs in kept.items()},
                files={},
                latent=_latent(source),
                tokenizers={"tokenizer": tokenizer},
                scheduler=source.scheduler,
                defaults=defaults,
                source=origin,
                tools=tool_versions(),
                quality=quality,
            )
        )
    return Bundle.open(request.output), tuple(exported)


def _same_source(request: BuildRequest, source: Source) -> Bundle | None:
    """The bundle at the output, if it was exported from this very source with these very tools and is whole."""
    try:
        older = Bundle.open(request.output, verify_hash=True)
    except (BundleError, OSError):
        return None
    known = older.manifest.source.fingerprint == source.fingerprint and older.manifest.tools == tool_versions()
    complete = set(NAMES) <= set(older.manifest.components)
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


def _export_component(
    source: Source,
    name: str,
    forms: Sequence[Form],
    directory: Path,
    verify: bool,
    quality: dict[str, float],
    reporter: Reporter,
) -> dict[str, m.Graph]:
    component = load_component(source, name)
    graphs: dict[str, m.Graph] = {}
    for form in forms:
        reporter.stage(f"{name}: ONNX, opset {form.opset}, {form.precision}")
        start = time.perf_counter()
        exported, note = form, ""
        if form.precision == "fp16" and (layer := overflows(component)):
            exported, note = Form(form.opset, "fp32"), f"; kept in fp32, since {layer} leaves the range of fp16"
        graph = export_component(component, exported, directory)
        path = directory / graph.file
        parts = [f"{parameter_count(component.module) / 1e6:.1f} M parameters", f"{path.stat().st_size / 1e6:.1f} MB"]
        if verify:
            with OnnxRuntimeEngine(path, label=name) as engine:
                check = check_component(component, engine, graph.precision)
            quality[graph.file] = round(min(check.psnr, 999.0), 2)
            parts.append(f"{check.psnr:.1f} dB against torch")
        graphs[form.name] = graph  # under the form that was asked for; the graph says what it is
        reporter.result(f"{', '.join(parts)}, {time.perf_counter() - start:.1f} s{note}")
    return graphs


def _write_tokenizer(source: Source, directory: Path) -> m.Tokenizer:
    tokenizer = source.load_tokenizer()
    (directory / "tokenizer").mkdir(exist_ok=True)
    # Its own method to save reports a full disk as a bare Exception.
    (directory / "tokenizer" / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    positions = int(source.configs["text_encoder"].get("max_position_embeddings", 77))
    length = min(positions, int(tokenizer.model_max_length))
    return m.Tokenizer("tokenizer", length, int(tokenizer.pad_token_id))


def _latent(source: Source) -> m.Latent:
    vae = source.configs["vae"]
    return m.Latent(
        channels=int(vae.get("latent_channels", 4)),
        factor=latent_factor(source),
        scaling=float(vae.get("scaling_factor", 0.18215)),
        shift=float(vae.get("shift_factor") or 0.0),
    )


def _defaults(request: BuildRequest, source: Source, older: m.Defaults | None = None) -> m.Defaults:
    """What a request that names nothing gets: as asked for, else as ``older`` has it, else as is usual."""
    side = source.configs["unet"].get("sample_size") or 64
    height, width = (side, side) if isinstance(side, int) else side
    factor = latent_factor(source)
    usual = older or m.Defaults(
        default_sampler(source.scheduler), 20, 7.5, width * factor, height * factor, clip_skip=0
    )
    return dataclasses.replace(
        usual,
        sampler=request.sampler or usual.sampler,
        steps=usual.steps if request.steps is None else request.steps,
        guidance=usual.guidance if request.guidance is None else request.guidance,
    )


def _ranges(request: BuildRequest, source: Source) -> dict[str, dict[str, Range]]:
    """Ranges of every symbol of every component. Under guidance the denoiser runs two rows a picture."""
    defaults, factor = _defaults(request, source), latent_factor(source)
    pictures = request.ranges.get("batch", Range.fixed(1))
    pixels = {
        "height": request.ranges.get("height", Range.fixed(defaults.height)),
        "width": request.ranges.get("width", Range.fixed(defaults.width)),
    }
    latents = {}
    for axis, size in pixels.items():
        try:
            latents[f"latent_{axis}"] = size.divided_by(factor)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{axis}: {error}, the pixels of a latent") from None
    both_halves = Range(pictures.min, 2 * pictures.opt, 2 * pictures.max)
    return {
        "text_encoder": {"batch": Range(1, 2, 2)},
        "unet": {"batch": both_halves, **latents},
        "vae_decoder": {"batch": pictures, **latents},
        "vae_encoder": {"batch": pictures, **pixels},
    }


def _compile(
    bundle: Bundle,
    name: str,
    form: Form,
    sdk: Sdk,
    ranges: Mapping[str, Range],
    options: BuildOptions,
    reporter: Reporter,
) -> BuiltEngine:
    """Compile one component, or find it compiled."""
    graph = bundle.manifest.components[name].graphs[form.name]
    profile = Profile.of(graph.inputs, ranges)
    target = build_target(sdk, options)
    files = bundle.manifest.files
    key = engine_key(
        graph=files[graph.file].sha256,
        weights={file: files[file].sha256 for file in graph.external},
        engine=sdk.name,
        sdk=SDK_MODULES[sdk.name],
        sdk_version=sdk.version,
        precision=graph.precision,
        profile=profile.as_shapes(),
        flags=options.as_flags(),
        target=target,
    )
    reporter.stage(f"{name}: {sdk.title} plan, {graph.precision}")
    store = EngineStore(bundle.engines_directory)
    if record := store.find(key, repair=True):
        reporter.result(f"already built ({key})")
        return BuiltEngine(record, reused=True)
    path = bundle.graph_path(name, form.name)
    record = store.add(
        key,
        lambda plan: build_plan(sdk, path, plan, profile, options=options, on_progress=reporter.progress),
        engine=sdk.name,
        component=name,
        file=f"{name}.plan",
        precision=graph.precision,
        profile=profile.as_shapes(),
        sdk=SDK_MODULES[sdk.name],
        sdk_version=sdk.version,
        target=target,
    )
    reporter.result(f"{record.size / 1e6:.1f} MB, {record.built_seconds:.1f} s ({key})")
    return BuiltEngine(record, reused=False)


def verify_bundle(bundle: Bundle, source: Source, reporter: Reporter | None = None) -> dict[str, float]:
    """Compare every graph of a bundle with the source that it should come from.

    Returns:
        PSNR in dB by graph.

    Raises:
        BundleError: if the bundle comes from another source.
        VerificationError: if a graph falls below the gate of its precision.
    """
    reporter = reporter or Silent()
    if bundle.manifest.source.fingerprint != source.fingerprint:
        raise BundleError(
            f"{bundle.path.name} was not built from {source.name}: the fingerprints of the weights differ"
        )
    figures: dict[str, float] = {}
    for name, entry in bundle.manifest.components.items():
        component = load_component(source, name)
        for form, graph in entry.graphs.items():
            reporter.stage(f"{name}: {form}")
            with OnnxRuntimeEngine(bundle.graph_path(name, form), label=name) as engine:
                check = check_component(component, engine, graph.precision)
            figures[graph.file] = check.psnr
            reporter.result(f"{check.psnr:.1f} dB")
    return figures
