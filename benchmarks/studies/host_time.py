"""Time the host's share of a step with ControlNets and an IP-Adapter, at the sizes of Stable Diffusion 1.5.

    python -m latentrt.benchmarks.studies.host_time [--controlnets N] [--ip-adapter] [--steps N]

Engines are hollow: they check their inputs, as all engines do, and return arrays of the right shapes. So the measured
time is all that a step takes outside of graphs, those checks included. Between steps the program writes a large array,
because a real step would leave nothing of the host's in the processor's caches.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

import numpy as np

from latentrt.engines import Array, TensorSpec
from latentrt.engines.base import BaseEngine
from latentrt.runtime.denoising.controlnets import ControlledStepper
from latentrt.runtime.denoising.fused import FusedLoop
from latentrt.runtime.denoising.latent_preparation import start_run
from latentrt.runtime.request.control import Control
from latentrt.runtime.request.request import Request
from latentrt.runtime.samplers import compile_plan

from ..program import at_least, make_parser

_WIDTHS, _SIDE = (320, 640, 1280, 1280), 64
_LAYERS = 2
_ATTENTIONS, _BLOCKS = 16, 22  # of the U-Net
_CONTROL_ATTENTIONS, _CONTROL_BLOCKS = 7, 11
_CACHES = 128 << 20  # bytes that are written between steps
_LEVELS = {f"latent_{axis}_{level}": _SIDE >> level for axis in ("height", "width") for level in range(1, 4)}
_LENGTHS = {"latent_height": _SIDE, "latent_width": _SIDE, "rows": 2, "batch": 1, "registers": 1, **_LEVELS}


class Hollow(BaseEngine):
    """An engine that computes nothing: it returns zeros, with as many rows as ``timestep`` or the text input has."""

    def __init__(self, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> None:
        super().__init__("hollow engine")
        self._declared = {spec.name: spec for spec in inputs}, {spec.name: spec for spec in outputs}
        self._made: dict[str, Array] | None = None

    def _open(self) -> tuple[Mapping[str, TensorSpec], Mapping[str, TensorSpec]]:
        return self._declared

    def _run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        count = next((len(feeds[name]) for name in ("timestep", "encoder_hidden_states") if name in feeds), None)
        if self._made is None or count is not None:
            lengths = {**_LENGTHS, **({} if count is None else {"rows": count, "batch": count})}
            self._made = {
                name: np.zeros([d if isinstance(d, int) else lengths[d] for d in spec.shape], np.float32)
                for name, spec in self._declared[1].items()
            }
        return dict(self._made)


def _spec(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "int64" if name in ("rows", "unconditional", "conditional") else "float32", shape)


_TEXT = [_spec("encoder_hidden_states", "batch", 77, 768)]
_TIMESTEP = [_spec("timestep", "batch")]
_STATE = _spec("registers", "batch", "registers", 4, "latent_height", "latent_width")
_SEEN = [_STATE, _spec("input_scale", "batch"), _spec("rows", "rows")]  # inputs that denoiser and ControlNets share


def _attention(prefix: str, count: int, tokens: int) -> list[TensorSpec]:
    """Keys and values of the attention layers, of the widths that their levels have."""
    return [_spec(f"{prefix}_{n}", "rows", tokens, _WIDTHS[4 * n // (2 * count)]) for n in range(2 * count)]


def _blocks(prefix: str, count: int) -> list[TensorSpec]:
    return [_spec(f"{prefix}_{n}", "batch", _WIDTHS[4 * n // count], 1, 1) for n in range(count)]


def _residuals(prefix: str) -> list[TensorSpec]:
    levels = [(_WIDTHS[0], 0)]
    for level, width in enumerate(_WIDTHS):
        levels += [(width, level)] * _LAYERS
        levels += [(width, level + 1)] if level + 1 < len(_WIDTHS) else []
    names = [f"_{level}" if level else "" for _, level in [*levels, (0, len(_WIDTHS) - 1)]]
    widths = [*(width for width, _ in levels), _WIDTHS[-1]]
    return [
        _spec(f"{prefix}_{n}", "rows", width, f"latent_height{name}", f"latent_width{name}")
        for n, (width, name) in enumerate(zip(widths, names, strict=True))
    ]


def _denoiser(*, ip_adapter: bool) -> dict[str, Hollow]:
    """The stages of a fused denoiser, and its step with ControlNets' residuals."""
    read = _attention("text", _ATTENTIONS, 77) + (_attention("picture", _ATTENTIONS, 4) if ip_adapter else [])
    fused = [
        _spec("noise", "batch", 4, "latent_height", "latent_width"),
        _spec("update", "batch", "registers", "terms"),
        *(_spec(name, "batch") for name in ("guidance", "guidance_rescale", "unconditional", "conditional")),
    ]
    inputs = [*_SEEN, *fused, *read, *_blocks("time", _BLOCKS)]
    result = [_spec("updated_registers", *_STATE.shape)]
    return {
        "unet_prompt": Hollow(_TEXT, read),
        "unet_schedule": Hollow(_TIMESTEP, _blocks("time", _BLOCKS)),
        "unet_step": Hollow(inputs, result),
        "unet_control_step": Hollow([*inputs, *_residuals("residual")], result),
    }


