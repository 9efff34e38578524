"""``latentrt generate``: draw pictures with a bundle."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from latentrt.engines.errors import InvalidRequestError

from ..bundle.manifest import PRECISIONS
from ..bundle.reader import Bundle
from ..components.engine_choice import CACHES, ENGINES, EngineChoice
from ..images.png import GenerationParameters, check_target, sheet, write_png
from ..images.reading import PictureRecord
from ..inputs.create import FAMILY_OPTIONS, TASK_OPTIONS
from ..inputs.refine import HAND_OVER, hand_over_options
from ..inputs.request_file import KEYWORD as REQUEST_KEYWORD
from ..inputs.request_file import RequestFile, document, read_png, read_request, record
from ..lora.reading import LoraFile, Loras
from ..output.kinds import OUTPUT_KINDS
from ..output.previews import PREVIEW_EVERY, Preview
from ..output.result import Result, StepInfo
from ..pipeline import LOOPS, Pipeline
from ..request.control import Control
from ..request.options import SAFETY, RequestOptions
from ..request.request import Request
from ..samplers import SAMPLERS
from ..text.chunks import SYNTAXES
from ..vae.decoding import DECODERS
from ..vae.tiling import EDGES, Tiling
from .console import bar, print_json, seconds
from .task_arguments import LABELS, add_task_arguments, record_text

_SCHEDULE = frozenset({"steps", "timesteps", "sigmas"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory that build-engine wrote")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="what to draw")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="OUT.png", help="the picture; several become one sheet"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--request", type=Path, metavar="FILE.json", help="request to draw; what else is given here comes before it"
    )
    source.add_argument(
        "--from",
        type=Path,
        dest="picture",
        metavar="PICTURE.png",
        help="PNG whose request to repeat; what else is given here comes before it",
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    parser.add_argument("--prompt-2", metavar="TEXT", help="prompt of a second text encoder; the prompt by default")
    parser.add_argument("--negative-prompt-2", metavar="TEXT", help="likewise what to steer away from")
    parser.add_argument("--prompt-3", metavar="TEXT", help="prompt of a third text encoder; the prompt by default")
    parser.add_argument("--negative-prompt-3", metavar="TEXT", help="likewise what to steer away from")
    parser.add_argument(
        "--max-sequence-length", type=int, metavar="L", help="tokens of a T5 text encoder, padding included; up to 512"
    )
    parser.add_argument(
        "--embedding",
        action="append",
        type=_named_file,
        metavar="TOKEN=FILE",
        help="word of prompts that stands for vectors of a textual inversion; may be repeated",
    )
    parser.add_argument(
        "--prompt-syntax",
        choices=SYNTAXES,
        help="read prompts as they are, so but in chunks, or with weights as (red dress:1.2) (default: plain)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="sampler steps")
    parser.add_argument("--guidance", type=float, metavar="G", help="scale of classifier-free guidance; 1 is none")
    parser.add_argument(
        "--guidance-start", type=float, metavar="F", help="fraction of the run at which guidance begins"
    )
    parser.add_argument("--guidance-end", type=float, metavar="F", help="fraction of the run at which guidance ends")
    parser.add_argument(
        "--guidance-rescale",
        type=float,
        metavar="R",
        help="how much to undo the contrast of guidance, 0 to 1",
    )
    parser.add_argument("--seed", type=int, metavar="S", help="seed of the noise, as torch's CPU generator takes it")
    parser.add_argument("--sampler", metavar="NAME", help=f"one of {', '.join(SAMPLERS)}")
    parser.add_argument("--eta", type=float, metavar="E", help="amount of fresh noise, 0 to 1, of ddim and tcd")
    parser.add_argument("--timesteps", type=_numbers, metavar="T,T,...", help="timesteps to visit, in place of --steps")
    parser.add_argument("--sigmas", type=_numbers, metavar="S,S,...", help="noise levels to visit, in place of --steps")
    parser.add_argument("--width", type=int, metavar="W", help="width in pixels")
    parser.add_argument("--height", type=int, metavar="H", help="height in pixels")
    for side, what in (("", "the model is told"), ("negative-", "to steer away from")):
        parser.add_argument(
            f"--{side}original-size", type=_size, metavar="WxH", help=f"size {what} that the picture was made from"
        )
        parser.add_argument(f"--{side}crop", type=_place, metavar="X,Y", help=f"corner {what} that it was cut out at")
        parser.add_argument(f"--{side}target-size", type=_size, metavar="WxH", help=f"size {what} that it has")
    parser.add_argument("--aesthetic-score", type=float, metavar="A", help="score, 0 to 10, that a refiner is told")
    parser.add_argument("--negative-aesthetic-score", type=float, metavar="A", help="score to steer away from")
    parser.add_argument(
        "--control",
        action="append",
        type=_control,
        metavar="NAME=FILE[:SCALE[:START[:END]]]",
        help="picture that a ControlNet of the bundle steers by; may be repeated",
    )
    parser.add_argument(
        "--guess-mode",
        action="store_true",
        default=None,
        help="let ControlNets act on the prompt alone, and less on details",
    )
    parser.add_argument("--ip-adapter-image", type=Path, metavar="FILE", help="picture that is part of the prompt")
    parser.add_argument("--ip-adapter-scale", type=float, metavar="S", help="how much of it, 0 to 10; default 1")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="LoRA in safetensors to put on; may be repeated",
    )
    parser.add_argument("--refiner", type=Path, metavar="BUNDLE", help="bundle of a refiner that finishes the picture")
    parser.add_argument(
        "--hand-over", type=float, metavar="F", help=f"fraction of the run at which it does; default {HAND_OVER}"
    )
    parser.add_argument("--decoder", choices=DECODERS, help="what draws pixels: the model's own decoder, or a tiny one")
    parser.add_argument(
        "--safety", choices=SAFETY, help="have a safety checker mark unsafe pictures, or make them black (default: off)"
    )
    parser.add_argument("--preview", type=Path, metavar="FILE.png", help="file to write previews to while drawing")
    parser.add_argument(
        "--preview-every", type=int, metavar="N", help=f"steps between two previews; default {PREVIEW_EVERY}"
    )
    add_task_arguments(parser)
    parser.add_argument("--images", type=int, metavar="K", help="pictures to draw")
    parser.add_argument("--max-batch", type=int, metavar="B", help="most pictures to compute at a time")
    parser.add_argument(
        "--vae-tile", type=int, metavar="PIXELS", help="decode larger pictures in tiles of this side, to save memory"
    )
    parser.add_argument(
        "--vae-tile-overlap", type=int, metavar="PIXELS", help="what tiles have in common; a quarter of them by default"
    )
    parser.add_argument(
        "--vae-tile-edges",
        choices=EDGES,
        help="move the last tile inwards, or make it smaller as diffusers does (default: shift)",
    )
    parser.add_argument("--clip-skip", type=int, metavar="L", help="layers of the text encoder to leave out: 0 or 1")
    parser.add_argument(
        "--engine", default="auto", metavar="NAME", help=f"one of {', '.join(ENGINES)}, or auto, the best that can run"
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="precision to run at; the highest there is by default")
    parser.add_argument(
        "--threads", type=int, default=0, metavar="T", help="threads inside an operator; 0 is automatic"
    )
    parser.add_argument(
        "--loop", choices=LOOPS, default="auto", help="denoiser in stages with the update fused, or whole"
    )
    parser.add_argument(
        "--engine-cache",
        choices=CACHES,
        default="read",
        help="compiled OpenVINO models: use them, store new ones too, or not",
    )
    parser.add_argument(
        "--fixed-size", action="store_true", help="compile for this size alone, at which OpenVINO is faster"
    )
    parser.add_argument(
        "--low-memory", action="store_true", help="open each component for its turn only, and close it again"
    )
    parser.add_argument("--verify-hash", action="store_true", help="hash every file of the bundle first")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Draw, write the picture, and say what was done."""
    check_target(arguments.output)
    if arguments.refiner is None and arguments.hand_over is not None:
        raise InvalidRequestError("--hand-over is for two models; give the second as --refiner BUNDLE")
    asked = _asked(arguments)
    prompt, options, previews = asked.options["prompt"], asked.options, _previews(arguments)
    options = {name: value for name, value in options.items() if name != "prompt"}
    share = None
    with _loaded(arguments, arguments.bundle, asked, asked.loras) as pipe:
        if arguments.refiner is not None:
            refiner = Bundle.open(arguments.refiner).manifest
            share = HAND_OVER if asked.hand_over is None else asked.hand_over
            options, rest = hand_over_options(pipe.manifest, refiner, prompt, options, share)
        part = _Part.drawn(pipe, prompt, {**options, **previews})
    parts = [part]
    if share is not None:  # opened once the base is closed: neither needs the other's memory
        with _loaded(arguments, arguments.refiner, asked) as pipe:
            parts.append(_Part.drawn(pipe, prompt, {**rest, **previews, "latents": part.result.latents}))
    request, last = part.result.request, parts[-1].result
    extra = _extra(request)
    if len(parts) > 1:
        extra = {**_extra(parts[1].result.request), **extra, "Refiner": parts[1].model, "Hand over": f"{share:g}"}
    parameters = GenerationParameters(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        steps=request.steps,
        sampler=request.sampler,
        guidance=request.guidance,
        seed=request.seed,
        width=request.width,
        height=request.height,
        model=part.model,
        clip_skip=request.clip_skip,
        extra=extra,
    )
    texts = _recorded(parts, asked, share)
    OUTPUT_KINDS[last.kind].write(arguments.output, last.payload, parameters.to_text(), texts)
    if arguments.json:
        told = [each.told() for each in parts]
        print_json({"output": str(arguments.output), **told[0], **({"refiner": told[1]} if len(told) > 1 else {})})
        return 0
    if truncated := max(each.result.truncated for each in parts):
        print(f"note: {truncated} tokens did not fit the text encoder and were cut off")
    if flagged := parts[-1].result.flagged:
        _tell_flagged(flagged, black=parts[-1].result.request.safety == "black")
    steps = [second for each in parts for second in each.result.timings.step]
    print(
        f"{arguments.output}: {request.width}x{request.height}, seed {request.seed}, {request.sampler}, "
        f"{request.steps} steps of {seconds(median(steps))}, "
        f"total {seconds(sum(each.result.timings.total for each in parts))}"
    )
    print(f"engine: {part.choice.name} ({part.choice.reason})")
    return 0


