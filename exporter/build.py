"""From a source to a bundle with its engines: what ``latentrt build-engine`` does."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from latentrt.engines.errors import BundleError, InvalidRequestError
from latentrt.engines.onnxrt import OnnxRuntimeEngine
from latentrt.engines.store import RECORD_NAME, EngineRecord, EngineStore, engine_key
from latentrt.engines.trt import SDK_MODULES, BuildOptions, Profile, Range, Sdk, build_plan, build_target, load_sdk
from latentrt.runtime import manifest as m
from latentrt.runtime.bundle import Bundle, write_bundle
from latentrt.runtime.loop import TIMESTEPS_AT_ONCE
from latentrt.runtime.request import MAX_SIDE
from latentrt.runtime.samplers import SAMPLERS, compile_plan, default_sampler

from .calibration import Calibration
from .components import ALL, NAMES, STAGES, Component, latent_factor, load_component
from .emulate import EmulatedEngine, widened_copy
from .onnx_export import cast_inputs, export_component, parameter_count
from .progress import Reporter, Silent
from .quality import compare_engine, require
from .reduce import STEP, Quantization, describe, keep_in_fp32, out_of_range, quantize_step, ranges_of_pictures
from .source import Source
from .stages import export_stages
from .targets import PORTABLE, TARGETS, Form, exported_form, form_for
from .verify import check_component, check_stages, heavy_weight

_TOOLS = ("latentrt", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "numpy")
_LONGEST = {"batch": 4096, "height": MAX_SIDE, "width": MAX_SIDE}
_MOST_STEPS, _MOST_GUIDANCE = 10_000, 1000  # what a manifest takes
_MOST_REGISTERS = 8  # the sampler with the longest history, PNDM with its Runge-Kutta start, has 6


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        source: A diffusers directory.
        output: The bundle's directory; a bundle that is there already is replaced, or extended if it comes from the
            same source.
        engines: Engines to build for, keys of :data:`latentrt.exporter.targets.TARGETS`.
        precision: One of :data:`latentrt.exporter.targets.PRECISIONS` that all of the engines have.
        ranges: Lengths that compiled engines are built for: ``batch`` (pictures), ``height`` and ``width`` (pixels).
            What is left out is one picture of the model's own size.
        verify: Compare every exported component with torch, and pictures of reduced precision with those of fp32.
        options: Settings of TensorRT builds.
        steps: Sampler steps that the bundle uses by default; ``None`` keeps those of a bundle that is extended, or
            takes 20.
        guidance: Guidance scale that the bundle uses by default; ``None`` likewise, or 7.5.
        sampler: Sampler that the bundle uses by default; ``None`` likewise, or the one of the source's scheduler.
        calibration: What is drawn for a reduced precision, to learn ranges and to compare pictures.
        quantization: How the layers are chosen that are computed in 8 bits.
        accept_quality: Keep a reduced precision whose pictures are below the gate.
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
    calibration: Calibration = field(default_factory=Calibration)
    quantization: Quantization = field(default_factory=Quantization)
    accept_quality: bool = False

    def __post_init__(self) -> None:
        if not self.engines:
            raise InvalidRequestError(f"no engine is named; known engines: {', '.join(TARGETS)}")
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
        for name in _to_compile(bundle)
    )
    pictures = tuple(f"pictures/{engine}/{request.precision}/" for engine in request.engines)
    quality = {
        name: value for name, value in bundle.manifest.quality.items() if name in exported or name.startswith(pictures)
    }
    return BuildReport(bundle.path, exported, quality, engines, time.perf_counter() - start)


def _to_compile(bundle: Bundle) -> list[str]:
    """Components that a compiled engine is of use for: of a denoiser its stages rather than the whole."""
    split = {whole for whole, stages in STAGES.items() if stages[-1] in bundle.manifest.components}
    return [name for name in bundle.manifest.components if name not in split]


def tool_versions() -> dict[str, str]:
    """Versions of what decides an export."""
    return {"python": platform.python_version(), **{tool: importlib.metadata.version(tool) for tool in _TOOLS}}


def _export(
    request: BuildRequest, source: Source, forms: Sequence[Form], reporter: Reporter
) -> tuple[Bundle, tuple[str, ...]]:
    """Bring the bundle at ``request.output`` to hold all ``forms``; graphs that it has already are kept."""
    older = _same_source(request, source)
    found = older.manifest.components if older else {}
    kept = {part: dict(found[part].graphs) if part in found else {} for part in ALL}
    quality = dict(older.manifest.quality) if older else {}
    unjudged = [
        engine
        for engine in dict.fromkeys(request.engines)
        if request.precision != "fp32" and request.verify and picture_key(engine, request.precision) not in quality
    ]
    wanted = list(dict.fromkeys(map(exported_form, forms)))
    # Pictures are compared with those of fp32, which are then needed for this build alone.
    exports = list(dict.fromkeys([*wanted, *([PORTABLE] if unjudged else [])]))
    unquantized = [form for form in forms if form.quantized and form.name not in kept[STEP]]

    def lacks(part: str, form: Form) -> bool:
        return form.name not in kept[part] or (request.verify and kept[part][form.name].file not in quality)

    missing = [
        (name, form)
        for name in NAMES
        for form in exports
        if lacks(name, form) or (name in STAGES and lacks(STAGES[name][-1], form))
    ]
    defaults = _defaults(request, source, older.manifest.defaults if older else None)
    origin = m.Source(source.name, source.licence, source.fingerprint)
    if (
        older
        and not (missing or unquantized or unjudged)
        and older.manifest.defaults == defaults
        and older.manifest.source == origin
    ):
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
            lacking = [form for each, form in missing if each == name]
            if lacking:
                new = _export_component(source, name, lacking, writer.directory, request.verify, quality, reporter)
                exported += [graph.file for graphs in new.values() for graph in graphs.values()]
                for part, graphs in new.items():
                    kept[part] |= graphs

        def manifest() -> m.Manifest:
            return m.Manifest(
                format_version=m.FORMAT_VERSION,
                family=source.family,
                prediction_type=str(source.scheduler.get("prediction_type", "epsilon")),
                components={name: m.Component(name, graphs) for name, graphs in kept.items() if graphs},
                files={},
                latent=_latent(source),
                tokenizers={"tokenizer": tokenizer},
                scheduler=source.scheduler,
                defaults=defaults,
                source=origin,
                tools=tool_versions(),
                quality=quality,
            )

        size = _picture_size(request)
        for form in dict.fromkeys(form for _, form in missing if form.precision == "fp16"):
            _widen_where_needed(source, writer.preview(manifest()), form, request, size, kept, quality, reporter)
        for form in unquantized:
            exported.append(_quantize(writer.preview(manifest()), form, request, size, kept, quality, reporter))
        for engine in unjudged:
            _judge(writer.preview(manifest()), engine, request, size, quality, reporter)
        if PORTABLE not in wanted and not (older and PORTABLE.name in older.manifest.components[STEP].graphs):
            exported = [file for file in exported if file not in _drop(PORTABLE, kept, quality, writer.directory)]
        writer.commit(manifest())
    return Bundle.open(request.output), tuple(exported)


def picture_key(engine: str, precision: str) -> str:
    """Where a manifest's ``quality`` has the PSNR in dB of pictures that an engine draws in a reduced precision."""
    return f"pictures/{engine}/{precision}/psnr_db"


