"""``latentrt inspect``: show what a bundle holds."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentrt.engines.store import EngineStore

from ..bundle import Bundle
from .console import print_json, size, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory that build-engine wrote")
    parser.add_argument("--verify-hash", action="store_true", help="hash every file")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print components, graphs and compiled engines."""
    bundle = Bundle.open(arguments.bundle, verify_hash=arguments.verify_hash)
    records = EngineStore(bundle.engines_directory).records(verify_hash=arguments.verify_hash)
    manifest = bundle.manifest
    if arguments.json:
        engines = [dataclasses.asdict(record) for record in records]
        print_json({"bundle": str(bundle.path), "manifest": json.loads(manifest.to_json()), "engines": engines})
        return 0
    defaults, latent = manifest.defaults, manifest.latent
    print(f"{manifest.source.name}: {manifest.family}, {manifest.prediction_type}, licence {manifest.source.licence}")
    print(
        f"latents: {latent.channels} channels, 1/{latent.factor} of the picture's size, scaling {latent.scaling:.5g}; "
        f"default {defaults.width}x{defaults.height}, {defaults.sampler}, {defaults.steps} steps, "
        f"guidance {defaults.guidance:g}"
    )
    graphs = [
        (
            component.name,
            form,
            graph.precision,
            size(sum(manifest.files[file].size for file in (graph.file, *graph.external))),
            f"{manifest.quality[graph.file]:.1f} dB" if graph.file in manifest.quality else "not measured",
            ", ".join(map(str, graph.inputs)),
        )
        for component in manifest.components.values()
        for form, graph in component.graphs.items()
    ]
    print("\n" + table(("component", "form", "precision", "size", "against source", "inputs"), graphs))
    if records:
        engines_table = [
            (r.component, r.engine, r.sdk_version, r.precision, size(r.size), r.target, r.key, _profile(r.profile))
            for r in records
        ]
        header = ("component", "engine", "version", "precision", "size", "target", "key", "profile")
        print("\n" + table(header, engines_table))
    return 0


def _profile(profile: Mapping[str, Sequence[Sequence[int]]]) -> str:
    """Shapes as ``sample 1x8x16x16:2x8x16x16:2x8x16x16``."""
    return "; ".join(
        f"{name} {':'.join('x'.join(map(str, shape)) for shape in shapes)}" for name, shapes in profile.items()
    )