@dataclasses.dataclass(frozen=True)
class _Part:
    """What one model drew: the picture, or one of two models' share in it."""

    result: Result
    model: str
    loop: str
    choice: EngineChoice
    engine: str

    @classmethod
    def drawn(cls, pipe: Pipeline, prompt: str, options: Mapping[str, Any]) -> _Part:
        """Draw, behind a progress bar."""
        result, denoiser = _draw(pipe.stream(prompt, **options)), pipe.family.denoiser
        engine = pipe.engines[f"{denoiser}_step" if pipe.loop.name == "fused" else denoiser]
        label = str(getattr(engine, "label", type(engine).__name__))
        return cls(result, pipe.manifest.source.name, pipe.loop.name, pipe.engine_choice, label)

    def told(self) -> dict[str, object]:
        """For JSON."""
        return {
            "request": dataclasses.asdict(self.result.request),
            "truncated_tokens": self.result.truncated,
            "flagged": self.result.flagged,
            "engine": self.engine,
            "engine_choice": dataclasses.asdict(self.choice),
            "loop": self.loop,
            "seconds": dataclasses.asdict(self.result.timings),
        }


def _tell_flagged(flagged: Sequence[bool], *, black: bool) -> None:
    """Say which pictures are unsafe, counted from 1 in the order of the sheet."""
    numbers = [str(number) for number, each in enumerate(flagged, 1) if each]
    if numbers:
        which = "the picture" if len(flagged) == 1 else f"{', '.join(numbers)} of {len(flagged)} pictures"
        print(f"note: the safety checker flagged {which}, {'now black' if black else 'left as drawn'}")


