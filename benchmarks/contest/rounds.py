"""Measure contenders in turn, in one run, so that other load on the machine affects all of them.

A contest opens every contender once (its cold start), lets it draw until its times are steady, and then holds rounds:
in each round every contender draws the image once, and each round begins with the next contender. Where the models do
not fit into memory together, a contender is opened again for each of its turns. A failure of one contender is its
result; the others go on.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from latentrt.engines.errors import LatentRTError

from ..machine import Control
from ..peers.environments import PeerUnavailableError, environment
from .child import Child, ContenderError, own_command, peer_command
from .contenders import PEER, Contender
from .job import Job

STAGES = ("text_encoder", "prompt", "schedule", "vae_decoder")
"""Stages of a request besides its steps."""

RESIDENT, RELOADED = "resident", "reloaded"
"""Where contenders keep their models between turns: in memory, or nowhere, so that each turn opens them again."""

MEASURED, PARTIAL, FAILED, UNAVAILABLE = "measured", "partial", "failed", "unavailable"
"""States of a contender: it has all samples, some, or none although it should run; or it cannot run here."""

_STEADY = 0.05  # relative difference of two requests in a row
_REST = 0.5  # seconds of quiet: threads of a library go on spinning for a while after their work is done
_ROOM = 1.25  # memory to leave free, as a multiple of the largest contender so far

_logger = logging.getLogger("latentrt.benchmarks")

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How a contest is held.

    Attributes:
        rounds: Number of rounds.
        warm_up: Most requests of each contender before the first round, while times still change.
        batches: Numbers of images per request to measure throughput for, besides the job's own.
        budget: Seconds after which no further round begins; one round always takes place. ``None`` sets no limit.
        residency: :data:`RESIDENT`, :data:`RELOADED`, or ``"auto"`` to let the free memory decide.
        timeout: Seconds that one answer of a contender may take.
    """

    rounds: int = 10
    warm_up: int = 5
    batches: Sequence[int] = ()
    budget: float | None = None
    residency: str = "auto"
    timeout: float = 3600.0


@dataclass
class Cold:
    """Seconds of a contender's cold start, part by part; the report's schema describes each."""

    importing: float
    load: float
    compile: float | None
    compile_cached: float | None
    first_picture: float
    process_to_picture: float


@dataclass
class Entry:
    """A contender and all its samples.

    Attributes:
        contender: The contender.
        state: One of :data:`MEASURED`, :data:`PARTIAL`, :data:`FAILED`, :data:`UNAVAILABLE`.
        reason: Why it is not :data:`MEASURED`.
        opened: The answer to its first ``open``; empty if there was none.
        cold: Seconds of its cold start.
        build_seconds: Seconds of converting the checkpoint, if that was done now.
        notes: Remarks for the report, a sentence each.
        picture: File with the images of its first request (numpy).
        total: Seconds of a request, by round.
        stages: Seconds of each stage, a sample a round; a stage that the contender does not report has none.
        step: Seconds of every step, by round.
        rounds: Indices of the rounds that the samples are from.
        batches: Seconds of a request, by its number of images.
        peak_rss: Most resident memory of its processes, in bytes.
        loaded_rss: Resident memory after loading, in bytes.
        device_peak: Most memory on the device, in bytes; ``None`` on a CPU.
    """

    contender: Contender
    state: str = PARTIAL
    reason: str | None = None
    opened: dict[str, Any] = field(default_factory=dict)
    cold: Cold | None = None
    build_seconds: float | None = None
    notes: list[str] = field(default_factory=list)
    picture: Path | None = None
    total: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    step: list[list[float]] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    batches: dict[int, list[float]] = field(default_factory=dict)
    peak_rss: int = 0
    loaded_rss: int = 0
    device_peak: int | None = None

    @property
    def out(self) -> bool:
        """Whether it takes no further part."""
        return self.state in (FAILED, UNAVAILABLE) or self.reason is not None


