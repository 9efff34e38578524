"""``latentrt inspect``: show what a bundle holds."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.engines import TensorSpec
from latentrt.engines.base import nbytes
from latentrt.engines.store import EngineStore

from ..abilities import abilities as abilities_of
from ..bundle.manifest import STAGES, Manifest, controlled
from ..bundle.onnx_guard import summarize
from ..bundle.reader import Bundle
from ..families import family_of
from .console import print_json, size, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory that build-engine wrote")
    parser.add_argument("--verify-hash", action="store_true", help="hash every file of the bundle first")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print components, graphs and compiled engines."""
    bundle = Bundle.open(arguments.bundle, verify_hash=arguments.verify_hash)
    records = EngineStore(bundle.engines_directory).records(verify_hash=arguments.verify_hash)
    manifest = bundle.manifest
    family = family_of(manifest)
    abilities = abilities_of(bundle)
    denoiser = (family.denoiser, *family.stages())
    stages = _stages(bundle, denoiser)
    if arguments.json:
        content = {"bundle": str(bundle.path), "manifest": json.loads(manifest.to_json()), "abilities": abilities}
        engines = [dataclasses.asdict(record) for record in records]
        print_json({**content, "stages": [dataclasses.asdict(stage) for stage in stages], "engines": engines})
        return 0
    defaults, latent = manifest.defaults, manifest.latent
    print(f"{manifest.source.name}: {manifest.family}, {manifest.prediction_type}, licence {manifest.source.licence}")
    print(
        f"latents: {latent.channels} channels, 1/{latent.vae_scale_factor} of the image's size, "
        f"scaling {latent.scaling:.5g}; "
        f"default {defaults.width}x{defaults.height}, {defaults.sampler}, {defaults.steps} steps, "
        f"guidance {defaults.guidance:g}"
    )
    if adapters := manifest.source.adapters:
        print(f"fused: {', '.join(f'{each.name} times {each.scale:g}' for each in adapters)}")
    print(f"abilities: {', '.join(_abilities(abilities))}")
    sizes = abilities["sizes"]
    print(f"tasks: {' '.join(abilities['tasks'])}; loops: {' '.join(abilities['loops'])}")
    print(
        f"sizes: any multiples of {sizes['multiple']} up to {sizes['longest']} pixels a side, "
        f"{sizes['pixels']:,} pixels a request"
    )
    if controlnets := abilities["controlnets"]:
        print(f"ControlNets: {' '.join(controlnets)}")
    if abilities["ip_adapter"]:
        print("IP-Adapter: images may be part of prompts")
    if abilities["safety_checker"]:
        print("safety checker: unsafe images can be marked, or made black")
    print(f"samplers: {' '.join(abilities['samplers'])}")
    print(f"engines: {', '.join(' '.join((name, *found)) for name, found in abilities['engines'].items())}")
    if abilities["loops"] == ["plain"]:
        print(f"the {family.denoiser} has no stages: every step computes all of it, and guidance twice")
    counted: set[str] = set()  # stages share a file of weights
    graphs = []
    for component in manifest.components.values():
        for form, graph in component.graphs.items():
            files = {graph.file, *graph.external} - counted
            counted |= files
            quality = manifest.quality.get(graph.file)
            graphs.append(
                (
                    component.name,
                    form,
                    graph.precision,
                    size(sum(manifest.files[file].size for file in files)),
                    "not measured" if quality is None else f"{quality:.1f} dB",
                    _inputs(manifest, component.name, form, denoiser),
                )
            )
    print("\n" + table(("component", "form", "precision", "size", "against source", "inputs"), graphs))
    if images := _image_quality(manifest):
        print("\n" + table(("images of", "precision", "against fp32", "worst", "SSIM"), images))
    if stages:
        loop_header = ("the loop", "form", "nodes", "weights", "size", "hands over", "size a row")
        rows = [
            (s.component, s.form, f"{s.nodes:,}", f"{s.weights:,}", size(s.nbytes), _tensors(s), _row_size(s))
            for s in stages
        ]
        print("\n" + table(loop_header, rows))
    if records:
        engines_table = [
            (r.component, r.engine, r.sdk_version, r.precision, size(r.size), r.target, r.key, _profile(r.profile))
            for r in records
        ]
        header = ("component", "engine", "version", "precision", "size", "target", "key", "profile")
        print("\n" + table(header, engines_table))
    return 0


