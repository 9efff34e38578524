"""What convolution by tiles saves in OpenVINO, layer by layer, and what it loses to rounding.

    python -m latentrt.benchmarks.studies.winograd [--precision fp32 bf16] [--case INPUTS,OUTPUTS,SIDE,PICTURES]...
        [--rounds N] [--json FILE]

Each layer, two convolutions with a SiLU after each, runs as it is, with tiles of 2 and with tiles of 4, in turn. The
cases are layers of Stable Diffusion 1.5: of its U-Net in a guided step at 512x512, and of its decoder. The thresholds
of :mod:`latentrt.engines.openvino.winograd` are read off this table.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.engines.errors import EngineUnavailableError
from latentrt.engines.openvino.engine import OpenVinoOptions, has_bf16, load_core, load_sdk, require_precision
from latentrt.engines.openvino.winograd import convolve_by_tiles

from ..machine import describe, now
from ..statistics import median_interval

LAYERS = 2
TILES = (0, 2, 4)
"""0 stands for a plain convolution."""
CASES = (
    (320, 320, 64, 2),
    (640, 640, 32, 2),
    (1280, 1280, 16, 2),
    (1280, 1280, 8, 2),
    (512, 512, 64, 1),
    (256, 256, 256, 1),
    (128, 128, 256, 1),
)
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Case:
    """A layer.

    Attributes:
        inputs: Channels that come in.
        outputs: Channels that go out.
        side: Height and width of the picture.
        pictures: How many at once.
    """

    inputs: int
    outputs: int
    side: int
    pictures: int

    def __str__(self) -> str:
        return f"{self.pictures}x{self.inputs}x{self.side}x{self.side} to {self.outputs}"


def model_of(case: Case) -> Any:
    """OpenVINO's model of two convolutions, there and back."""
    sdk, random = load_sdk(), np.random.default_rng(0)
    op = sdk.opset13
    picture = value = op.parameter([-1, case.inputs, case.side, case.side], np.float32, name="x")
    for inputs, outputs in ((case.inputs, case.outputs), (case.outputs, case.inputs)):
        kernel = random.standard_normal((outputs, inputs, 3, 3), np.float32) / np.float32(np.sqrt(9 * inputs))
        value = op.swish(op.convolution(value, op.constant(kernel), [1, 1], [1, 1], [1, 1], [1, 1]))
    return sdk.Model([value], [picture], "layer")


def measure(case: Case, precision: str, rounds: int) -> dict[str, Any]:
    """Seconds of a convolution by tile, and the distance of results from those of plain convolutions in fp32.

    Args:
        case: The layer.
        precision: ``"fp32"`` or ``"bf16"``.
        rounds: Offloader of each that count; one more goes before.

    Returns:
        ``tiles``: by tile (``"0"`` is plain) the raw ``seconds``, their ``median`` with interval, and ``error``.
    """
    core = load_core()

    def compiled(model: Any, precision: str) -> Any:
        return core.compile_model(model, "CPU", OpenVinoOptions(precision).as_properties(has_bf16=has_bf16(core)))

    pixels = np.random.default_rng(1).standard_normal((case.pictures, case.inputs, case.side, case.side), np.float32)
    exact = compiled(model_of(case), "fp32")(pixels)[0].copy()
    runs = {}
    for tile in TILES:
        model = model_of(case)
        if tile:
            convolve_by_tiles(model, load_sdk(), largest=tile, channels=1, tiles=1)
        runs[tile] = compiled(model, precision)
    seconds: dict[int, list[float]] = {tile: [] for tile in TILES}
    errors = {}
    for turn in range(rounds + 1):
        for tile, run in runs.items():
            begun = time.perf_counter()
            found: NDArray[np.float32] = run(pixels)[0]
            if turn:
                seconds[tile].append((time.perf_counter() - begun) / LAYERS)
            errors[tile] = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    return {
        "case": str(case),
        "precision": precision,
        "tiles": {
            str(tile): {
                "seconds": seconds[tile],
                **median_interval([[each] for each in seconds[tile]]),
                "error": errors[tile],
            }
            for tile in TILES
        },
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| layer | precision | plain (ms) | tiles of 2 | tiles of 4 | error plain | of 2 | of 4 |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for each in results:
        plain, *tiles = (each["tiles"][str(tile)] for tile in TILES)
        cells = [f"{plain['median'] * 1e3:.1f}"] + [f"{plain['median'] / tile['median']:.2f}x" for tile in tiles]
        errors = [f"{tile['error']:.1e}" for tile in (plain, *tiles)]
        lines.append(f"| {' | '.join([each['case'], each['precision'], *cells, *errors])} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m latentrt.benchmarks.studies.winograd", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help="what is computed in (all that can be here)")
    parser.add_argument(
        "--case", action="append", metavar="INPUTS,OUTPUTS,SIDE,PICTURES", help="a layer; may be repeated"
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the report to this file too")
    arguments = parser.parse_args(argv)
    try:
        cases = [Case(*(int(n) for n in each.split(","))) for each in arguments.case] if arguments.case else None
    except (ValueError, TypeError):
        parser.error("--case takes four numbers, such as 320,320,64,2")
    if arguments.rounds < 1 or any(min(vars(each).values()) < 1 for each in cases or ()):
        parser.error("--rounds and --case take numbers from 1")
    precisions = arguments.precision or [each for each in PRECISIONS if each == "fp32" or has_bf16(load_core())]
    try:
        for precision in precisions:
            require_precision(load_core(), precision)
    except EngineUnavailableError as error:
        parser.error(str(error))
    begun = now()
    results = [
        measure(case, precision, arguments.rounds)
        for case in cases or [Case(*each) for each in CASES]
        for precision in precisions
    ]
    print(table(results))
    if arguments.json is not None:
        versions = {package: importlib.metadata.version(package) for package in ("latentrt", "openvino", "numpy")}
        report = {"begun": begun, "machine": describe(), "versions": versions, "layers": results}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