def _picture_size(request: BuildRequest) -> dict[str, int | None]:
    """Width and height in pixels to calibrate with: those that engines are tuned for."""
    return {name: request.ranges[name].opt if name in request.ranges else None for name in ("width", "height")}


def _widen_where_needed(
    source: Source,
    bundle: Bundle,
    form: Form,
    request: BuildRequest,
    size: Mapping[str, int | None],
    kept: dict[str, dict[str, m.Graph]],
    quality: dict[str, float],
    reporter: Reporter,
) -> None:
    """Keep in fp32 what leaves the range of fp16 while pictures are drawn; a denoiser is then split again."""
    reporter.stage(f"{form.precision}, opset {form.opset}: ranges over {len(request.calibration.prompts)} pictures")
    found = ranges_of_pictures(bundle, form, request.calibration, **size)
    told = []
    for name in NAMES:
        values = {
            value: reached for part in (name, *STAGES.get(name, ())) for value, reached in found.get(part, {}).items()
        }
        if not values:
            continue
        nodes = keep_in_fp32(bundle.path / kept[name][form.name].file, values)
        told.append(f"{nodes} operators of {name} kept in fp32, where values reach {max(values.values()):.0f}")
        component = load_component(source, name)
        exported = Form(form.opset, kept[name][form.name].precision)
        for part, graph in _stages(
            component, kept[name][form.name], exported, bundle.path, request.verify, quality
        ).items():
            kept[part][form.name] = graph
    reporter.result("; ".join(told) or "all values stay within half of what fp16 holds")


