"""The report as a document: its types, its schema, reading and writing it.

``schema.json`` beside this module (JSON Schema 2020-12) says what a report holds and in which units. Times are in
seconds, sizes in bytes, rates in operations or bytes a second. A report that is cut short is a valid report too: it
says what is missing.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NoReturn, TypedDict, cast, final

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from latentrt.engines.errors import LatentRTError, OutputError
from latentrt.runtime.images.png import check_target

SCHEMA = "latentrt-bench/1"
"""Name and version of the format; the value of a report's ``schema``."""

MAX_BYTES = 32 << 20
"""Largest report that is read: a hundred contenders with a hundred rounds of a hundred steps take a fifth of it."""

Stage = Literal["total", "text_encoder", "prompt", "schedule", "step", "vae_decoder"]

STAGES: tuple[Stage, ...] = ("total", "text_encoder", "prompt", "schedule", "step", "vae_decoder")
"""Stages of a picture; ``total`` is from the request to pixels in the host's memory."""


class ReportError(LatentRTError, ValueError):
    """A file or a document is no report of a benchmark, or not one that can be used as asked."""


class Interval(TypedDict):
    """A median and its bootstrap interval."""

    median: float
    low: float
    high: float


class Ratio(Interval):
    """Quotients of the reference's time and a contender's, taken in pairs."""

    pairs: int


class Summary(Interval):
    """What a stage takes, in seconds; ``cv`` is null for a single sample."""

    p50: float
    p90: float
    p99: float
    cv: float | None
    count: int


class Machine(TypedDict):
    """Where it was measured."""

    processor: str
    cpus: int
    memory_bytes: int
    system: str
    governor: str | None
    instructions: list[str]
    gpus: list[str]
    python: str
    latentrt: str
    load_before: float


class Parameters(TypedDict):
    """Number of parameters of each part of a model."""

    text_encoder: int
    unet: int
    vae_decoder: int


class Model(TypedDict):
    """What was run."""

    name: str
    parameters: Parameters
    width: int
    height: int
    trained: bool | None


class Job(TypedDict):
    """What every contender was asked for."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    sampler: str
    guidance: float
    width: int
    height: int
    images: int
    threads: int
    device: str


class Method(TypedDict):
    """How it was measured."""

    rounds_asked: int
    rounds_done: int
    warm_up: int
    residency: Literal["resident", "reloaded"]
    budget_seconds: float | None
    order: str
    confidence: float
    resamples: int


class Control(TypedDict):
    """The same work in every run, which tells how steady the machine was."""

    samples: list[float]
    what: str
    cv: float | None


class Reference(TypedDict):
    """Whom the others are compared with."""

    contender: str
    why: str


@final
class Unavailable(TypedDict):
    """A ceiling that could not be measured, and why."""

    unavailable: str


@final
class MatmulRate(TypedDict):
    """Rate of a large product of matrices."""

    flops_per_second: float
    samples: list[float]
    library: str


@final
class CopyRate(TypedDict):
    """Rate of a large copy."""

    bytes_per_second: float
    samples: list[float]


class Ceilings(TypedDict):
    """What the machine can do at best; ``matmul`` by precision: fp32, bf16, fp16 or int8, as far as tried."""

    threads: int
    matmul: dict[str, MatmulRate | Unavailable]
    copy: CopyRate | Unavailable


Cold = TypedDict(
    "Cold",
    {
        "import": float,
        "load": float,
        "compile": float | None,
        "compile_cached": float | None,
        "first_picture": float,
        "process_to_picture": float,
    },
)
"""The first picture of a new process, in seconds."""


class Samples(TypedDict):
    """Every measurement in seconds, one a round (``step``: a list a round); empty where a contender cannot tell."""

    total: list[float]
    text_encoder: list[float]
    prompt: list[float]
    schedule: list[float]
    step: list[list[float]]
    vae_decoder: list[float]


class Summaries(TypedDict, total=False):
    """Stages that have samples."""

    total: Summary
    text_encoder: Summary
    prompt: Summary
    schedule: Summary
    step: Summary
    vae_decoder: Summary


class Ratios(TypedDict, total=False):
    """Against the reference; above 1 is faster."""

    total: Ratio
    step: Ratio


class Throughput(TypedDict):
    """Pictures a minute at one batch size."""

    images: int
    seconds: list[float]
    per_minute: Interval


class Memory(TypedDict):
    """Memory of a contender's process, in bytes."""

    peak_rss_bytes: int
    loaded_rss_bytes: int
    device_peak_bytes: int | None


class Quality(TypedDict):
    """A contender's picture against the reference's: PSNR in dB (100 where equal) and SSIM."""

    psnr: float
    ssim: float
    reference: str


class Extrapolated(TypedDict):
    """What a picture of ``steps`` steps would take, in seconds, from fewer that were measured."""

    steps: int
    seconds: Interval


class Roof(TypedDict):
    """A stage against the machine's ceilings; null where a ceiling was not measured."""

    stage: str
    flops: float
    bytes: float
    seconds: float
    calls: int
    achieved_flops: float
    ceiling_flops: float | None
    percent: float | None
    bound: Literal["compute", "memory"] | None
    precision: str


class ContenderReport(TypedDict):
    """What was found of one contender.

    ``reason`` is a sentence unless the state is ``"measured"``. A measured contender has ``summary["total"]``.
    """

    name: str
    label: str
    kind: Literal["latentrt", "peer"]
    state: Literal["measured", "partial", "failed", "unavailable"]
    reason: str | None
    options: dict[str, Any]
    versions: dict[str, str]
    notes: list[str]
    cold: Cold | None
    samples: Samples
    summary: Summaries
    ratios: Ratios
    throughput: list[Throughput]
    memory: Memory | None
    disk_bytes: int | None
    build_seconds: float | None
    quality: Quality | None
    extrapolated: Extrapolated | None
    roofline: list[Roof]


