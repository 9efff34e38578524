"""From a contest's samples to a report on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import cast

import numpy as np
from numpy.typing import NDArray

from latentrt.engines.errors import EngineUnavailableError
from latentrt.exporter.precision.calibration import PROMPTS
from latentrt.exporter.precision.quality import picture_psnr, picture_ssim
from latentrt.runtime.bundle.onnx_guard import summarize as summarize_graph
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.components.engine_choice import choose_graph
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.samplers import compile_plan

from ..machine import CONTROL, now
from ..mlperf.loadgen import fewest_queries, run_loadgen
from ..report import document as d
from ..report.html import to_html
from ..report.markdown import to_markdown
from ..roofline.ceilings import measure_ceilings
from ..roofline.counting import COMPUTED_IN, StageWork, bundle_work, place
from ..statistics import CONFIDENCE, RESAMPLES, median_interval, summarize, variation
from .contenders import OURS, REFERENCES, Contender
from .job import Job
from .rounds import MEASURED, PARTIAL, RELOADED, STAGES, Contest, Entry, Settings

PORTABLE_FORM = "opset20-fp32"
"""The form whose work peers are taken to do: they compute the same model."""

_PICTURE_SIDE = 256
"""Pixels of a side of the pictures in the page, at most."""


class Assembly:
    """Writes ``report.json``, ``report.md`` and ``report.html`` of a contest, as often as asked.

    Args:
        bundle: What is measured.
        job: What is drawn.
        settings: How the contest is held.
        machine: Where.
        folder: Where reports go.
        extrapolate: Number of steps to estimate the time of; ``None`` for no estimate.
        built: Seconds that building took, by contender.
    """

    def __init__(
        self,
        bundle: Bundle,
        job: Job,
        settings: Settings,
        machine: d.Machine,
        folder: Path,
        *,
        extrapolate: int | None = None,
        built: Mapping[str, float] | None = None,
    ) -> None:
        self._bundle, self._job, self._settings, self._machine = bundle, job, settings, machine
        self._folder, self._extrapolate = folder, extrapolate
        self._built = dict(built or {})
        self._created = now()
        self._ceilings: d.Ceilings | None = None
        self._loadgen: list[d.Loadgen] = []
        self._counted: dict[str, dict[str, StageWork]] = {}
        self._model = self._describe_model()

    def measure_ceilings(self, threads: int) -> None:
        """Measure what the machine can do at most."""
        self._ceilings = cast(d.Ceilings, measure_ceilings(threads))

    def run_loadgen(self, contest: Contest, scenario: str, seconds: float) -> None:
        """Add a run under MLPerf's load generator, of the fastest of LatentRT's contenders.

        Server gets two thirds of the queries a second that the contest's own pictures would fill; nine in ten are to be
        answered in ten times a picture's time. MLPerf's 99 in a hundred would take ten times as many queries.

        Raises:
            EngineUnavailableError: if none of LatentRT's contenders was measured, or loadgen is not installed.
        """
        ours = [e for e in contest.entries if e.contender.kind == OURS and e.state == MEASURED]
        if not ours:
            raise EngineUnavailableError("MLPerf runs need one of LatentRT's own contenders, and none was measured")
        fastest = min(ours, key=lambda entry: median(entry.total))
        job, options, picture = self._job, fastest.contender.options, median(fastest.total) / self._job.images
        serving = scenario == "Server"
        percentile = 0.9 if serving else None
        with Pipeline.load(
            job.bundle, options["engine"], precision=options["precision"], threads=job.threads, prompt_cache=0
        ) as pipeline:
            run = run_loadgen(
                pipeline,
                scenario,
                prompts=PROMPTS,
                steps=job.steps,
                guidance=job.guidance,
                sampler=job.sampler,
                width=job.width,
                height=job.height,
                seed=job.seed,
                min_duration_seconds=seconds,
                min_queries=fewest_queries(scenario, percentile),
                percentile=percentile,
                directory=self._folder / "loadgen" / scenario,
                target_qps=2 / (3 * picture) if serving else None,
                target_latency_seconds=10 * picture if serving else None,
            )
        run["settings"] |= {"contender": fastest.contender.name}
        self._loadgen.append(cast(d.Loadgen, run))

    def save(self, contest: Contest, ended: str | None = None, *, pages: bool = True) -> d.Report:
        """Write what there is.

        Args:
            contest: The contest.
            ended: Why it is not at its end; ``None`` if it is.
            pages: Write the reports for people too.

        Raises:
            OutputError: if the files cannot be written; older ones are as they were.
        """
        report = self.report(contest, ended)
        d.write(self._folder / "report.json", report)
        if pages:
            d.write_text(self._folder / "report.md", to_markdown(report))
            d.write_text(self._folder / "report.html", to_html(report, self._pictures(contest)))
        return report

    def report(self, contest: Contest, ended: str | None = None) -> d.Report:
        """The document."""
        missing = contest.missing()
        if ended is not None:
            missing.insert(0, f"{ended[0].upper()}{ended[1:]}")
        reference = _reference(contest.entries)
        return {
            "schema": "latentrt-bench/1",
            "created": self._created,
            "complete": ended is None,
            "missing": missing,
            "machine": self._machine,
            "model": self._model,
            "job": self._job.described(),  # type: ignore[typeddict-item]
            "method": {
                "rounds_asked": self._settings.rounds,
                "rounds_done": contest.rounds_done,
                "warm_up": self._settings.warm_up,
                "residency": "reloaded" if contest.residency == RELOADED else "resident",
                "budget_seconds": self._settings.budget,
                "order": "round-robin, each round rotated by one",
                "confidence": CONFIDENCE,
                "resamples": RESAMPLES,
            },
            "control": {"samples": list(contest.control), "what": CONTROL, "cv": variation(contest.control)},
            "reference": None
            if reference is None
            else {
                "contender": reference.contender.name,
                "why": "the first of these that took part: " + ", ".join(REFERENCES),
            },
            "ceilings": self._ceilings,
            "contenders": [self._contender(entry, reference, ended) for entry in contest.entries],
            "loadgen": list(self._loadgen),
        }

    def _describe_model(self) -> d.Model:
        manifest = self._bundle.manifest
        weights = {}
        for name in ("text_encoder", "unet", "vae_decoder"):
            form = next(iter(manifest.components[name].graphs))
            weights[name] = summarize_graph(self._bundle.graph_path(name, form)).weights
        return {
            "name": manifest.source.name,
            "parameters": {name: weights[name] for name in ("text_encoder", "unet", "vae_decoder")},  # type: ignore[typeddict-item]
            "width": manifest.defaults.width,
            "height": manifest.defaults.height,
            "trained": None,
        }

    def _contender(self, entry: Entry, reference: Entry | None, ended: str | None) -> d.ContenderReport:
        contender = entry.contender
        state, reason = entry.state, entry.reason
        if state == PARTIAL and reason is None:
            reason = ended or "it was not measured to the end"
        opened = bool(entry.opened)
        return {
            "name": contender.name,
            "label": contender.label,
            "kind": contender.kind,  # type: ignore[typeddict-item]
            "state": state,  # type: ignore[typeddict-item]
            "reason": reason,
            "options": dict(contender.options),
            "versions": dict(entry.opened["versions"]) if opened else {},
            "notes": list(entry.notes),
            "cold": _cold(entry),
            "samples": {
                "total": list(entry.total),
                "step": [list(steps) for steps in entry.step],
                **{stage: list(entry.stages[stage]) for stage in STAGES},  # type: ignore[typeddict-item]
            },
            "summary": _summaries(entry),
            "ratios": _ratios(entry, reference),
            "throughput": _throughput(entry, self._job.images),
            "memory": {
                "peak_rss_bytes": entry.peak_rss,
                "loaded_rss_bytes": entry.loaded_rss,
                "device_peak_bytes": entry.device_peak,
            }
            if opened
            else None,
            "disk_bytes": entry.opened["disk_bytes"] if opened else None,
            "build_seconds": self._built.get(contender.name, entry.build_seconds),
            "quality": _quality(entry, reference),
            "extrapolated": self._extrapolated(entry),
            "roofline": self._roofline(entry),
        }

    def _extrapolated(self, entry: Entry) -> d.Extrapolated | None:
        """What more steps would take: each round's own picture, with its median step as often as steps are added."""
        steps = self._extrapolate
        if steps is None or not any(entry.step):
            return None
        seconds = [
            [total + (steps - len(taken)) * median(taken)]
            for total, taken in zip(entry.total, entry.step, strict=True)
            if taken
        ]
        return {"steps": steps, "seconds": median_interval(seconds)}

    def _roofline(self, entry: Entry) -> list[d.Roof]:
        if self._ceilings is None or not entry.total:
            return []
        ceilings, seconds = self._ceilings, _medians(entry)
        form, precision = self._computed(entry.contender)
        rows: list[d.Roof] = []
        for stage, (work, calls, stored) in self._work(form).items():
            # Peers run the whole denoiser in every step, and what a bundle has no stages of does so too.
            whole = entry.contender.kind != OURS or "unet_step" not in self._bundle.manifest.components
            if (stage == "step" and whole) or (stage == "plain_step" and not whole):
                continue
            name = "step" if stage == "plain_step" else stage
            in_what = stored if entry.contender.kind == OURS and stored != "fp32" else precision
            computed_in = COMPUTED_IN.get(in_what, in_what)
            if name in seconds and "unavailable" not in ceilings["matmul"].get(computed_in, {"unavailable": ""}):
                placed = place(work, seconds[name], ceilings, in_what, stage=name, calls=calls)
                rows.append(cast(d.Roof, asdict(placed)))
        return rows

    def _computed(self, contender: Contender) -> tuple[str, str]:
        """The form of the bundle's graphs whose work a contender does, and what it computes in."""
        options = contender.options
        if contender.kind != OURS:
            return PORTABLE_FORM, str(options.get("dtype", options.get("precision")))
        precision = options["precision"]
        stored = "fp32" if (options["engine"], precision) == ("openvino", "bf16") else precision
        form, _ = choose_graph(self._bundle.manifest.components["vae_decoder"], options["engine"], stored)
        return form, precision

    def _work(self, form: str) -> dict[str, StageWork]:
        """Operations and bytes of each stage of the job, counted once a form."""
        if form not in self._counted:
            job = self._job
            plan = compile_plan(job.sampler, self._bundle.manifest.scheduler, job.steps)
            self._counted[form] = bundle_work(
                self._bundle,
                form,
                images=job.images,
                guided=job.guidance > 1,
                width=job.width,
                height=job.height,
                steps=len(plan),
                registers=plan.registers,
            )
        return self._counted[form]

    def _pictures(self, contest: Contest) -> dict[str, bytes]:
        """Small PNG files of what each contender drew."""
        found = {}
        for entry in contest.entries:
            if (picture := _picture(entry)) is not None:
                found[entry.contender.name] = _thumbnail(picture[0])
        return found