def _quantize(
    bundle: Bundle,
    form: Form,
    request: BuildRequest,
    size: Mapping[str, int | None],
    kept: dict[str, dict[str, m.Graph]],
    quality: dict[str, float],
    reporter: Reporter,
) -> str:
    """Quantise the denoiser's step; every other component serves the new form as it is. Returns the graph's file."""
    base = exported_form(form)
    reporter.stage(f"{STEP}: {form.precision}, opset {form.opset}, the rest {base.precision}")
    start = time.perf_counter()
    quantized = quantize_step(bundle, form, request.calibration, request.quantization, **size)
    for part, graphs in kept.items():
        if part not in STAGES and base.name in graphs:  # a whole denoiser is not quantised
            graphs[form.name] = graphs[base.name]
    kept[STEP][form.name] = quantized.graph
    quality[quantized.graph.file] = round(min(quantized.psnr, 999.0), 2)
    reporter.result(f"{describe(quantized)}, {time.perf_counter() - start:.1f} s")
    return quantized.graph.file


def _judge(
    bundle: Bundle,
    engine: str,
    request: BuildRequest,
    size: Mapping[str, int | None],
    quality: dict[str, float],
    reporter: Reporter,
) -> None:
    """Compare pictures of a reduced precision with those of fp32.

    Raises:
        VerificationError: if they are below the gate, and that is not accepted.
    """
    precision = request.precision
    reporter.stage(f"{engine}, {precision}: pictures against fp32")
    start = time.perf_counter()
    judged = compare_engine(bundle, engine, precision, request.calibration, **size)
    if not request.accept_quality:
        require(judged.pictures, precision, engine)
    prefix = picture_key(engine, precision).removesuffix("psnr_db")
    quality[f"{prefix}psnr_db"] = round(judged.pictures.psnr, 2)
    quality[f"{prefix}worst_db"] = round(judged.pictures.worst, 2)
    quality[f"{prefix}ssim"] = round(judged.pictures.ssim, 4)
    reporter.result(f"{judged}, {time.perf_counter() - start:.1f} s")


def _drop(form: Form, kept: dict[str, dict[str, m.Graph]], quality: dict[str, float], directory: Path) -> set[str]:
    """Take a form out of a bundle under construction. Returns the graphs' files."""
    dropped = [graphs.pop(form.name) for graphs in kept.values() if form.name in graphs]
    used = {file for graphs in kept.values() for graph in graphs.values() for file in (graph.file, *graph.external)}
    for file in {file for graph in dropped for file in (graph.file, *graph.external)} - used:
        (directory / file).unlink()
        quality.pop(file, None)
    return {graph.file for graph in dropped} - used


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
) -> dict[str, dict[str, m.Graph]]:
    """Graphs by component and form: those of the component itself, and those of its stages where it has some."""
    component = load_component(source, name)
    graphs: dict[str, dict[str, m.Graph]] = {name: {}}
    for form in forms:
        reporter.stage(f"{name}: ONNX, opset {form.opset}, {form.precision}")
        start = time.perf_counter()
        exported, notes = form, []
        if form.precision == "fp16" and (weight := heavy_weight(component)):
            exported = Form(form.opset, "fp32")
            notes.append(f"kept in fp32, since {weight} leaves the range of fp16")
        graph = export_component(component, exported, directory)
        if graph.precision == "fp16":
            example = {n: t.numpy() for n, t in cast_inputs(component, component.example, "fp32").items()}
            if large := out_of_range(directory / graph.file, [example]):
                nodes = keep_in_fp32(directory / graph.file, large)
                notes.append(f"{nodes} operators kept in fp32, where values reach {max(large.values()):.0f}")
        size = sum((directory / file).stat().st_size for file in (graph.file, *graph.external))
        parts = [f"{parameter_count(component.module) / 1e6:.1f} M parameters", f"{size / 1e6:.1f} MB"]
        if verify:
            quality[graph.file] = _check_graph(component, graph, directory)
            parts.append(f"{quality[graph.file]:.1f} dB against torch")
        graphs[name][form.name] = graph  # under the form that was asked for; the graph says what it is
        reporter.result("; ".join([f"{', '.join(parts)}, {time.perf_counter() - start:.1f} s", *notes]))
        if component.roles:
            reporter.stage(f"{name}: stages of the loop")
            start = time.perf_counter()
            stages = _stages(component, graph, exported, directory, verify, quality)
            told = [f"{len(stage.outputs)} tensors from {part}" for part, stage in stages.items()][:-1]
            if verify:
                told.append(f"{quality[next(iter(stages.values())).file]:.1f} dB against torch")
            for part, stage in stages.items():
                graphs.setdefault(part, {})[form.name] = stage
            reporter.result(f"{', '.join(told)}, {time.perf_counter() - start:.1f} s")
    return graphs