def _controlnet(name: str) -> dict[str, Hollow]:
    """The stages of a ControlNet."""
    control = _spec("control", "batch", _WIDTHS[0], "latent_height", "latent_width")
    own, times = _attention("own", _CONTROL_ATTENTIONS, 77), _blocks("own_time", _CONTROL_BLOCKS)
    inputs = [*_SEEN, control, _spec("control_scale", "rows", len(_residuals(""))), *_residuals("sum"), *own, *times]
    return {
        f"controlnet_{name}_prompt": Hollow(_TEXT, own),
        f"controlnet_{name}_schedule": Hollow(_TIMESTEP, times),
        f"controlnet_{name}_image": Hollow([_spec("control_image", "batch", 3, "height", "width")], [control]),
        f"controlnet_{name}_step": Hollow(inputs, _residuals("residual")),
    }


def measure(controlnets: int, *, ip_adapter: bool, steps: int, warm_up: int = 3) -> list[float]:
    """Time steps; returns the seconds of each.

    Args:
        controlnets: Number of ControlNets.
        ip_adapter: Whether the denoiser has keys and values of an image prompt too.
        steps: Steps to time.
        warm_up: Steps before those.
    """
    names = [f"n{number}" for number in range(controlnets)]
    engines: dict[str, BaseEngine] = {**_denoiser(ip_adapter=ip_adapter)}
    for name in names:
        engines |= _controlnet(name)
    for engine in engines.values():
        engine.open()
    loop = FusedLoop(engines["unet_step"], engines["unet_prompt"], engines["unet_schedule"])
    loop.add_stepper(ControlledStepper(engines.__getitem__, tuple(engines), "unet", fused=True))
    plan = compile_plan("euler", {"_class_name": "EulerDiscreteScheduler"}, warm_up + steps)
    controls = tuple(Control("", name) for name in names)
    pixels = 8 * _SIDE
    request = Request("", "", warm_up + steps, 7.5, 0, "euler", pixels, pixels, 1, 0, control=controls)
    raw = {"encoder_hidden_states": np.zeros((1, 77, 768), np.float32)}
    texts = [loop.condition_for(request, raw) for _ in range(2)]
    run = start_run(request, plan, texts, (1, 4, _SIDE, _SIDE))
    loop.begin_with(run, [np.zeros((pixels, pixels, 3), np.uint8)] * controlnets)
    seconds, crowd = [], np.zeros(_CACHES // 4, np.float32)
    while not run.done:
        crowd += 1
        begin = time.perf_counter()
        loop.advance([run])
        seconds.append(time.perf_counter() - begin)
    return seconds[warm_up:]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = make_parser("studies.host_time", __doc__, json_file=False)
    parser.add_argument(
        "--controlnets", type=at_least(0, 8), default=2, help="number of ControlNets (default: %(default)s)"
    )
    parser.add_argument("--ip-adapter", action="store_true", help="add an IP-Adapter")
    parser.add_argument("--steps", type=at_least(1), default=100, help="steps to time (default: %(default)s)")
    arguments = parser.parse_args(argv)
    samples = sorted(measure(arguments.controlnets, ip_adapter=arguments.ip_adapter, steps=arguments.steps))
    ninth = samples[math.ceil(0.9 * len(samples)) - 1]
    print(f"host time of a step: median {1e3 * median(samples):.2f} ms, nine of ten below {1e3 * ninth:.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