def _cold(entry: Entry) -> d.Cold | None:
    cold = entry.cold
    if cold is None:
        return None
    return {
        "import": cold.importing,
        "load": cold.load,
        "compile": cold.compile,
        "compile_cached": cold.compile_cached,
        "first_picture": cold.first_picture,
        "process_to_picture": cold.process_to_picture,
    }


def _groups(entry: Entry) -> dict[str, list[list[float]]]:
    """Samples of each stage that has any, by round."""
    found = {stage: [[value] for value in entry.stages[stage]] for stage in STAGES}
    found |= {"total": [[value] for value in entry.total], "step": [steps for steps in entry.step if steps]}
    return {stage: groups for stage, groups in found.items() if groups}


def _summaries(entry: Entry) -> d.Summaries:
    return {stage: summarize(groups) for stage, groups in _groups(entry).items()}  # type: ignore[return-value]


def _medians(entry: Entry) -> dict[str, float]:
    return {stage: float(np.median(np.concatenate(groups))) for stage, groups in _groups(entry).items()}


def _reference(entries: Sequence[Entry]) -> Entry | None:
    by_name = {entry.contender.name: entry for entry in entries if entry.opened}
    return next((by_name[name] for name in REFERENCES if name in by_name), None)


def _ratios(entry: Entry, reference: Entry | None) -> d.Ratios:
    """How many times faster than the reference, from the rounds that both took part in."""
    if reference is None:
        return {}
    own = dict(zip(entry.rounds, zip(entry.total, entry.step, strict=True), strict=True))
    other = dict(zip(reference.rounds, zip(reference.total, reference.step, strict=True), strict=True))
    both = [(other[number], own[number]) for number in entry.rounds if number in other]
    ratios: d.Ratios = {}
    if both:
        pairs = [[theirs[0] / mine[0]] for theirs, mine in both]
        ratios["total"] = {**median_interval(pairs), "pairs": len(pairs)}
    pairs = [[median(theirs[1]) / median(mine[1])] for theirs, mine in both if theirs[1] and mine[1]]
    if pairs:
        ratios["step"] = {**median_interval(pairs), "pairs": len(pairs)}
    return ratios


