"""``latentrt verify``: compare a bundle with the model it was built from."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from latentrt.engines.errors import InvalidRequestError
from latentrt.engines.store import EngineStore
from latentrt.runtime.bundle.manifest import PRECISIONS
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.cli.console import BuildConsole, print_json

from ..adapters.registry import open_model
from ..precision.bisect import RUNNERS, find_drift
from ..source.opening import open_source
from ..verification.bundle import verify_bundle
from ..verification.components import GATES
from .adapters import adapters_of, add_adapters
from .reading import add_reading, reading

_SHOWN = 8
_EXACT = 200.0  # dB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory that build-engine wrote")
    parser.add_argument("--source", type=Path, metavar="SOURCE", help="the model it comes from")
    add_adapters(parser)
    parser.add_argument(
        "--bisect", metavar="COMPONENT", help="name the operators where a component drifts from fp32, e.g. unet_step"
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="with --bisect: precision to look at")
    parser.add_argument(
        "--runner", choices=RUNNERS, default="emulated", help="with --bisect: what runs it; by default its roundings"
    )
    add_reading(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Hash the bundle, then run every graph beside torch, or one beside fp32."""
    if arguments.bisect is None and (arguments.source is None or arguments.precision):
        raise InvalidRequestError("give --source SOURCE to verify a bundle, or --bisect COMPONENT --precision P")
    if arguments.bisect is not None and arguments.precision is None:
        raise InvalidRequestError("--bisect needs --precision, the one to look at")
    bundle = Bundle.open(arguments.bundle, verify_hash=True)
    if arguments.bisect is not None:
        return _bisect(bundle, arguments)
    engines = EngineStore(bundle.engines_directory).records(verify_hash=True)
    model = open_model(open_source(arguments.source, reading(arguments)), adapters_of(arguments))
    figures = verify_bundle(bundle, model, BuildConsole(quiet=arguments.json))
    if arguments.json:
        print_json({"bundle": str(bundle.path), "psnr_db": figures})
    else:
        print(f"{arguments.bundle}: {len(figures)} graphs compute what the source computes; all hashes are right")
        if engines:
            print(f"the hashes of its {len(engines)} compiled engines are right too; their results are not compared")
    return 0


def _bisect(bundle: Bundle, arguments: argparse.Namespace) -> int:
    drifts = find_drift(bundle, arguments.bisect, arguments.precision, runner=arguments.runner)
    worst = sorted(drifts, key=lambda drift: -drift.lost)[:_SHOWN]
    if arguments.json:
        print_json(
            {
                "bundle": str(bundle.path),
                "component": arguments.bisect,
                "precision": arguments.precision,
                "runner": arguments.runner,
                "operators": [{**asdict(drift), "lost": drift.lost} for drift in drifts],
            }
        )
        return 0
    limit = GATES[arguments.precision]
    first = next((drift for drift in drifts if not drift.psnr >= limit), None)
    if first is None:
        print(f"{arguments.bisect}: no operator of {len(drifts)} is further than {limit:.0f} dB from fp32")
    else:
        place = drifts.index(first) + 1
        print(
            f"{arguments.bisect}: the first operator further than {limit:.0f} dB from fp32 is {first.node} "
            f"({first.operator}, {place} of {len(drifts)}) with {first.psnr:.1f} dB"
        )
    print("operators that lose most by themselves:")
    for drift in worst:
        before = "inputs" if drift.before > _EXACT else f"{drift.before:.1f} dB"
        print(f"  {drift.node} ({drift.operator}): {before} -> {drift.psnr:.1f} dB")
    return 0