class Contest:
    """One contest. Its public attributes hold all samples so far, however the run ends.

    Args:
        job: The request that every contender serves.
        contenders: The contenders.
        settings: How the contest is held.
        folder: The folder for logs and images.
        peers: The folder for peers' virtual environments.
        tell: Called with a line for people about every event.
        save: Called whenever there is something new to save.

    Attributes:
        entries: The contenders with their samples, in the order given.
        control: Seconds of the control, by round.
        rounds_done: Rounds that are finished.
        residency: :data:`RESIDENT` or :data:`RELOADED`.
    """

    def __init__(
        self,
        job: Job,
        contenders: Sequence[Contender],
        settings: Settings,
        *,
        folder: Path,
        peers: Path,
        tell: Tell = lambda _: None,
        save: Callable[[], object] = lambda: None,
    ) -> None:
        self.job, self.settings = job, settings
        self.entries = [Entry(contender) for contender in contenders]
        self.control: list[float] = []
        self.rounds_done = 0
        self.residency = RESIDENT if settings.residency == "auto" else settings.residency
        self._folder, self._peers = folder, peers
        self._tell, self._save = tell, save
        self._commands: dict[str, list[str]] = {}
        self._children: dict[str, Child] = {}
        self._began = time.perf_counter()

    def run(self) -> None:
        """Measure everything.

        Raises:
            KeyboardInterrupt: if the user ends it; all samples so far are kept.
            OutputError: if ``save`` raises it.
        """
        self._began = time.perf_counter()
        for name in ("logs", "pictures"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        try:
            for entry in self.entries:
                self._guard(entry, self._first)
                self._save()
            self._warm_up()
            self._go_round()
            self._measure_batches()
        finally:
            for child in self._children.values():
                child.end()
            self._children.clear()
        for entry in self._running():
            entry.state = MEASURED
        self._save()

    def missing(self) -> list[str]:
        """Everything requested that the results lack, a sentence each."""
        sentences = []
        for entry in self.entries:
            if entry.state == UNAVAILABLE:
                sentences.append(f"{entry.contender.label} could not take part: {entry.reason}")
            elif entry.state == FAILED:
                sentences.append(f"{entry.contender.label} failed: {entry.reason}")
            elif entry.reason is not None:
                share = f"{len(entry.total)} of {self.rounds_done} rounds"
                sentences.append(f"{entry.contender.label} took part in {share}: {entry.reason}")
        if self.rounds_done < self.settings.rounds:
            sentences.append(f"{self.rounds_done} of {self.settings.rounds} rounds took place")
        return sentences

    def _running(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.out]

    def _guard(self, entry: Entry, work: Callable[[Entry], None]) -> None:
        """Do something with a contender; a failure is its result and ends its process."""
        try:
            work(entry)
        except LatentRTError as error:
            unsupported = isinstance(error, PeerUnavailableError) or getattr(error, "unsupported", False)
            entry.reason = str(error)
            entry.state = PARTIAL if entry.total else UNAVAILABLE if unsupported else FAILED
            self._tell(f"{entry.contender.label}: {entry.state}: {entry.reason}")
            if (child := self._children.pop(entry.contender.name, None)) is not None:
                child.end()

    # --- opening

    def _first(self, entry: Entry) -> None:
        """Measure the cold start, from a new process to an image."""
        contender = entry.contender
        self._tell(f"{contender.label}: opening")
        self._prepare(entry)
        free = psutil.virtual_memory().available
        child, answer = self._start(contender)
        self._children[contender.name] = child
        if (prepared := answer["prepare_seconds"]) is not None:
            # Converting is no part of a start, so a start without it is timed.
            entry.build_seconds = prepared
            child.end()
            child, answer = self._start(contender)
            self._children[contender.name] = child
        entry.opened = answer
        entry.notes += answer["notes"]
        entry.loaded_rss = answer["rss_bytes"]
        entry.picture = self._folder / "pictures" / f"{contender.name}.npy"
        drawn = child.ask({"do": "draw", "picture": str(entry.picture), "images": None, "steps": None})
        self._note_memory(entry, drawn)
        entry.cold = Cold(
            answer["import_seconds"],
            answer["load_seconds"],
            answer["compile_seconds"],
            None,
            drawn["total"],
            time.perf_counter() - child.started,
        )
        if contender.compiles:
            self._note_compiling(entry, answer)
        self._tell(f"{contender.label}: first image after {entry.cold.process_to_picture:.1f} s")
        if self.residency == RELOADED:
            self._end(contender)
        elif self.settings.residency == "auto" and self._crowded(free):
            self._tell("the models do not fit into memory together: each is opened again for its turn")
            self.residency = RELOADED
            for each in list(self._children):
                self._children.pop(each).end()

    def _prepare(self, entry: Entry) -> None:
        """Find the command of a contender; make a peer's environment where it is missing."""
        contender = entry.contender
        if contender.kind == PEER:
            assert contender.environment is not None, "a peer has an environment"
            assert contender.program is not None, "and a program"
            if self.job.source is None:
                raise ContenderError(
                    "it reads the model that the bundle was built from: name it with --source", unsupported=True
                )
            python = environment(contender.environment, self._peers)
            self._commands[contender.name] = peer_command(python, contender.program)
        else:
            self._commands[contender.name] = own_command()

    def _start(self, contender: Contender, **options: Any) -> tuple[Child, dict[str, Any]]:
        """Start a contender's process and open its model; returns the process and its answer."""
        log = self._folder / "logs" / f"{contender.name}.log"
        child = Child(self._commands[contender.name], log, self.settings.timeout)
        try:
            return child, child.ask({"do": "open", "job": self.job.message({**contender.options, **options})})
        except BaseException:
            child.end()
            raise

    def _end(self, contender: Contender) -> None:
        if (child := self._children.pop(contender.name, None)) is not None:
            child.end()

    def _note_compiling(self, entry: Entry, answer: Mapping[str, Any]) -> None:
        """Measure compiling with and without the bundle's compiled models."""
        assert entry.cold is not None, "it was just noted"
        if not answer["compiled_before"]:
            entry.notes.append("the bundle keeps no compiled model for this size, which would open faster")
            return
        entry.cold.compile_cached = entry.cold.compile
        child, fresh = self._start(entry.contender, engine_cache="off")
        child.end()
        entry.cold.compile = fresh["compile_seconds"]

    def _crowded(self, before: int) -> bool:
        """Whether memory may be too small for another contender of the largest size."""
        largest = max(entry.peak_rss for entry in self.entries)
        return psutil.virtual_memory().available < _ROOM * largest or before < largest

    # --- drawing

    def _draw(self, entry: Entry, *, images: int | None = None, steps: int | None = None) -> dict[str, Any]:
        answer = self._children[entry.contender.name].ask(
            {"do": "draw", "picture": None, "images": images, "steps": steps}
        )
        self._note_memory(entry, answer)
        return answer

    @staticmethod
    def _note_memory(entry: Entry, answer: Mapping[str, Any]) -> None:
        entry.peak_rss = max(entry.peak_rss, answer["peak_rss_bytes"])
        if answer["device_peak_bytes"] is not None:
            entry.device_peak = max(entry.device_peak or 0, answer["device_peak_bytes"])

    def _warm_up(self) -> None:
        """Draw until two requests in a row take equally long; a contender that is reloaded warms up in its turn."""
        if self.residency == RELOADED:
            return
        for entry in self._running():
            self._guard(entry, self._settle)

    def _settle(self, entry: Entry) -> None:
        assert entry.cold is not None, "it has drawn its first picture"
        last = entry.cold.first_picture
        for _ in range(self.settings.warm_up):
            total = self._draw(entry)["total"]
            if abs(total - last) <= _STEADY * last:
                break
            last = total

    def _go_round(self) -> None:
        control = Control()
        longest = 0.0
        for number in range(self.settings.rounds):
            spent = time.perf_counter() - self._began
            budget = self.settings.budget
            if number and budget is not None and spent + longest > budget:
                self._tell(f"the budget of {budget:.0f} s allows {number} of {self.settings.rounds} rounds")
                break
            if not self._running():
                break
            begin = time.perf_counter()
            samples = [_rested(control)]
            shift = number % len(self.entries)
            for entry in (*self.entries[shift:], *self.entries[:shift]):
                if not entry.out:
                    self._guard(entry, lambda each, n=number: self._take_turn(each, n))  # type: ignore[misc]
                    samples.append(_rested(control))
            self.control.append(statistics.median(samples))
            self.rounds_done = number + 1
            longest = max(longest, time.perf_counter() - begin)
            self._tell(f"round {number + 1} of {self.settings.rounds}: {time.perf_counter() - begin:.1f} s")
            self._save()

    def _take_turn(self, entry: Entry, number: int) -> None:
        contender = entry.contender
        if self.residency == RELOADED:
            self._children[contender.name], _ = self._start(contender)
            self._draw(entry, steps=1)
        answer = self._draw(entry)
        entry.rounds.append(number)
        entry.total.append(answer["total"])
        entry.step.append(answer["steps"])
        for stage in STAGES:
            if answer[stage] is not None:
                entry.stages[stage].append(answer[stage])
        if self.residency == RELOADED:
            self._end(contender)

    def _measure_batches(self) -> None:
        """Measure throughput by number of images per request, in turn as well, three times each."""
        for images in self.settings.batches:
            for turn in range(4):
                for entry in self._running():
                    self._guard(entry, lambda each, n=images, t=turn: self._take_batch(each, n, t))  # type: ignore[misc]
            self._tell(f"{images} images a request: done")
            self._save()

    def _take_batch(self, entry: Entry, images: int, turn: int) -> None:
        if self.residency == RELOADED:
            self._children[entry.contender.name], _ = self._start(entry.contender)
        seconds = self._draw(entry, images=images)["total"]
        if turn:  # the first request of its size is the warm-up
            entry.batches.setdefault(images, []).append(seconds)
        if self.residency == RELOADED:
            self._end(entry.contender)


def _rested(control: Control) -> float:
    """The control's seconds, with quiet before and after, so that no contender's threads disturb the next work."""
    time.sleep(_REST)
    seconds = control.sample()
    time.sleep(_REST)
    return seconds
