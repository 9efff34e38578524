"""Time switching LoRAs at run time, and a step with one of them.

    python -m latentrt.benchmarks.studies.lora_switch BUNDLE [--layers attention|all] [--width N] [--height N]
    [--rounds N]

Two random LoRAs and none take turns in a pipeline that opens the changed engines again, and in one that is
``switchable``. Then steps of both pipelines are timed in turn, with one of the LoRAs applied.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from latentrt.engines.errors import LatentRTError
from latentrt.runtime import Bundle, Pipeline
from latentrt.runtime.components.lora_weights import LAYERS_FILE

from ..program import at_least, make_parser
from ..turns import take_turns

RANK = 16
"""Rank of the random LoRAs."""
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def random_lora(layers: Mapping[str, Mapping[str, Any]], which: str, seed: int) -> dict[str, NDArray[Any]]:
    """Random factors of rank :data:`RANK` in PEFT's layout, fp16.

    Args:
        layers: Shapes of layers' weights by part and path, as in a bundle's ``lora.json``.
        which: ``"attention"`` for the projections of the denoiser's attention, ``"all"`` for every layer of its
            attention blocks and the text encoders' layers too.
        seed: Seed of the factors.
    """
    random = np.random.default_rng(seed)
    found: dict[str, NDArray[Any]] = {}
    for part, shapes in layers.items():
        text = part.startswith("text_encoder")
        for path, shape in shapes.items():
            own = path.endswith(_TEXT if text else _ATTENTION) or (not text and "attentions" in path)
            if shape is None or not own or (which == "attention" and (text or not path.endswith(_ATTENTION))):
                continue
            rows, columns, *kernel = shape
            down = random.standard_normal((RANK, columns, *kernel)) * 0.02
            up = random.standard_normal((rows, RANK, *(1 for _ in kernel))) * 0.02
            name = f"{part}.{path}"
            found |= {f"{name}.lora_A.weight": down.astype("<f2"), f"{name}.lora_B.weight": up.astype("<f2")}
    return found


def measure(bundle: Path, loras: Sequence[Path], width: int | None, height: int | None, rounds: int) -> dict[str, Any]:
    """Time switches and steps of both pipelines.

    Args:
        bundle: The bundle.
        loras: LoRAs that take turns.
        width: Width of the images in pixels; ``None`` is the bundle's default.
        height: Height of the images in pixels; ``None`` is the bundle's default.
        rounds: Number of samples of each time.

    Returns:
        ``switches``: seconds by mode and name of the LoRA. ``steps``: seconds by mode.
    """
    options: dict[str, Any] = {"steps": 1, "seed": 1, "width": width, "height": height, "output": "latent"}
    switches: dict[str, dict[str, list[float]]] = {}
    modes = {"anew": False, "switchable": True}
    pipes = {}
    for mode, switchable in modes.items():
        pipe = pipes[mode] = Pipeline.load(bundle, "onnxruntime", switchable=switchable)
        times = switches[mode] = {}
        for _ in range(rounds):
            for name, own in (*((file.stem, [file]) for file in loras), ("none", [])):
                begin = time.perf_counter()
                pipe.set_loras(own)
                times.setdefault(name, []).append(time.perf_counter() - begin)
                pipe("", **options)
    steps: dict[str, list[float]] = {mode: [] for mode in modes}

    def step(mode: str) -> None:
        steps[mode] += pipes[mode]("", **options).timings.step

    for pipe in pipes.values():
        pipe.set_loras(loras[:1])
    take_turns({mode: partial(step, mode) for mode in modes}, rounds)
    steps = {mode: seconds[1:] for mode, seconds in steps.items()}  # the first run after opening allocates
    for pipe in pipes.values():
        pipe.close()
    return {"switches": switches, "steps": steps}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = make_parser("studies.lora_switch", __doc__, json_file=False)
    parser.add_argument("bundle", type=Path, help="a bundle that was built for LoRAs")
    parser.add_argument(
        "--layers", choices=("attention", "all"), default="attention", help="the layers that the LoRAs change"
    )
    parser.add_argument("--width", type=int, help="width of the images, in pixels (default: the bundle's)")
    parser.add_argument("--height", type=int, help="height of the images, in pixels (default: the bundle's)")
    parser.add_argument("--rounds", type=at_least(1), default=3, help="samples of each time (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        layers = json.loads(Bundle.open(arguments.bundle).file(LAYERS_FILE).read_bytes())
        with tempfile.TemporaryDirectory() as folder:
            loras = []
            for name, seed in (("A", 1), ("B", 2)):
                loras.append(Path(folder) / f"{name}.safetensors")
                save_file(random_lora(layers, arguments.layers, seed), loras[-1])
            found = measure(arguments.bundle, loras, arguments.width, arguments.height, arguments.rounds)
    except LatentRTError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for mode, times in found["switches"].items():
        for name, seconds in times.items():
            print(f"{mode}, to {name}: {', '.join(f'{each:.2f}' for each in seconds)} s")
    anew, switchable = found["steps"]["anew"], found["steps"]["switchable"]
    ratio = median(ours / other for ours, other in zip(switchable, anew, strict=True))
    print(f"a step: {median(anew):.3f} s anew, {median(switchable):.3f} s switchable, median of ratios {ratio:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