def _throughput(entry: Entry, images: int) -> list[d.Throughput]:
    """Pictures a minute by number of pictures of a request; the job's own number from the rounds."""
    by_images = {images: entry.total, **entry.batches} if entry.batches else {}
    return [
        {
            "images": count,
            "seconds": list(seconds),
            "per_minute": median_interval([[60 * count / value] for value in seconds]),
        }
        for count, seconds in sorted(by_images.items())
        if seconds
    ]


def _picture(entry: Entry) -> NDArray[np.uint8] | None:
    """Pictures ``[images, height, width, 3]`` that a contender drew first."""
    if entry.picture is None or not entry.picture.is_file():
        return None
    pictures: NDArray[np.uint8] = np.load(entry.picture, allow_pickle=False)
    return pictures


def _quality(entry: Entry, reference: Entry | None) -> d.Quality | None:
    """How close a contender's pictures are to the reference's."""
    if reference is None:
        return None
    mine, theirs = _picture(entry), _picture(reference)
    if mine is None or theirs is None or mine.shape != theirs.shape:
        return None
    pairs = list(zip(theirs, mine, strict=True))
    return {
        "psnr": float(np.mean([picture_psnr(*pair) for pair in pairs])),
        "ssim": float(np.mean([picture_ssim(*pair) for pair in pairs])),
        "reference": reference.contender.name,
    }


def _thumbnail(picture: NDArray[np.uint8]) -> bytes:
    from io import BytesIO

    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
