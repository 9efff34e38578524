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
from latentrt.engines.store import RECORD_NAME, EngineRecord, EngineStore, engine_key
from latentrt.engines.trt import SDK_MODULES, BuildOptions, Profile, Range, Sdk, build_plan, build_target, load_sdk
from latentrt.runtime import manifest as m
from latentrt.runtime.bundle import Bundle, write_bundle
from latentrt.runtime.loop import TIMESTEPS_AT_ONCE
from latentrt.runtime.request import MAX_SIDE
from latentrt.runtime.samplers import SAMPLERS, default_sampler

from .adoption import adopt
from .calibration import Calibration
from .construction import Construction, loaded_as, picture_key
from .controlnet import ControlNetFile, control_ranges, with_controlnets
from .graph_folders import GraphFolders
from .ip_adapter import IpAdapterFiles, with_ip_adapter
from .lora import LoraFile, with_loras
from .progress import Reporter, Silent
from .reduce import Quantization
from .safety_checker import with_safety_checker
from .source import Reading, Source
from .targets import PORTABLE, TARGETS, Form, exported_form, form_for
from .tiny_vae import with_tiny_vae

_TOOLS = ("latentrt", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "numpy")
_LONGEST = {"batch": 4096, "height": MAX_SIDE, "width": MAX_SIDE}
_MOST_STEPS, _MOST_GUIDANCE = 10_000, 1000  # what a manifest takes
_MOST_REGISTERS = 8  # the sampler with the longest history, PNDM with its Runge-Kutta start, has 6


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        source: A diffusers directory, a single-file checkpoint, or the name of a model on a hub.
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
        guidance: Guidance scale that the bundle uses by default; ``None`` likewise, or that of the family.
        sampler: Sampler that the bundle uses by default; ``None`` likewise, or the one of the source's scheduler.
        calibration: What is drawn for a reduced precision, to learn ranges and to compare pictures. ``None`` draws
            nothing: values of fp16 are kept in range on example inputs alone. It goes with fp16 and bf16 that are not
            compared, for models that cannot be run here.
        quantization: How the layers are chosen that are computed in 8 bits.
        accept_quality: Keep a reduced precision whose pictures are below the gate.
        loras: LoRAs to fuse into the weights, one after the other.
        tiny_vae: A directory of diffusers' AutoencoderTiny, whose decoder the bundle gets beside the model's own.
        controlnets: Directories of diffusers' ControlNetModel, and what requests call them.
        ip_adapter: An IP-Adapter and its image encoder.
        safety_checker: A directory of diffusers' StableDiffusionSafetyChecker, or of a model that has one, for requests
            that want their pictures checked.
        reading: What the source does not say itself.
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
    calibration: Calibration | None = field(default_factory=Calibration)
    quantization: Quantization = field(default_factory=Quantization)
    accept_quality: bool = False
    loras: Sequence[LoraFile] = ()
    tiny_vae: Path | None = None
    controlnets: Sequence[ControlNetFile] = ()
    ip_adapter: IpAdapterFiles | None = None
    safety_checker: Path | None = None
    reading: Reading = field(default_factory=Reading)

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
        if self.calibration is None and self.precision not in ("fp32", "fp16", "bf16"):
            raise InvalidRequestError(
                f"{self.precision} learns its ranges from pictures; calibrate, or take fp16 or bf16"
            )
        if self.calibration is None and self.precision != "fp32" and self.verify:
            raise InvalidRequestError(
                "without calibration no pictures are drawn that could be compared with those of fp32; "
                "calibrate, or do not verify"
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
    source = with_loras(Source.open(request.source, request.reading), request.loras)
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
    ranges = _ranges(request, source)
    defaults = _defaults(request, source)
    source.family.compile_plan(source.scheduler, defaults.sampler, defaults.steps)  # refuses what no request could use
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


def _adopt(
    request: BuildRequest, source: Source, folders: GraphFolders, reporter: Reporter, start: float
) -> BuildReport:
    """Take over graphs that were exported elsewhere."""
    if compiled := [engine for engine in request.engines if engine in SDK_MODULES]:
        raise InvalidRequestError(
            f"{source.name} holds graphs that were exported elsewhere, of which no plans for {compiled[0]} are built; "
            "build from the model's weights"
        )
    defaults = _defaults(request, source)
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


def _to_compile(bundle: Bundle) -> list[str]:
    """Components that a compiled engine is of use for: of what has stages these rather than the whole."""
    there = bundle.manifest.components
    return [name for name in there if f"{name}_{m.STAGES[-1]}" not in there]


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
    defaults = _defaults(request, source, older.manifest.defaults if older else None)
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


def _defaults(request: BuildRequest, source: Source, older: m.Defaults | None = None) -> m.Defaults:
    """What a request that names nothing gets: as asked for, else as ``older`` has it, else as is usual."""
    family = source.family
    width, height = family.size(source)
    steps, guidance = family.usual(source)
    usual = older or m.Defaults(default_sampler(source.scheduler), steps, guidance, width, height, clip_skip=0)
    return dataclasses.replace(
        usual,
        sampler=request.sampler or usual.sampler,
        steps=usual.steps if request.steps is None else request.steps,
        guidance=usual.guidance if request.guidance is None else request.guidance,
    )


def _ranges(request: BuildRequest, source: Source) -> dict[str, dict[str, Range]]:
    """Ranges of every symbol of every component. Under guidance the denoiser runs two rows a picture."""
    defaults, family = _defaults(request, source), source.family
    factor, unit, halves = family.latent(source).factor, family.unit(source), _halves(source)
    pictures = request.ranges.get("batch", Range.fixed(1))
    pixels = {
        "height": request.ranges.get("height", Range.fixed(defaults.height)),
        "width": request.ranges.get("width", Range.fixed(defaults.width)),
    }
    latents = {}
    for axis, size in pixels.items():
        try:
            size.divided_by(unit)
        except InvalidRequestError as error:
            patch = "of a latent" if unit == factor else "of a patch"
            raise InvalidRequestError(f"{axis}: {error}, the pixels {patch}") from None
        latents[f"latent_{axis}"] = size.divided_by(factor)
    both_halves = Range(pictures.min, halves * pictures.opt, halves * pictures.max)
    registers = {"registers": Range(1, 2, _MOST_REGISTERS), "terms": Range(3, 4, _MOST_REGISTERS + 2)}
    prompt, schedule, step = family.stages()
    # With vectors of the conditioning in it, the schedule differs between the halves.
    timesteps = min(defaults.steps * (halves if family.vectors else 1), TIMESTEPS_AT_ONCE)
    ranges: dict[str, dict[str, Range]] = {
        **{part.encoder: {"batch": Range.fixed(1)} for part in family.tokenizers.values()},  # texts come one by one
        family.denoiser: {"batch": both_halves, **latents},
        prompt: {"batch": Range.fixed(1)},
        schedule: {"batch": Range(1, timesteps, TIMESTEPS_AT_ONCE)},
        step: {"batch": pictures, "rows": both_halves, **registers, **latents},
        "vae_decoder": {"batch": pictures, **latents},
        m.TINY_DECODER: {"batch": pictures, **latents},
        "vae_encoder": {"batch": pictures, **pixels},
        m.IMAGE_ENCODER: {"batch": Range.fixed(1)},
        m.SAFETY_CHECKER: {"batch": Range.fixed(1)},  # pictures are looked at one by one
    }
    if source.controlnets:
        ranges |= control_ranges(source, ranges, pixels)
    return {name: {**symbols, **family.lengths(source)} for name, symbols in ranges.items()}


def _halves(source: Source) -> int:
    """Rows of the denoiser for a picture: two where guidance comes from two predictions."""
    return 2 if source.family.settings(source)["guidance"] == "classifier-free" else 1


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
        lambda plan: build_plan(
            sdk,
            path,
            plan,
            profile,
            options=options,
            on_progress=reporter.progress,
            timing_cache=store.root / f"{sdk.name}-{target}.timings",
        ),
        engine=sdk.name,
        component=name,
        file=f"{name}.plan",
        precision=graph.precision,
        profile=profile.as_shapes(),
        sdk=SDK_MODULES[sdk.name],
        sdk_version=sdk.version,
        target=target,
        flags=options.as_flags(),
    )
    reporter.result(f"{record.size / 1e6:.1f} MB, {record.built_seconds:.1f} s ({key})")
    return BuiltEngine(record, reused=False)
