"""``latentrt build-engine``: export a model and compile its engines into a bundle."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

from latentrt.engines.errors import InvalidRequestError
from latentrt.engines.trt import Range, parse_ranges
from latentrt.runtime.bundle.manifest import PRECISIONS
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.cli.console import BuildConsole, print_json, seconds
from latentrt.runtime.components.compile import compile_openvino
from latentrt.runtime.components.engine_choice import FixedSize
from latentrt.runtime.components.engine_probe import check_engine

from ..builder.build import BuildReport, build_bundle
from ..builder.plans import BuiltEngine
from ..builder.request import BuildRequest
from ..graphs.targets import TARGETS
from ..precision.calibration import PROMPTS, Calibration, read_prompts
from ..precision.reduce import Quantization
from .adapters import adapters_of, add_adapters
from .reading import add_reading, reading


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a diffusers directory, a checkpoint in a .safetensors file, or the name of a model on a hub",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="BUNDLE", help="directory to write")
    parser.add_argument(
        "--engine", action="append", choices=tuple(TARGETS), help="engine to build for; may be repeated"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="element type of weights and activations"
    )
    parser.add_argument("--height", type=int, metavar="H", help="height in pixels that compiled engines are built for")
    parser.add_argument("--width", type=int, metavar="W", help="width in pixels that compiled engines are built for")
    parser.add_argument("--batch", type=int, metavar="B", help="images at a time that compiled engines are built for")
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="NAME=MIN:OPT:MAX",
        help="range of batch, height or width (pixels) that compiled engines are built for; may be repeated",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="sampler steps that the bundle uses by default; at first those of the family",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="G",
        help="guidance scale that the bundle uses by default; at first that of the family",
    )
    parser.add_argument("--sampler", metavar="NAME", help="sampler that the bundle uses by default")
    add_adapters(parser)
    parser.add_argument("--no-verify", action="store_true", help="do not compare the exported graphs with torch")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="PROMPTS.txt",
        help="prompts, one a line, whose images a reduced precision learns its ranges from",
    )
    parser.add_argument(
        "--calibration-steps", type=int, default=8, metavar="N", help="steps of those images; default 8"
    )
    parser.add_argument(
        "--no-calibration",
        action="store_true",
        help="draw no images to see which values leave the range of fp16, for a model that is too large to run here",
    )
    parser.add_argument(
        "--least-sqnr",
        type=float,
        default=20.0,
        metavar="DB",
        help="least signal over noise of a layer in 8 bits; a layer with less is not quantised; default 20",
    )
    parser.add_argument(
        "--accept-quality", action="store_true", help="keep a reduced precision whose images are below the gate"
    )
    add_reading(parser)
    parser.add_argument("--json", action="store_true", help="print a report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Build, and print a report."""
    ranges = parse_ranges(arguments.profile)
    for name in ("batch", "height", "width"):
        if (length := getattr(arguments, name)) is not None:
            if name in ranges:
                raise InvalidRequestError(f"--{name} and --profile {name}=... exclude each other; give one of them")
            ranges[name] = Range.fixed(length)
    request = BuildRequest(
        source=arguments.source,
        output=arguments.output,
        engines=tuple(arguments.engine or ("onnxruntime",)),
        precision=arguments.precision,
        ranges=ranges,
        verify=not arguments.no_verify,
        steps=arguments.steps,
        guidance=arguments.guidance,
        sampler=arguments.sampler,
        calibration=_calibration(arguments),
        quantization=Quantization(arguments.least_sqnr),
        accept_quality=arguments.accept_quality,
        adapters=adapters_of(arguments),
        reading=reading(arguments),
    )
    console = BuildConsole(quiet=arguments.json)
    if "openvino" in request.engines:
        check_engine("openvino", request.precision)  # before anything is exported
    try:
        report = build_bundle(request, console)
        if "openvino" in request.engines:
            report = _compile_openvino(report, request, console)
    finally:
        console.close()
    if arguments.json:
        print_json(
            {
                "bundle": str(report.path),
                "exported": report.exported,
                "quality": report.quality,
                "engines": [{**dataclasses.asdict(built.record), "reused": built.reused} for built in report.engines],
                "seconds": round(report.seconds, 2),
            }
        )
    else:
        print(f"{arguments.output}: ready after {seconds(report.seconds)}")
    return 0


def _calibration(arguments: argparse.Namespace) -> Calibration | None:
    if not arguments.no_calibration:
        prompts = read_prompts(arguments.calibration) if arguments.calibration else PROMPTS
        return Calibration(prompts, arguments.calibration_steps)
    if arguments.calibration:
        raise InvalidRequestError("--calibration and --no-calibration exclude each other; give one of them")
    return None


def _compile_openvino(report: BuildReport, request: BuildRequest, console: BuildConsole) -> BuildReport:
    """Compile the bundle for OpenVINO: for one size where one is given, else for all."""
    bundle, start = Bundle.open(report.path), time.perf_counter()
    defaults = bundle.manifest.defaults
    default = {"width": defaults.width, "height": defaults.height, "batch": 1}
    lengths = [request.ranges.get(name, Range.fixed(length)) for name, length in default.items()]
    one_size = bool(request.ranges) and all(each.min == each.max for each in lengths)
    size = FixedSize(*(each.max for each in lengths)) if one_size else None

    def report_component(component: str) -> None:
        console.stage(f"{component}: OpenVINO model, {request.precision}")

    built = []
    for model in compile_openvino(bundle, request.precision, size, report_component):
        done = "already built" if model.reused else f"{model.record.size / 1e6:.1f} MB"
        console.result(f"{done} ({model.record.key})")
        built.append(BuiltEngine(model.record, model.reused))
    seconds_taken = report.seconds + time.perf_counter() - start
    return dataclasses.replace(report, engines=(*report.engines, *built), seconds=seconds_taken)