def _asked(arguments: argparse.Namespace) -> RequestFile:
    """What is asked for by the command line, and by the file that it names where the command line is silent."""
    read = RequestFile({})
    if arguments.request is not None:
        read = read_request(arguments.request)
    elif arguments.picture is not None:
        read = read_png(arguments.picture)
    given = _options(arguments)
    # One says how many steps there are, and the file would say it in another way.
    instead = _SCHEDULE if given.keys() & _SCHEDULE else frozenset()
    options = {**{name: value for name, value in read.options.items() if name not in instead}, **given}
    if "prompt" not in options:
        raise InvalidRequestError("no prompt is given; expected one behind BUNDLE, or --request or --from with a file")
    if options.get("output") == "latent" or options.get("denoising_end") is not None:
        raise InvalidRequestError(
            "the request is for latents, and generate draws pictures; leave out what ends it early"
        )
    if read.hand_over is not None and arguments.refiner is None:
        raise InvalidRequestError(
            f"{str(arguments.picture)!r} was finished by a refiner; give its bundle as --refiner BUNDLE"
        )
    hand_over = read.hand_over if arguments.hand_over is None else arguments.hand_over
    embeddings = {**read.embeddings, **_once("--embedding", arguments.embedding or ())}
    loras = [LoraFile.parse(text) for text in arguments.lora] or read.loras
    return RequestFile(options, embeddings, loras, hand_over, read.model)