def _stages(
    component: Component, graph: m.Graph, form: Form, directory: Path, verify: bool, quality: dict[str, float]
) -> dict[str, m.Graph]:
    """Stages of a component, none if it is no denoiser; ``quality`` gains what they agree to with torch."""
    if component.roles is None:
        return {}
    stages = export_stages(component, graph, form, directory)
    if verify:
        psnr = round(min(_check_stages(component, stages, directory), 999.0), 2)
        quality |= {stage.file: psnr for stage in stages.values()}
    return stages


def _check_graph(component: Component, graph: m.Graph, directory: Path) -> float:
    """PSNR in dB of a graph against torch; one of half precision is computed with all its roundings."""
    with (
        widened_copy(directory / graph.file, rounded=True) as copy,
        EmulatedEngine(copy, graph, component.name) as engine,
    ):
        return round(min(check_component(component, engine, graph.precision).psnr, 999.0), 2)


def _check_stages(component: Component, stages: Mapping[str, m.Graph], directory: Path) -> float:
    """PSNR in dB of a guided step through the stages of a denoiser, computed with all its roundings."""
    with ExitStack() as stack:
        engines = {}
        for part, stage in stages.items():
            copy = stack.enter_context(widened_copy(directory / stage.file, rounded=True))
            engines[part] = stack.enter_context(EmulatedEngine(copy, stage, part))
        return check_stages(component, engines, stages[f"{component.name}_step"].precision).psnr


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
    registers = {"registers": Range(1, 2, _MOST_REGISTERS), "terms": Range(3, 4, _MOST_REGISTERS + 2)}
    return {
        "text_encoder": {"batch": Range.fixed(1)},  # texts come one by one
        "unet": {"batch": both_halves, **latents},
        "unet_prompt": {"batch": Range.fixed(1)},
        "unet_schedule": {"batch": Range(1, min(defaults.steps, TIMESTEPS_AT_ONCE), TIMESTEPS_AT_ONCE)},
        "unet_step": {"batch": pictures, "rows": both_halves, **registers, **latents},
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
    components = bundle.manifest.components
    for name in NAMES:
        if name not in components:
            continue
        component = load_component(source, name)
        for form, graph in components[name].graphs.items():
            reporter.stage(f"{name}: {form}")
            with OnnxRuntimeEngine(bundle.graph_path(name, form), label=name) as engine:
                check = check_component(component, engine, graph.precision)
            figures[graph.file] = check.psnr
            reporter.result(f"{check.psnr:.1f} dB")
            stages = {
                part: components[part].graphs[form]
                for part in STAGES.get(name, ())
                if part in components and form in components[part].graphs
            }
            if f"{name}_step" in stages:
                reporter.stage(f"{name}: {form}, stages of the loop")
                for part in stages:
                    bundle.graph_path(part, form)  # looks into the graph before ONNX Runtime opens it
                psnr = _check_stages(component, stages, bundle.path)
                figures |= {stage.file: psnr for stage in stages.values()}
                reporter.result(f"{psnr:.1f} dB")
    return figures
