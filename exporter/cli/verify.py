"""``latentrt verify``: compare a bundle with the model it was built from."""

from __future__ import annotations

import argparse
from pathlib import Path

from latentrt.engines.store import EngineStore
from latentrt.runtime.bundle import Bundle
from latentrt.runtime.cli.console import BuildConsole, print_json

from ..source import Source
from ..verification import verify_bundle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory that build-engine wrote")
    parser.add_argument(
        "--source", type=Path, required=True, metavar="SOURCE", help="the diffusers directory it comes from"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Hash the bundle, then run every graph beside torch."""
    bundle = Bundle.open(arguments.bundle, verify_hash=True)
    engines = EngineStore(bundle.engines_directory).records(verify_hash=True)
    figures = verify_bundle(bundle, Source.open(arguments.source), BuildConsole(quiet=arguments.json))
    if arguments.json:
        print_json({"bundle": str(bundle.path), "psnr_db": figures})
    else:
        print(f"{arguments.bundle}: {len(figures)} graphs compute what the source computes; all hashes are right")
        if engines:
            print(f"the hashes of its {len(engines)} compiled engines are right too; their results are not compared")
    return 0