def _recorded(parts: Sequence[_Part], asked: RequestFile, share: float | None) -> dict[str, str]:
    """The text of the PNG with the whole request; of two models', what was asked of both together."""
    first, last = parts[0].result.request, parts[-1].result.request
    request: dict[str, Any] = {}
    if share is not None:
        own = document(last)
        request = {name: own[name] for name in own if name in (*FAMILY_OPTIONS, "decoder", "vae_tiling", "safety")}
        request |= {name: value for name, value in document(first).items() if name != "denoising_end"}
        request["output"] = "image"
        first = dataclasses.replace(first, denoising_end=None)
    text = record(first, parts[0].model, hand_over=share, changes=request)
    return {} if text is None else {REQUEST_KEYWORD: text}


def _loaded(arguments: argparse.Namespace, bundle: Path, asked: RequestFile, loras: Loras = ()) -> Pipeline:
    size = asked.options.get
    return Pipeline.load(
        bundle,
        arguments.engine,
        precision=arguments.precision,
        threads=arguments.threads,
        loop=arguments.loop,
        engine_cache=arguments.engine_cache,
        fixed_size=(size("width"), size("height"), size("images")) if arguments.fixed_size else None,
        max_batch=arguments.max_batch,
        low_memory=arguments.low_memory,
        verify_hash=arguments.verify_hash,
        embeddings=asked.embeddings,
        loras=loras,
    )


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a request that were given."""
    names = {"prompt", *RequestOptions.__annotations__, *FAMILY_OPTIONS} & vars(arguments).keys() - {
        "output"
    }  # that is the file
    options = {name: value for name in sorted(names) if (value := getattr(arguments, name)) is not None}
    tiling = _tiling(arguments.vae_tile, arguments.vae_tile_overlap, arguments.vae_tile_edges)
    return options if tiling is None else {**options, "vae_tiling": tiling}


def _previews(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options that write previews to a file, each in place of the one before."""
    if arguments.preview is None:
        if arguments.preview_every is not None:
            raise InvalidRequestError("--preview-every needs --preview FILE.png, the file to write to")
        return {}
    check_target(arguments.preview)

    def write(preview: Preview) -> None:
        images = preview.images
        write_png(arguments.preview, sheet(images, columns=min(4, len(images))) if len(images) > 1 else images[0])

    return {"on_preview": write, "preview_every": arguments.preview_every}