class Loadgen(TypedDict):
    """A run under MLPerf's load generator."""

    scenario: Literal["SingleStream", "MultiStream", "Offline", "Server"]
    valid: bool
    result: dict[str, Any]
    summary: str
    versions: dict[str, str]
    settings: dict[str, Any]
    notes: list[str]


class Report(TypedDict):
    """A run of ``latentrt bench``; ``missing`` says what an incomplete one lacks."""

    schema: Literal["latentrt-bench/1"]
    created: str
    complete: bool
    missing: list[str]
    machine: Machine
    model: Model
    job: Job
    method: Method
    control: Control
    reference: Reference | None
    ceilings: Ceilings | None
    contenders: list[ContenderReport]
    loadgen: list[Loadgen]


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of a report."""
    text = files(__package__).joinpath("schema.json").read_text(encoding="utf-8")
    return cast(dict[str, Any], json.loads(text))


def validate(report: object) -> Report:
    """See whether a document is a report.

    Beyond the schema: numbers are finite, the names of contenders differ, and the reference is one of them.

    Returns:
        The same document.

    Raises:
        ReportError: if it is none; the message names the place.
    """
    try:
        error = best_match(Draft202012Validator(schema()).iter_errors(report))
        infinite = _not_finite(report, ())
    except RecursionError:
        raise ReportError("it is nested too deeply") from None
    if error is not None:
        message = error.message if len(error.message) <= 200 else f"{error.message[:200]}..."
        raise ReportError(f"{_place(error.absolute_path)}: {message}")
    if infinite is not None:
        raise ReportError(f"{_place(infinite)}: the number is not finite")
    checked = cast(Report, report)
    names = [contender["name"] for contender in checked["contenders"]]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ReportError(f"contenders: {min(twice)!r} is there twice, expected each name once")
    reference = checked["reference"]
    if reference is not None and reference["contender"] not in names:
        raise ReportError(f"reference: {reference['contender']!r} is none of the contenders")
    return checked


def read(path: str | os.PathLike[str]) -> Report:
    """Read a report.

    Raises:
        ReportError: if the file cannot be read, is too large, is not JSON, or is no report.
    """
    name = os.fspath(path)
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ReportError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MAX_BYTES:
        raise ReportError(f"{name} is larger than {MAX_BYTES >> 20} MiB, expected a report of latentrt bench")
    try:
        document = json.loads(data, parse_constant=_refuse_constant)
    except ReportError as error:
        raise ReportError(f"{name} is not valid JSON: {error}") from None
    except RecursionError:
        raise ReportError(f"{name} is nested too deeply, expected a report of latentrt bench") from None
    except ValueError as error:  # bad syntax, bytes that are no text, a number of thousands of digits
        raise ReportError(f"{name} is not valid JSON: {str(error)[:200]}") from error
    found = document.get("schema") if isinstance(document, dict) else None
    if found != SCHEMA:
        what = f"its schema is {str(found)[:40]!r}" if found is not None else "it names no schema"
        raise ReportError(f"{name} is no report of latentrt bench: {what}, expected {SCHEMA!r}")
    try:
        return validate(document)
    except ReportError as error:
        raise ReportError(f"{name} is no sound report of latentrt bench: {error}") from error


def to_json(report: Report) -> str:
    """The report as JSON text, ending in a line break: one line for each list of numbers, ASCII only.

    Raises:
        ReportError: if it is no sound report.
    """
    return _layout(validate(report), 0) + "\n"


def write(path: str | os.PathLike[str], report: Report) -> None:
    """Write a report whole or not at all.

    Raises:
        ReportError: if it is no sound report.
        OutputError: if the file cannot be written; an older one is as it was.
    """
    write_text(path, to_json(report))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all: to a temporary file beside it, to the disk, and only then under its name.

    Raises:
        OutputError: if the file cannot be written; an older one is as it was, and nothing else is left behind.
    """
    target = check_target(Path(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(text.encode(errors="replace"))  # a lone surrogate in a prompt is no reason to lose a report
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"cannot write {path}: {reason}; free some space or choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _refuse_constant(name: str) -> NoReturn:
    raise ReportError(f"{name} is no number in JSON")


def _place(path: Any) -> str:
    """Where in a document, such as ``contenders[2].summary.total``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    return text or "the document"


def _not_finite(value: object, path: tuple[str | int, ...]) -> tuple[str | int, ...] | None:
    """Path of the first number that is not finite: ``1e999`` is valid JSON."""
    if isinstance(value, float):
        return None if math.isfinite(value) else path
    children: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    return next((found for key, child in children if (found := _not_finite(child, (*path, key))) is not None), None)


def _layout(value: object, indent: int) -> str:
    """JSON with a line for each member, but lists of plain values on one: samples would fill thousands of lines."""
    pad = " " * (indent + 1)
    if isinstance(value, Mapping) and value:
        members = [f"{pad}{json.dumps(key)}: {_layout(member, indent + 1)}" for key, member in value.items()]
        return "{\n" + ",\n".join(members) + f"\n{' ' * indent}}}"
    if isinstance(value, list) and any(isinstance(each, (list, Mapping)) for each in value):
        return "[\n" + ",\n".join(pad + _layout(each, indent + 1) for each in value) + f"\n{' ' * indent}]"
    return json.dumps(value, allow_nan=False)