def _image_quality(manifest: Manifest) -> list[tuple[str, ...]]:
    """Rows that say how close the images of each engine of reduced precision were when the bundle was built."""
    rows: list[tuple[str, ...]] = []
    for key, psnr in sorted(manifest.quality.items()):
        kind, _, rest = key.partition("/")
        if kind == "pictures" and rest.endswith("/psnr_db"):
            engine, _, precision = rest.removesuffix("/psnr_db").rpartition("/")
            worst, ssim = (
                manifest.quality.get(f"pictures/{engine}/{precision}/{name}") for name in ("worst_db", "ssim")
            )
            others = ("" if worst is None else f"{worst:.1f} dB", "" if ssim is None else f"{ssim:.3f}")
            rows.append((engine, precision, f"{psnr:.1f} dB", *others))
    return rows


_OF_THEIR_OWN = (
    *("guidance", "options", "tasks", "controlnets", "ip_adapter", "safety_checker"),
    *("samplers", "sizes", "loops", "engines"),
)


def _abilities(abilities: Mapping[str, Any]) -> Iterator[str]:
    """The abilities of a bundle, in words."""
    yield f"guidance {abilities['guidance']}"
    if options := abilities["options"]:
        yield f"options {' '.join(options)}"
    for name, value in abilities.items():
        if name not in _OF_THEIR_OWN:
            yield f"{name.replace('_', ' ')}: {json.dumps(value)}"


def _inputs(manifest: Manifest, component: str, form: str, denoiser: Sequence[str]) -> str:
    """Inputs of a graph; those that a stage hands over are only counted."""
    inputs = manifest.components[component].graphs[form].inputs
    parts = []
    if component.endswith(f"_{STAGES[-1]}"):
        own = component.removesuffix(f"_{STAGES[-1]}")
        whole = denoiser[0] if own == controlled(denoiser[0]) else own  # whose other stages it shares
        for stage in (f"{whole}_{stage}" for stage in STAGES[:-1]):
            graphs = manifest.components[stage].graphs if stage in manifest.components else {}
            handed = {spec.name for spec in graphs[form].outputs} if form in graphs else set()
            if handed:
                parts.append(f"{len(handed)} tensors of {stage}")
                inputs = tuple(spec for spec in inputs if spec.name not in handed)
    return ", ".join([*parts, *map(str, inputs)])


@dataclass(frozen=True)
class _Stage:
    """A graph of the denoising loop: its size, and the tensors that it hands over to the step."""

    component: str
    form: str
    nodes: int
    weights: int
    nbytes: int
    tensors: int | None
    row_bytes: int | None


def _stages(bundle: Bundle, denoiser: Sequence[str]) -> list[_Stage]:
    """The whole denoiser and its stages, which ``denoiser`` names, for every form that has stages."""
    components = bundle.manifest.components
    if denoiser[-1] not in components:
        return []
    found = []
    for form in components[denoiser[-1]].graphs:
        for name in denoiser:
            if name not in components or form not in components[name].graphs:
                continue
            summary = summarize(bundle.graph_path(name, form))
            outputs = components[name].graphs[form].outputs if name in denoiser[1:-1] else ()
            sizes = [_row_bytes(spec) for spec in outputs]
            row = sum(each for each in sizes if each is not None) if outputs and None not in sizes else None
            tensors = len(outputs) if outputs else None
            found.append(_Stage(name, form, summary.nodes, summary.weights, summary.nbytes, tensors, row))
    return found


def _row_bytes(spec: TensorSpec) -> int | None:
    """Bytes of one row of a tensor; ``None`` where another dimension than the first varies."""
    lengths = [length for length in spec.shape[1:] if isinstance(length, int)]
    return (
        nbytes(TensorSpec(spec.name, spec.dtype, tuple(lengths)), {}) if len(lengths) == len(spec.shape) - 1 else None
    )


def _tensors(stage: _Stage) -> str:
    return "" if stage.tensors is None else f"{stage.tensors} tensors"


def _row_size(stage: _Stage) -> str:
    return "" if stage.tensors is None else "varies" if stage.row_bytes is None else size(stage.row_bytes)


def _profile(profile: Mapping[str, Sequence[Sequence[int]]]) -> str:
    """Shapes as ``sample 1x8x16x16:2x8x16x16:2x8x16x16``."""
    return "; ".join(
        f"{name} {':'.join('x'.join(map(str, shape)) for shape in shapes)}" for name, shapes in profile.items()
    )
