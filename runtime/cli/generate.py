"""``latentrt generate``: draw images with a bundle."""

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
from ..images.png import check_target, sheet, write_png
from ..inputs.parameters import extra_parameters, generation_parameters
from ..inputs.refine import HAND_OVER, hand_over_options
from ..inputs.request_file import KEYWORD as REQUEST_KEYWORD
from ..inputs.request_file import RequestFile, document, read_png, read_request, record
from ..lora.reading import LoraFile, Loras
from ..output.kinds import OUTPUT_KINDS
from ..output.previews import PREVIEW_EVERY, Preview
from ..output.result import Result, StepInfo
from ..pipeline import LOOPS, Pipeline
from ..request.options import FAMILY_OPTIONS
from .console import bar, print_json, seconds
from .request_arguments import add_request_arguments, options_of

_SCHEDULE = frozenset({"steps", "timesteps", "sigmas"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory that build-engine wrote")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="text to draw")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="OUT.png", help="file to write; several images become one sheet"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--request",
        type=Path,
        metavar="FILE.json",
        help="request to draw; other arguments take precedence over the file",
    )
    source.add_argument(
        "--from",
        type=Path,
        dest="drawn",
        metavar="IMAGE.png",
        help="PNG whose request to repeat; other arguments take precedence over the file",
    )
    add_request_arguments(parser)
    parser.add_argument(
        "--embedding",
        action="append",
        type=_named_file,
        metavar="TOKEN=FILE",
        help="word of prompts that stands for the vectors of a textual inversion (may be repeated)",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="LoRA in safetensors to put on (may be repeated)",
    )
    parser.add_argument("--refiner", type=Path, metavar="BUNDLE", help="bundle of a refiner that finishes the image")
    parser.add_argument(
        "--hand-over",
        type=float,
        metavar="F",
        help=f"fraction of the run at which the refiner takes over (default: {HAND_OVER})",
    )
    parser.add_argument("--preview", type=Path, metavar="FILE.png", help="file to write previews to while drawing")
    parser.add_argument(
        "--preview-every", type=int, metavar="N", help=f"steps between two previews (default: {PREVIEW_EVERY})"
    )
    _add_engine_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print a report as JSON")


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that say how engines are opened."""
    parser.add_argument(
        "--engine", default="auto", metavar="NAME", help=f"one of {', '.join(ENGINES)}, or auto, the best that can run"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="precision of the engines (default: the highest in the bundle)"
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="T", help="threads inside an operator; 0 is automatic (default: 0)"
    )
    parser.add_argument(
        "--loop",
        choices=LOOPS,
        default="auto",
        help="fused: the denoiser in stages, with the sampler's update in its graph; plain: the whole denoiser; "
        "auto: fused where the bundle has the stages (default: auto)",
    )
    parser.add_argument("--max-batch", type=int, metavar="B", help="most images to compute at a time")
    parser.add_argument(
        "--engine-cache",
        choices=CACHES,
        default="read",
        help="models that OpenVINO compiled: use those that fit, store new ones too, or use none (default: read)",
    )
    parser.add_argument(
        "--fixed-size", action="store_true", help="compile for this size alone, at which OpenVINO is faster"
    )
    parser.add_argument(
        "--low-memory", action="store_true", help="open each component when it is needed, and close it afterwards"
    )
    parser.add_argument("--verify-hash", action="store_true", help="hash every file of the bundle first")


def run(arguments: argparse.Namespace) -> int:
    """Draw, write the file, and print a report."""
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
    parameters = generation_parameters(request, part.model)
    if len(parts) > 1:
        extra = {**extra_parameters(parts[1].result.request), **parameters.extra}
        extra |= {"Refiner": parts[1].model, "Hand over": f"{share:g}"}
        parameters = dataclasses.replace(parameters, extra=extra)
    texts = _recorded(parts, asked, share)
    OUTPUT_KINDS[last.kind].write(arguments.output, last.payload, parameters.to_text(), texts)
    if arguments.json:
        reports = [each.report() for each in parts]
        of_refiner = {"refiner": reports[1]} if len(reports) > 1 else {}
        print_json({"output": str(arguments.output), **reports[0], **of_refiner})
        return 0
    if truncated := max(each.result.truncated for each in parts):
        print(f"note: {truncated} tokens did not fit the text encoder and were cut off")
    if flagged := parts[-1].result.flagged:
        _print_flagged(flagged, black=parts[-1].result.request.safety == "black")
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
    """The result of one model: the images, or its share in them where two models draw."""

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

    def report(self) -> dict[str, object]:
        """All of it as JSON has it."""
        return {
            "request": dataclasses.asdict(self.result.request),
            "truncated_tokens": self.result.truncated,
            "flagged": self.result.flagged,
            "engine": self.engine,
            "engine_choice": dataclasses.asdict(self.choice),
            "loop": self.loop,
            "seconds": dataclasses.asdict(self.result.timings),
        }


def _print_flagged(flagged: Sequence[bool], *, black: bool) -> None:
    """Print which images are unsafe, counted from 1 in the order of the sheet."""
    numbers = [str(number) for number, each in enumerate(flagged, 1) if each]
    if numbers:
        which = "the image" if len(flagged) == 1 else f"{', '.join(numbers)} of {len(flagged)} images"
        print(f"note: the safety checker flagged {which}, {'now black' if black else 'left as drawn'}")


def _asked(arguments: argparse.Namespace) -> RequestFile:
    """The request of the command line, completed by the file that it names."""
    read = RequestFile({})
    if arguments.request is not None:
        read = read_request(arguments.request)
    elif arguments.drawn is not None:
        read = read_png(arguments.drawn)
    given = options_of(arguments)
    if arguments.prompt is not None:
        given["prompt"] = arguments.prompt
    # Any of these decides the number of steps, so one on the command line stands in place of all in the file.
    instead = _SCHEDULE if given.keys() & _SCHEDULE else frozenset()
    options = {**{name: value for name, value in read.options.items() if name not in instead}, **given}
    if "prompt" not in options:
        raise InvalidRequestError("no prompt is given; expected one behind BUNDLE, or --request or --from with a file")
    if options.get("output") == "latent" or options.get("denoising_end") is not None:
        raise InvalidRequestError(
            "the request ends in latents, and generate writes images; leave out output and denoising_end"
        )
    if read.hand_over is not None and arguments.refiner is None:
        raise InvalidRequestError(
            f"{str(arguments.drawn)!r} was finished by a refiner; give its bundle as --refiner BUNDLE"
        )
    hand_over = read.hand_over if arguments.hand_over is None else arguments.hand_over
    embeddings = {**read.embeddings, **_once("--embedding", arguments.embedding or ())}
    loras = [LoraFile.parse(text) for text in arguments.lora] or read.loras
    return RequestFile(options, embeddings, loras, hand_over, read.model)


def _recorded(parts: Sequence[_Part], asked: RequestFile, share: float | None) -> dict[str, str]:
    """The text of the PNG with the whole request; where two models drew, with the options of both."""
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
