"""Measure the time that convolution by tiles saves in OpenVINO, layer by layer, and its rounding error.

    python -m latentrt.benchmarks.studies.winograd [--precision fp32 bf16] [--case INPUTS,OUTPUTS,SIDE,PICTURES]...
        [--rounds N] [--json FILE]

Each layer, two convolutions with a SiLU after each, runs without tiles, with tiles of 2 and with tiles of 4, in turn.
The default cases are layers of Stable Diffusion 1.5: of its U-Net in a guided step at 512x512, and of its decoder. The
thresholds of :mod:`latentrt.engines.openvino.winograd` come from this table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.engines.errors import EngineUnavailableError
from latentrt.engines.openvino.engine import OpenVinoOptions, has_bf16, load_core, load_sdk, require_precision
from latentrt.engines.openvino.winograd import convolve_by_tiles

from ..machine import describe, now, versions
from ..program import at_least, make_parser, write_json
from ..statistics import single_interval
from ..turns import take_turns

LAYERS = 2
"""Convolutions of a case."""

TILES = (0, 2, 4)
"""Sizes of tiles; 0 stands for a plain convolution."""
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
    """A layer that is timed.

    Attributes:
        inputs: Input channels.
        outputs: Output channels.
        side: Height and width of the feature map.
        pictures: Batch size.
    """

    inputs: int
    outputs: int
    side: int
    pictures: int

    def __str__(self) -> str:
        return f"{self.pictures}x{self.inputs}x{self.side}x{self.side} to {self.outputs}"


def model_of(case: Case) -> Any:
    """An OpenVINO model of two convolutions: to the output channels, and back."""
    sdk, random = load_sdk(), np.random.default_rng(0)
    op = sdk.opset13
    picture = value = op.parameter([-1, case.inputs, case.side, case.side], np.float32, name="x")
    for inputs, outputs in ((case.inputs, case.outputs), (case.outputs, case.inputs)):
        kernel = random.standard_normal((outputs, inputs, 3, 3), np.float32) / np.float32(np.sqrt(9 * inputs))
        value = op.swish(op.convolution(value, op.constant(kernel), [1, 1], [1, 1], [1, 1], [1, 1]))
    return sdk.Model([value], [picture], "layer")


def measure(case: Case, precision: str, rounds: int) -> dict[str, Any]:
    """Time a convolution with each size of tiles, and compare its results with plain convolutions in fp32.

    Args:
        case: The layer.
        precision: ``"fp32"`` or ``"bf16"``.
        rounds: Turns of each size that count; one more is the warm-up.

    Returns:
        ``tiles``: by size (``"0"`` is plain) the raw ``seconds`` of a convolution, their ``median`` with interval, and
        ``error``, the relative L2 distance.
    """
    core = load_core()

    def compiled(model: Any, precision: str) -> Any:
        return core.compile_model(model, "CPU", OpenVinoOptions(precision).as_properties(has_bf16=has_bf16(core)))

    pixels = np.random.default_rng(1).standard_normal((case.pictures, case.inputs, case.side, case.side), np.float32)
    exact = compiled(model_of(case), "fp32")(pixels)[0].copy()
    found: dict[str, NDArray[np.float32]] = {}

    def running(tile: int) -> Callable[[], None]:
        model = model_of(case)
        if tile:
            convolve_by_tiles(model, load_sdk(), largest=tile, channels=1, tiles=1)
        run = compiled(model, precision)

        def once() -> None:
            found[str(tile)] = run(pixels)[0]

        return once

    work = {str(tile): running(tile) for tile in TILES}
    seconds = {tile: [each / LAYERS for each in taken] for tile, taken in take_turns(work, rounds).items()}
    return {
        "case": str(case),
        "precision": precision,
        "tiles": {
            tile: {
                "seconds": seconds[tile],
                **single_interval(seconds[tile]),
                "error": float(np.linalg.norm(found[tile] - exact) / np.linalg.norm(exact)),
            }
            for tile in work
        },
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
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
    parser = make_parser("studies.winograd", __doc__)
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, help="precisions to time (default: all that this processor has)"
    )
    parser.add_argument(
        "--case", action="append", metavar="INPUTS,OUTPUTS,SIDE,PICTURES", help="a layer to time; may be repeated"
    )
    parser.add_argument("--rounds", type=at_least(1), default=9, help="turns of each (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        cases = [Case(*(int(n) for n in each.split(","))) for each in arguments.case] if arguments.case else None
    except (ValueError, TypeError):
        parser.error("--case takes four numbers, such as 320,320,64,2")
    if any(min(vars(each).values()) < 1 for each in cases or ()):
        parser.error("--case takes numbers from 1")
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
    packages = versions("latentrt", "openvino", "numpy")
    write_json(arguments.json, {"begun": begun, "machine": describe(), "versions": packages, "layers": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
