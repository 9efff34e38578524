"""Types of a report's parts, as ``schema.json`` beside this module describes them.

Times are in seconds, sizes in bytes, rates in operations or bytes a second.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict, final

Stage = Literal["total", "text_encoder", "prompt", "schedule", "step", "vae_decoder"]

STAGES: tuple[Stage, ...] = ("total", "text_encoder", "prompt", "schedule", "step", "vae_decoder")
"""Stages of a request; ``total`` lasts from the request to pixels in the host's memory."""


class Interval(TypedDict):
    """A median and its bootstrap interval."""

    median: float
    low: float
    high: float


class Ratio(Interval):
    """The reference's time over a contender's, computed pair by pair; ``pairs`` counts them."""

    pairs: int


class Summary(Interval):
    """Seconds of a stage: median, percentiles, coefficient of variation (null for a single sample), and samples."""

    p50: float
    p90: float
    p99: float
    cv: float | None
    count: int


class Machine(TypedDict):
    """The machine that ran the benchmark; ``load_before`` is its load average before the run."""

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
    """The model; ``width`` and ``height`` are its defaults, ``trained`` is null where the origin is unknown."""

    name: str
    parameters: Parameters
    width: int
    height: int
    trained: bool | None


class Job(TypedDict):
    """The request that every contender served; ``threads`` is 0 where each library chose."""

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
    """How the contest was held: rounds, warm-up, where models were kept, order, and how intervals were made."""

    rounds_asked: int
    rounds_done: int
    warm_up: int
    residency: Literal["resident", "reloaded"]
    budget_seconds: float | None
    order: str
    confidence: float
    resamples: int


class Control(TypedDict):
    """A fixed piece of work, timed once a round; its spread shows how steady the machine was."""

    samples: list[float]
    what: str
    cv: float | None


class Reference(TypedDict):
    """The contender that the others are compared with, and why."""

    contender: str
    why: str


@final
class Unavailable(TypedDict):
    """A ceiling that could not be measured, and why."""

    unavailable: str


@final
class MatmulRate(TypedDict):
    """Rate of a product of large matrices."""

    flops_per_second: float
    samples: list[float]
    library: str


@final
class CopyRate(TypedDict):
    """Rate of a large copy in memory."""

    bytes_per_second: float
    samples: list[float]


class Ceilings(TypedDict):
    """The highest rates that the machine reached; ``matmul`` holds those precisions of fp32, bf16, fp16, int8 tried."""

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
"""Seconds of a new process until its first image."""


class Samples(TypedDict):
    """All samples in seconds, one a round (``step``: a list a round); empty where a contender reports none."""

    total: list[float]
    text_encoder: list[float]
    prompt: list[float]
    schedule: list[float]
    step: list[list[float]]
    vae_decoder: list[float]


class Summaries(TypedDict, total=False):
    """A summary of each stage that has samples."""

    total: Summary
    text_encoder: Summary
    prompt: Summary
    schedule: Summary
    step: Summary
    vae_decoder: Summary


class Ratios(TypedDict, total=False):
    """Speed against the reference; above 1 is faster."""

    total: Ratio
    step: Ratio


class Throughput(TypedDict):
    """Images a minute at one batch size."""

    images: int
    seconds: list[float]
    per_minute: Interval


class Memory(TypedDict):
    """Memory of a contender's process, in bytes."""

    peak_rss_bytes: int
    loaded_rss_bytes: int
    device_peak_bytes: int | None


class Quality(TypedDict):
    """A contender's image against the reference's: PSNR in dB (100 where equal) and SSIM."""

    psnr: float
    ssim: float
    reference: str


class Extrapolated(TypedDict):
    """Seconds of a request of ``steps`` steps, estimated from fewer steps that were measured."""

    steps: int
    seconds: Interval


class Roof(TypedDict):
    """A stage under the machine's ceilings; ``ceiling_flops``, ``percent`` and ``bound`` are null without one."""

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
    """Everything measured of one contender.

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
    """A run of ``latentrt bench``; ``missing`` says in sentences what an incomplete one lacks."""

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
