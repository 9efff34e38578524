"""Compiling components to TensorRT plans, and the ranges of sizes that a plan takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from latentrt.engines.errors import InvalidRequestError
from latentrt.engines.records import EngineRecord, engine_key
from latentrt.engines.store import EngineStore
from latentrt.engines.trt import SDK_MODULES, BuildOptions, Profile, Range, Sdk, build_plan, build_target
from latentrt.runtime.bundle import manifest as m
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.denoising.schedule_stage import TIMESTEPS_AT_ONCE

from ..graphs.targets import Form
from ..model import Model
from ..progress import Reporter
from .request import BuildRequest, defaults_of

_MOST_REGISTERS = 8  # the sampler with the longest history, PNDM with its Runge-Kutta start, has 6


@dataclass(frozen=True)
class BuiltEngine:
    """A compiled engine that a build made or found.

    Attributes:
        record: Its record in the bundle.
        reused: Whether it was there already.
    """

    record: EngineRecord
    reused: bool


def components_to_compile(bundle: Bundle) -> list[str]:
    """Components that are compiled: all but those that are split, of which the stages are."""
    there = bundle.manifest.components
    return [name for name in there if f"{name}_{m.STAGES[-1]}" not in there]


def profile_ranges(request: BuildRequest, model: Model) -> dict[str, dict[str, Range]]:
    """Ranges of every symbol of every component that is compiled, by component.

    Under classifier-free guidance the denoiser runs two rows an image, one without the prompt.

    Raises:
        InvalidRequestError: if a side is no multiple of what the model's sides are multiples of.
    """
    defaults, family = defaults_of(request, model.source), model.family
    halves = 2 if family.settings(model)["guidance"] == "classifier-free" else 1
    images = request.ranges.get("batch", Range.fixed(1))
    pixels = {
        "height": request.ranges.get("height", Range.fixed(defaults.height)),
        "width": request.ranges.get("width", Range.fixed(defaults.width)),
    }
    latents = _latent_ranges(model, pixels)
    both_halves = Range(images.min, halves * images.opt, halves * images.max)
    registers = {"registers": Range(1, 2, _MOST_REGISTERS), "terms": Range(3, 4, _MOST_REGISTERS + 2)}
    prompt, schedule, step = family.stages()
    # With vectors of the conditioning in it, the schedule differs between the halves.
    timesteps = min(defaults.steps * (halves if family.vectors else 1), TIMESTEPS_AT_ONCE)
    ranges: dict[str, Mapping[str, Range]] = {
        # Prompts are encoded one by one.
        **{part.encoder: {"batch": Range.fixed(1)} for part in family.tokenizers.values()},
        family.denoiser: {"batch": both_halves, **latents},
        prompt: {"batch": Range.fixed(1)},
        schedule: {"batch": Range(1, timesteps, TIMESTEPS_AT_ONCE)},
        step: {"batch": images, "rows": both_halves, **registers, **latents},
        "vae_decoder": {"batch": images, **latents},
        "vae_encoder": {"batch": images, **pixels},
    }
    plain = dict(ranges)
    for adapter in model.adapters:
        ranges |= adapter.ranges(plain)
    lengths = family.lengths(model)
    return {name: {**symbols, **lengths} for name, symbols in ranges.items()}


def _latent_ranges(model: Model, pixels: Mapping[str, Range]) -> dict[str, Range]:
    """Ranges of the latents' sides for those of an image."""
    factor, multiple = model.family.latent(model).vae_scale_factor, model.family.size_multiple(model)
    latents = {}
    for axis, size in pixels.items():
        try:
            size.divided_by(multiple)
        except InvalidRequestError as error:
            patch = "of a latent" if multiple == factor else "of a patch"
            raise InvalidRequestError(f"{axis}: {error}, the pixels {patch}") from None
        latents[f"latent_{axis}"] = size.divided_by(factor)
    return latents


def compile_component(
    bundle: Bundle,
    name: str,
    form: Form,
    sdk: Sdk,
    ranges: Mapping[str, Range],
    options: BuildOptions,
    reporter: Reporter,
) -> BuiltEngine:
    """Compile one component, or find it compiled.

    Args:
        bundle: It has the component's graph, and gets the engine.
        name: The component.
        form: Which of its graphs to compile.
        sdk: TensorRT, or TensorRT for RTX.
        ranges: Lengths of every symbol of the graph.
        options: Settings of the build.
        reporter: Receives the progress.

    Raises:
        EngineError: if the graph cannot be compiled.
        OutputError: if the engine cannot be written.
    """
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
