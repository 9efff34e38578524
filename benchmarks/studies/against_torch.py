"""Compare engines with diffusers on the same weights, in turn in one run: a guided step, or decoding an image.

    python -m latentrt.benchmarks.studies.against_torch BUNDLE --source SOURCE [--engine ENGINE:PRECISION[:plain]]...
        [--torch fp32 bf16] [--part step|decoder] [--size PIXELS] [--rounds N] [--json FILE]

``latentrt bench`` measures whole images with every contender in a process of its own. Here all are in one process and
take one step (or decode one image) in turn, so that ratios hold on a machine whose speed changes from minute to minute.
All take the steps of one run: the same noise, conditioning, guidance and sampler, with diffusers' own scheduler for its
models. The report states the times, and how far each one's latents are from diffusers' in fp32 at the end. Before, the
program measures the ceilings: the highest rate of products of matrices in each precision. ``openvino:fp32:plain`` is
an engine without convolutions by tiles (:mod:`latentrt.engines.openvino.winograd`), which shows what those save.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler
from numpy.typing import NDArray

from latentrt.engines import Engine
from latentrt.engines.openvino import rewrite as ov_rewrite
from latentrt.exporter.components import Decoder
from latentrt.exporter.graphs.targets import PORTABLE
from latentrt.exporter.source.opening import open_source
from latentrt.exporter.source.source import Source
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.components.engine_choice import EngineSettings, FixedSize, make_engine
from latentrt.runtime.denoising.fused import FusedLoop
from latentrt.runtime.denoising.run import Run

from ..machine import Control, describe, now, versions
from ..program import at_least, make_parser, write_json
from ..roofline.ceilings import measure_ceilings
from ..statistics import single_interval
from ..turns import take_turns
from .step_time import begin_run

GUIDANCE = 7.5
TOKENS = 77
_REST = 0.5  # seconds of quiet: threads of a library go on spinning for a while after their work is done
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Contender:
    """One way to compute that takes part.

    Attributes:
        turn: Takes one step, or decodes one image.
        result: Returns the latents after the steps so far, or the decoded pixels.
    """

    turn: Callable[[], None]
    result: Callable[[], NDArray[np.float32]]


class TorchSteps:
    """A run of diffusers' own U-Net and Euler scheduler with guidance, step by step.

    Args:
        unet: diffusers' ``UNet2DConditionModel``.
        scheduler: The scheduler's configuration.
        noise: Unit normal noise, fp32 ``[1, channels, h, w]``.
        texts: States of the unconditional and the conditional prompt, fp32 ``[1, tokens, width]`` each.
        steps: Steps of the run.
    """

    def __init__(
        self,
        unet: Any,
        scheduler: Mapping[str, Any],
        noise: NDArray[np.float32],
        texts: Sequence[NDArray[np.float32]],
        steps: int,
    ) -> None:
        self._unet, self._dtype = unet, next(unet.parameters()).dtype
        self._scheduler = EulerDiscreteScheduler.from_config(dict(scheduler))
        self._scheduler.set_timesteps(steps)
        self._left = list(self._scheduler.timesteps)
        self._latents = torch.from_numpy(noise).to(self._dtype) * self._scheduler.init_noise_sigma
        self._texts = torch.from_numpy(np.concatenate(texts)).to(self._dtype)

    @torch.inference_mode()
    def turn(self) -> None:
        """Take a step, as ``StableDiffusionPipeline`` does."""
        timestep = self._left.pop(0)
        scaled = self._scheduler.scale_model_input(torch.cat([self._latents] * 2), timestep)
        low, high = self._unet(scaled, timestep, encoder_hidden_states=self._texts, return_dict=False)[0].chunk(2)
        guided = low + GUIDANCE * (high - low)
        self._latents = self._scheduler.step(guided, timestep, self._latents, return_dict=False)[0]

    def result(self) -> NDArray[np.float32]:
        """The latents after the steps so far, fp32."""
        return np.asarray(self._latents.float().numpy())


@dataclass(frozen=True)
class Way:
    """An engine that takes part, as ``--engine`` names it.

    Attributes:
        engine: The engine's name.
        precision: The precision that it computes in.
        plain: Whether it computes every convolution without tiles.
    """

    engine: str
    precision: str
    plain: bool = False

    def __str__(self) -> str:
        return f"LatentRT, {self.engine} {self.precision}{', plain convolutions' if self.plain else ''}"

    def open(self, bundle: Bundle, component: str, size: int) -> Engine:
        """Open a component for square images with a side of ``size`` pixels."""
        cache = "off" if self.plain else "read"
        settings = EngineSettings(self.engine, self.precision, engine_cache=cache, fixed_size=FixedSize(size, size, 1))
        with patch.object(ov_rewrite, "largest_tile", lambda _: 0) if self.plain else nullcontext():
            return make_engine(bundle, component, settings).open()


def steps_of(
    bundle: Bundle, source: Source, engines: Sequence[Way], dtypes: Sequence[str], size: int, steps: int
) -> tuple[dict[str, Contender], ExitStack]:
    """Contenders that take guided steps of one run, and the stack that closes their engines."""
    manifest, stack = bundle.manifest, ExitStack()
    scheduler = {**manifest.scheduler, "_class_name": "EulerDiscreteScheduler"}
    side = size // manifest.latent.vae_scale_factor
    shape = (1, manifest.latent.channels, side, side)
    random = np.random.default_rng(0)
    specs = {spec.name: spec for spec in bundle.graph("unet", PORTABLE.name).inputs}
    width = int(specs["encoder_hidden_states"].shape[-1])
    texts = [random.standard_normal((1, TOKENS, width), np.float32) for _ in range(2)]
    contenders: dict[str, Contender] = {}
    noise: NDArray[np.float32] | None = None
    for way in engines:
        prompt, schedule, step = (
            stack.enter_context(closing(way.open(bundle, f"unet_{stage}", size)))
            for stage in ("prompt", "schedule", "step")
        )
        loop = FusedLoop(step, prompt, schedule)
        run = begin_run(loop, scheduler, texts, shape, steps, GUIDANCE)
        noise = run.latents / np.float32(run.plan.init_scale) if noise is None else noise
        contenders[str(way)] = Contender(_advancing(loop, run), _latents_of(run))
    assert noise is not None
    for dtype in dtypes:
        unet = source.load("unet", _DTYPES[dtype])
        own = TorchSteps(unet, scheduler, noise, texts, steps)
        contenders[f"diffusers {dtype}"] = Contender(own.turn, own.result)
    return contenders, stack


def _advancing(loop: FusedLoop, run: Run) -> Callable[[], None]:
    return lambda: loop.advance([run])


def _latents_of(run: Run) -> Callable[[], NDArray[np.float32]]:
    return lambda: run.latents


def decoders(
    bundle: Bundle, source: Source, engines: Sequence[Way], dtypes: Sequence[str], size: int
) -> tuple[dict[str, Contender], ExitStack]:
    """Contenders that decode the same latents, and the stack that closes their engines."""
    side, stack = size // bundle.manifest.latent.vae_scale_factor, ExitStack()
    latents = np.random.default_rng(0).standard_normal((1, bundle.manifest.latent.channels, side, side), np.float32)
    contenders: dict[str, Contender] = {}
    for way in engines:
        engine = stack.enter_context(closing(way.open(bundle, "vae_decoder", size)))
        contenders[str(way)] = _decoding(engine, latents)
    for dtype in dtypes:
        decoder = Decoder(source.load("vae", _DTYPES[dtype]))
        contenders[f"diffusers {dtype}"] = _torch_decoding(decoder, torch.from_numpy(latents).to(_DTYPES[dtype]))
    return contenders, stack


def _decoding(engine: Engine, latents: NDArray[np.float32]) -> Contender:
    (given,), (taken,), found = engine.inputs, engine.outputs, {}

    def turn() -> None:
        found["pixels"] = engine.run({given: latents})[taken]

    return Contender(turn, lambda: found["pixels"])


def _torch_decoding(decoder: Decoder, latents: torch.Tensor) -> Contender:
    found: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def turn() -> None:
        found["pixels"] = decoder(latents)

    return Contender(turn, lambda: np.asarray(found["pixels"].float().numpy()))


def measure(contenders: Mapping[str, Contender], rounds: int, *, warm_up: int = 1) -> dict[str, Any]:
    """Measure all contenders in turn.

    Args:
        contenders: The contenders by name; diffusers' names begin with ``diffusers``.
        rounds: Turns of each that count.
        warm_up: Turns of each before those.

    Returns:
        ``contenders``: by name ``seconds`` (samples), ``median`` with its 95 % interval, ``over`` (by each contender of
        diffusers, how many times as long that takes, pair by pair, with interval) and ``difference`` (relative L2
        distance of the result from that of diffusers' first contender). ``control``: seconds of a fixed piece of work,
        by round.
    """
    control, steady = Control(), []
    seconds = take_turns(
        {name: contender.turn for name, contender in contenders.items()},
        rounds,
        warm_up=warm_up,
        rest=_REST,
        before_round=lambda _: steady.append(control.sample()),
    )
    theirs = [name for name in contenders if name.startswith("diffusers")]
    reference = contenders[theirs[0]].result() if theirs else None
    figures: dict[str, Any] = {}
    for name, contender in contenders.items():
        over = {}
        for other in theirs:
            pairs = zip(seconds[other], seconds[name], strict=True)
            over[other] = single_interval(slow / fast for slow, fast in pairs)
        figures[name] = {"seconds": seconds[name], **single_interval(seconds[name]), "over": over}
        if reference is not None:
            apart = np.linalg.norm(contender.result() - reference) / np.linalg.norm(reference)
            figures[name]["difference"] = float(apart)
    return {"contenders": figures, "control": steady[warm_up:]}


def table(report: Mapping[str, Any]) -> str:
    """The report for people, as a Markdown table."""
    theirs = [name for name in report["contenders"] if name.startswith("diffusers")]
    what = {"step": "a guided step", "decoder": "decoding an image"}[report["part"]]
    machine, size = report["machine"], report["size"]
    lines = [
        f"{report['model']}: {what}, {size}x{size}; {machine['processor']}, {machine['cpus']} CPUs "
        f"({', '.join(machine['instructions'])}); {report['rounds']} rounds, medians with 95 % intervals",
        "",
        f"| | seconds | {' | '.join(f'{name} takes' for name in theirs)} | difference |",
        f"|---|---:|{'---:|' * len(theirs)}---:|",
    ]
    for name, row in report["contenders"].items():
        ratios = [f"{each['median']:.2f}x [{each['low']:.2f}, {each['high']:.2f}]" for each in row["over"].values()]
        seconds = f"{row['median']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        lines.append(f"| {name} | {seconds} | {' | '.join(ratios)} | {row.get('difference', 0):.1e} |")
    if ceilings := report.get("ceilings"):
        reached = [
            f"{precision} {each['flops_per_second'] / 1e9:.0f} GFLOP/s ({each['library']})"
            if "flops_per_second" in each
            else f"{precision} {each['unavailable']}"
            for precision, each in ceilings["matmul"].items()
        ]
        lines += ["", f"Products of matrices reach at most, in the same run: {'; '.join(reached)}."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = make_parser("studies.against_torch", __doc__)
    parser.add_argument("bundle", type=Path, help="a bundle of a Stable Diffusion model")
    parser.add_argument("--source", type=Path, required=True, help="the diffusers directory that it was built from")
    parser.add_argument(
        "--engine",
        action="append",
        metavar="ENGINE:PRECISION",
        help="an engine that takes part; may be repeated (default: openvino:fp32); :plain after it turns off tiles",
    )
    parser.add_argument(
        "--torch", nargs="+", choices=_DTYPES, default=list(_DTYPES), help="precisions of diffusers (default: both)"
    )
    parser.add_argument(
        "--part", choices=("step", "decoder"), default="step", help="the part to time (default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=at_least(1), default=512, help="side of the image, in pixels (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=at_least(1), default=5, help="turns of each (default: %(default)s)")
    arguments = parser.parse_args(argv)
    named = [each.split(":") for each in arguments.engine or ["openvino:fp32"]]
    if any(len(each) not in (2, 3) or each[2:] not in ([], ["plain"]) for each in named):
        parser.error("--engine takes an engine and a precision, such as openvino:bf16")
    engines = [Way(engine, precision, bool(plain)) for engine, precision, *plain in named]
    bundle, source = Bundle.open(arguments.bundle), open_source(arguments.source)
    if bundle.manifest.family != "stable-diffusion":
        parser.error(f"{arguments.bundle} is of the family {bundle.manifest.family}; give one of stable-diffusion")
    if bundle.manifest.source.fingerprint != source.fingerprint:
        parser.error(f"{arguments.bundle} was not built from {arguments.source}")
    begun, ceilings = now(), measure_ceilings(0)
    if arguments.part == "step":
        contenders, stack = steps_of(bundle, source, engines, arguments.torch, arguments.size, 1 + arguments.rounds)
    else:
        contenders, stack = decoders(bundle, source, engines, arguments.torch, arguments.size)
    with stack:
        figures = measure(contenders, arguments.rounds)
    report = {
        "model": bundle.manifest.source.name,
        "part": arguments.part,
        "size": arguments.size,
        "rounds": arguments.rounds,
        "begun": begun,
        "machine": describe(),
        "versions": versions("latentrt", "torch", "diffusers", "openvino", "onnxruntime", "numpy"),
        "threads": {"torch": torch.get_num_threads()},
        "ceilings": ceilings,
        **figures,
    }
    print(table(report))
    write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
