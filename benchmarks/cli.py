"""``latentrt bench``: measure time, memory and quality of a bundle, beside PyTorch and other runtimes."""

from __future__ import annotations

import argparse
import re
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from latentrt.engines.checks import check_integer, is_number
from latentrt.engines.errors import EngineUnavailableError, InvalidRequestError
from latentrt.engines.kind import CPU, PRESENT
from latentrt.engines.kinds import KINDS
from latentrt.engines.trt.cuda import cuda_devices
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.cli.console import print_json
from latentrt.runtime.components.engine_choice import choose_graph
from latentrt.runtime.components.engine_probe import probe
from latentrt.runtime.families import family_of
from latentrt.runtime.inputs.create import create_request
from latentrt.runtime.samplers import SAMPLERS

from .assembly.assemble import Assembly
from .contest.builds import build
from .contest.contenders import Contender, chosen, ours
from .contest.job import Job
from .contest.rounds import RELOADED, RESIDENT, Contest, Settings
from .machine import describe
from .mlperf.terms import SCENARIOS
from .peers.environments import default_root
from .report.compare import compare, to_text
from .report.document import read

COMPARED = "stable-diffusion"
"""Family of models that every contender can run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", type=Path, nargs="?", metavar="BUNDLE", help="directory that build-engine wrote")
    parser.add_argument(
        "--source", type=Path, metavar="DIR", help="the diffusers directory that it was built from, for peers"
    )
    parser.add_argument("--build", action="store_true", help="build the bundle for each contender first, timed")
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME",
        help="latentrt-ENGINE-PRECISION, a peer, or peers for all of them; default: the engines that fit the bundle",
    )
    parser.add_argument("--prompt", default="a red apple", metavar="TEXT", help="the prompt; default: %(default)s")
    parser.add_argument("--negative-prompt", default="", metavar="TEXT", help="the negative prompt; default: none")
    parser.add_argument("--steps", type=int, metavar="N", help="sampler steps; default: the bundle's")
    parser.add_argument(
        "--sampler", choices=SAMPLERS, default="euler", metavar="NAME", help="the sampler; default: %(default)s"
    )
    parser.add_argument("--guidance", type=float, metavar="G", help="guidance scale; default: the bundle's")
    parser.add_argument("--seed", type=int, default=7, metavar="S", help="seed of the noise; default: %(default)s")
    parser.add_argument("--width", type=int, metavar="W", help="width in pixels; default: the bundle's")
    parser.add_argument("--height", type=int, metavar="H", help="height in pixels; default: the bundle's")
    parser.add_argument("--images", type=int, default=1, metavar="K", help="images of a request; default: 1")
    parser.add_argument(
        "--batches", type=_numbers, default=(), metavar="K,K,...", help="measure throughput at these batch sizes too"
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="T", help="threads on a CPU; default: each library's choice"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="the device of peers; default: cuda where there is a GPU"
    )
    parser.add_argument(
        "--rounds", type=int, default=10, metavar="N", help="rounds in which each draws once; default: 10"
    )
    parser.add_argument(
        "--warm-up", type=int, default=5, metavar="N", help="most requests of each before the first round; default: 5"
    )
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no further round after this time")
    parser.add_argument(
        "--residency",
        choices=("auto", RESIDENT, RELOADED),
        default="auto",
        help="keep all models in memory, or open each for its turn; auto: resident if memory allows",
    )
    parser.add_argument(
        "--timeout", type=float, default=3600.0, metavar="SECONDS", help="longest wait for an answer; default: 3600"
    )
    parser.add_argument(
        "--extrapolate", type=int, metavar="N", help="also estimate the time of N steps from the measured ones"
    )
    parser.add_argument("--no-ceilings", action="store_true", help="do not measure the machine's highest rates")
    parser.add_argument("--loadgen", nargs="+", choices=SCENARIOS, default=(), help="MLPerf runs to add")
    parser.add_argument(
        "--loadgen-seconds", type=float, default=60.0, metavar="S", help="shortest MLPerf run in seconds; default: 60"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="directory for the reports; default: bench-BUNDLE")
    parser.add_argument(
        "--workspace", type=Path, metavar="DIR", help="directory for peers' models; default: in the output"
    )
    parser.add_argument("--peers-root", type=Path, metavar="DIR", help="directory for peers' environments")
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("OLD", "NEW"), help="compare two reports instead of measuring"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Measure a bundle, or compare two reports; returns the exit status, 1 where a comparison finds a regression."""
    if arguments.compare:
        return _compare(*arguments.compare, as_json=arguments.json)
    if arguments.bundle is None:
        raise InvalidRequestError("name the bundle to measure, or two reports with --compare")
    tell: Callable[[str], None] = (lambda _: None) if arguments.json else (lambda text: print(text, flush=True))
    settings = _settings(arguments)
    folder = arguments.output or Path(f"bench-{arguments.bundle.name}")
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe()
    built: dict[str, float] = {}
    if arguments.build:
        if not arguments.contenders or arguments.width is None or arguments.height is None:
            raise InvalidRequestError("--build needs --contenders, --width and --height; name all three")
        named = chosen(arguments.contenders)
        built = build(_job(arguments, folder, None), named, tell)
    bundle = Bundle.open(arguments.bundle)
    job = _job(arguments, folder, bundle)
    contenders = chosen(arguments.contenders) if arguments.contenders else fitting(bundle, job.device)
    if not contenders:
        raise EngineUnavailableError("no engine can run this bundle here; `latentrt doctor` says why")
    terminated = signal.getsignal(signal.SIGTERM)
    assembly = Assembly(bundle, job, settings, machine, folder, extrapolate=arguments.extrapolate, built=built)
    contest = Contest(
        job,
        contenders,
        settings,
        folder=folder,
        peers=arguments.peers_root or default_root(),
        tell=tell,
        save=lambda: assembly.save(contest, ended="the run was still going on", pages=False),
    )
    try:
        signal.signal(signal.SIGTERM, _terminate)  # as from `kill`, or whoever stops a container
        contest.run()
        if not arguments.no_ceilings:
            tell("measuring the machine's highest rates")
            assembly.measure_ceilings(job.threads)
        for scenario in arguments.loadgen:
            tell(f"MLPerf {scenario}")
            assembly.run_loadgen(contest, scenario, arguments.loadgen_seconds)
            assembly.save(contest, ended="the run was still going on", pages=False)
    except (KeyboardInterrupt, SystemExit):
        assembly.save(contest, ended="the run was interrupted")
        tell(f"all samples until then are in {folder / 'report.json'}")
        raise
    finally:
        signal.signal(signal.SIGTERM, terminated)
    report = assembly.save(contest)
    if arguments.json:
        print_json(report)
    else:
        print(f"\n{(folder / 'report.md').read_text(encoding='utf-8')}")
        print(f"reports: {folder / 'report.html'}, report.md and report.json beside it")
    return 0


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def fitting(bundle: Bundle, device: str) -> list[Contender]:
    """LatentRT's contenders that have graphs in the bundle and an engine on this machine."""
    found = []
    for engine, kind in KINDS.items():
        if (device == CPU) != (kind.device == CPU) or probe(engine).state != PRESENT:
            continue
        for precision in kind.precisions:
            try:
                choose_graph(bundle.manifest.components["vae_decoder"], engine, kind.graph_precision(precision))
            except (LookupError, ValueError):
                continue
            found.append(ours(engine, precision))
    return found


