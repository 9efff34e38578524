"""What it costs to put LoRAs on and off at run time, and what a step costs with one.

    python -m latentrt.benchmarks.studies.lora_switch BUNDLE [--layers attention|all] [--width N] [--height N]
    [--rounds N]

Two random LoRAs and none take turns in a pipeline that opens anew what they change, and in one that is ``switchable``;
then steps of both are timed in turn, with one of the LoRAs on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from latentrt.engines.errors import LatentRTError
from latentrt.runtime import Bundle, Pipeline
from latentrt.runtime.components.lora_weights import LAYERS_FILE

RANK = 16
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def random_lora(layers: Mapping[str, Mapping[str, Any]], which: str, seed: int) -> dict[str, NDArray[Any]]:
    """Factors of rank 16 in PEFT's layout, fp16.

    Args:
        layers: By part and path the shape of a layer's weights, as in a bundle's ``lora.json``.
        which: ``"attention"`` for the projections of the denoiser's attention, ``"all"`` for whatever its blocks of
            attention have, and the text encoders' layers too.
        seed: Of the factors.
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
    """Seconds: of switches by mode and what was put on, and of steps by mode.

    Args:
        bundle: The bundle.
        loras: LoRAs that take turns.
        width: Of the pictures in pixels; ``None`` is the bundle's own.
        height: Likewise.
        rounds: How often everything is measured.
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
    for pipe in pipes.values():
        pipe.set_loras(loras[:1])
        pipe("", **options)  # the first run after opening allocates
    for _ in range(rounds):
        for mode, pipe in pipes.items():
            steps[mode] += pipe("", **options).timings.step
    for pipe in pipes.values():
        pipe.close()
    return {"switches": switches, "steps": steps}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m latentrt.benchmarks.studies.lora_switch", description=__doc__.split("\n")[0]
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--layers", choices=("attention", "all"), default="attention", help="what the LoRAs change")
    parser.add_argument("--width", type=int, help="of the pictures, in pixels (default: the bundle's own)")
    parser.add_argument("--height", type=int, help="likewise")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error("--rounds takes numbers from 1")
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