def _tiling(size: int | None, overlap: int | None, edges: str | None) -> Tiling | None:
    """How to cut pictures into tiles, if that is asked for."""
    if size is None:
        if overlap is not None or edges is not None:
            raise InvalidRequestError("tiles are described but not asked for; give their size with --vae-tile")
        return None
    return Tiling(size, overlap, edges or "shift")


def _named_file(text: str) -> tuple[str, str]:
    """A name and a file as ``<cat>=cat.safetensors``."""
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise argparse.ArgumentTypeError(f"{text!r} is not understood; expected TOKEN=FILE")
    return name, file


def _once(option: str, given: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Names with their files, each of which may be given once."""
    found: dict[str, str] = {}
    for name, file in given:
        if name in found:
            raise InvalidRequestError(f"{option}: {name!r} is given twice; give it once")
        found[name] = file
    return found


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers between commas."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not understood; expected numbers between commas") from None


def _control(text: str) -> Control:
    """A ControlNet, its picture, and up to three numbers behind colons."""
    name, equals, rest = text.partition("=")
    if not equals or not name or not rest:
        raise argparse.ArgumentTypeError(f"{text!r} is not understood; expected NAME=FILE")
    file, numbers = rest, list[float]()
    while len(numbers) < 3 and ":" in file:
        before, _, last = file.rpartition(":")
        try:
            numbers.insert(0, float(last))
        except ValueError:
            break  # a colon of the file's name
        file = before
    return Control(file, name, *numbers)


def _size(text: str) -> tuple[int, int]:
    """A width and a height as ``1024x768``."""
    return _two(text, "x", "a width and a height as 1024x768")


def _place(text: str) -> tuple[int, int]:
    """Two coordinates as ``0,64``."""
    return _two(text, ",", "pixels from the left and from the top as 0,64")


def _two(text: str, between: str, expected: str) -> tuple[int, int]:
    first, _, second = text.partition(between)
    if not (first.isdecimal() and second.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not understood; expected {expected}")
    return int(first), int(second)


def _extra(request: Request) -> dict[str, object]:
    """What the web UI has no entry for, where it is not as usual."""
    usual: dict[str, Any] = {"guidance_start": 0.0, "guidance_end": 1.0, "guidance_rescale": 0.0}
    usual |= dict.fromkeys(("eta", "timesteps", "sigmas", "vae_tiling", *FAMILY_OPTIONS, *TASK_OPTIONS))
    usual |= {"guess_mode": False, "prompt_syntax": "plain", "safety": "off"}
    given = {name: getattr(request, name) for name, value in usual.items() if getattr(request, name) != value}
    labels = {name: LABELS.get(name, name.replace("_", " ").capitalize()) for name in given}
    found = {labels[name]: _written(name, value) for name, value in given.items()}
    if request.ip_adapter_image is not None:
        picture, scale = request.ip_adapter_image, request.ip_adapter_scale
        found["IP-Adapter"] = f"Weight: {scale:g}, Image: {picture.path or picture.sha256}"
    found |= {f"ControlNet {number}": each.told() for number, each in enumerate(request.control)}
    if request.loras:
        found["LoRA"] = "; ".join(f"{Path(lora.path).name} {lora.scale:g} {lora.sha256[:12]}" for lora in request.loras)
    return found


def _written(name: str, value: Any) -> Any:
    """A value as a web UI's parameters have it: a size as ``1024x768``, other numbers between spaces."""
    if isinstance(value, Tiling):
        return f"{value.size} overlap {value.overlap} {value.edges}"
    if isinstance(value, PictureRecord):
        return record_text(value)
    if not isinstance(value, tuple):
        return value
    return ("x" if name.endswith("size") else " ").join(f"{each:g}" for each in value)


def _draw(stream: Generator[StepInfo, None, Result]) -> Result:
    """Run a stream to its end behind a progress bar."""
    progress = None
    try:
        while True:
            try:
                step = next(stream)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            if progress is None:
                progress = bar(step.total, "Drawing", "step")
            progress.update(1)
    finally:
        if progress is not None:
            progress.close()