def _compare(old: Path, new: Path, *, as_json: bool) -> int:
    comparison = compare(read(old), read(new))
    if as_json:
        print_json(asdict(comparison))
    else:
        print(to_text(comparison))
    return 1 if comparison.regressions else 0


def _settings(arguments: argparse.Namespace) -> Settings:
    for name, least in (("rounds", 1), ("warm_up", 0), ("extrapolate", 1), ("threads", 0)):
        if (value := getattr(arguments, name)) is not None:
            check_integer(f"--{name.replace('_', '-')}", value, least)
    for name in ("budget", "timeout", "loadgen_seconds"):
        value = getattr(arguments, name)
        if value is not None and not (is_number(value) and value > 0):
            raise InvalidRequestError(f"--{name.replace('_', '-')} is {value}, expected a number of seconds above 0")
    return Settings(
        rounds=arguments.rounds,
        warm_up=arguments.warm_up,
        batches=arguments.batches,
        budget=arguments.budget,
        residency=arguments.residency,
        timeout=arguments.timeout,
    )


def _job(arguments: argparse.Namespace, folder: Path, bundle: Bundle | None) -> Job:
    """The job; where there is a bundle, its request is checked and completed by the bundle's defaults."""
    asked = {name: getattr(arguments, name) for name in ("negative_prompt", "steps", "guidance", "seed", "sampler")}
    asked |= {name: getattr(arguments, name) for name in ("width", "height", "images")}
    if bundle is not None:
        if bundle.manifest.family != COMPARED:
            raise InvalidRequestError(
                f"{bundle.path} holds a model of {bundle.manifest.family}; the programs that LatentRT is compared with "
                f"are written for {COMPARED}, so give a bundle of that family"
            )
        request = create_request(bundle.manifest, arguments.prompt, **asked)
        family_of(bundle.manifest).plan(request)
        asked = {name: getattr(request, name) for name in asked}
    workspace = arguments.workspace or folder / "workspace"
    workspace.mkdir(parents=True, exist_ok=True)
    return Job(
        source=arguments.source and arguments.source.resolve(),
        bundle=arguments.bundle.resolve(),
        workspace=workspace.resolve(),
        prompt=arguments.prompt,
        threads=arguments.threads,
        device=arguments.device or ("cuda" if cuda_devices() else "cpu"),
        **asked,
    )


def _numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9][0-9]{0,3}(,[1-9][0-9]{0,3})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 2,4")
    return tuple(map(int, text.split(",")))
