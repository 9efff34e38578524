"""From a contest's samples to a report on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from latentrt.engines.errors import EngineUnavailableError
from latentrt.engines.kinds import KINDS
from latentrt.exporter.graphs.targets import PORTABLE
from latentrt.exporter.precision.calibration import PROMPTS
from latentrt.runtime.bundle.onnx_guard import summarize as summarize_graph
from latentrt.runtime.bundle.reader import Bundle
from latentrt.runtime.components.engine_choice import choose_graph
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.samplers import compile_plan

from ..contest.contenders import OURS, REFERENCES, Contender
from ..contest.job import Job
from ..contest.rounds import MEASURED, PARTIAL, RELOADED, STAGES, Contest, Entry, Settings
from ..machine import CONTROL, now
from ..mlperf.loadgen import run_loadgen
from ..mlperf.terms import fewest_queries
from ..report import document as d
from ..report import types as t
from ..report.html import to_html
from ..report.markdown import to_markdown
from ..roofline.ceilings import measure_ceilings
from ..roofline.counting import StageWork, bundle_work
from ..roofline.placing import COMPUTED_IN, place
from ..statistics import CONFIDENCE, RESAMPLES, variation
from . import measured

_THUMBNAIL_SIDE = 256  # pixels of a side of the images in the page, at most


class Assembly:
    """Assembles the report of a contest, and writes ``report.json``, ``report.md`` and ``report.html``.

    Args:
        bundle: The bundle that is measured.
        job: The request that every contender serves.
        settings: How the contest is held.
        machine: The machine that it is held on.
        folder: The folder for the reports.
        extrapolate: Number of steps to estimate the time of; ``None`` for no estimate.
        built: Seconds of building, by contender.
    """

    def __init__(
        self,
        bundle: Bundle,
        job: Job,
        settings: Settings,
        machine: t.Machine,
        folder: Path,
        *,
        extrapolate: int | None = None,
        built: Mapping[str, float] | None = None,
    ) -> None:
        self._bundle, self._job, self._settings, self._machine = bundle, job, settings, machine
        self._folder, self._extrapolate = folder, extrapolate
        self._built = dict(built or {})
        self._created = now()
        self._ceilings: t.Ceilings | None = None
        self._loadgen: list[t.Loadgen] = []
        self._counted: dict[str, dict[str, StageWork]] = {}
        self._model = self._describe_model()

    def measure_ceilings(self, threads: int) -> None:
        """Measure the highest rates of the machine, which the report places stages under."""
        self._ceilings = cast(t.Ceilings, measure_ceilings(threads))

    def run_loadgen(self, contest: Contest, scenario: str, seconds: float) -> None:
        """Add a run of LatentRT's fastest contender under MLPerf's load generator.

        Server gets two thirds of the queries a second that the contest's times allow; nine in ten of them must be
        answered in ten times the time of an image. MLPerf's 99 in a hundred would take ten times as many queries.

        Raises:
            EngineUnavailableError: if none of LatentRT's contenders was measured, or loadgen is not installed.
        """
        ours = [e for e in contest.entries if e.contender.kind == OURS and e.state == MEASURED]
        if not ours:
            raise EngineUnavailableError("MLPerf runs need one of LatentRT's own contenders, and none was measured")
        fastest = min(ours, key=lambda entry: median(entry.total))
        job, options, image = self._job, fastest.contender.options, median(fastest.total) / self._job.images
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
                target_qps=2 / (3 * image) if serving else None,
                target_latency_seconds=10 * image if serving else None,
            )
        run["settings"] |= {"contender": fastest.contender.name}
        self._loadgen.append(cast(t.Loadgen, run))

    def save(self, contest: Contest, ended: str | None = None, *, pages: bool = True) -> t.Report:
        """Write the report of a contest, finished or not.

        Args:
            contest: The contest.
            ended: Why it is not finished; ``None`` if it is.
            pages: Whether to write the reports for people too.

        Raises:
            OutputError: if the files cannot be written; older ones stay unchanged.
        """
        report = self.report(contest, ended)
        d.write(self._folder / "report.json", report)
        if pages:
            d.write_text(self._folder / "report.md", to_markdown(report))
            d.write_text(self._folder / "report.html", to_html(report, self._thumbnails(contest)))
        return report

    def report(self, contest: Contest, ended: str | None = None) -> t.Report:
        """The report of a contest; ``ended`` says why it is not finished."""
        missing = contest.missing()
        if ended is not None:
            missing.insert(0, f"{ended[0].upper()}{ended[1:]}")
        reference = measured.reference(contest.entries)
        return {
            "schema": d.SCHEMA,
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

    def _describe_model(self) -> t.Model:
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

    def _contender(self, entry: Entry, reference: Entry | None, ended: str | None) -> t.ContenderReport:
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
            "cold": measured.cold(entry),
            "samples": {
                "total": list(entry.total),
                "step": [list(steps) for steps in entry.step],
                **{stage: list(entry.stages[stage]) for stage in STAGES},  # type: ignore[typeddict-item]
            },
            "summary": measured.summaries(entry),
            "ratios": measured.ratios(entry, reference),
            "throughput": measured.throughput(entry, self._job.images),
            "memory": {
                "peak_rss_bytes": entry.peak_rss,
                "loaded_rss_bytes": entry.loaded_rss,
                "device_peak_bytes": entry.device_peak,
            }
            if opened
            else None,
            "disk_bytes": entry.opened["disk_bytes"] if opened else None,
            "build_seconds": self._built.get(contender.name, entry.build_seconds),
            "quality": measured.quality(entry, reference),
            "extrapolated": measured.extrapolated(entry, self._extrapolate),
            "roofline": self._roofline(entry),
        }

    def _roofline(self, entry: Entry) -> list[t.Roof]:
        """Each measured stage under the ceilings of the precision that it computes in."""
        if self._ceilings is None or not entry.total:
            return []
        ceilings, seconds = self._ceilings, measured.medians(entry)
        form, precision = self._computed(entry.contender)
        rows: list[t.Roof] = []
        for stage, (work, calls, stored) in self._work(form).items():
            # Peers run the whole denoiser in every step, and so does LatentRT where a bundle has no stages.
            whole = entry.contender.kind != OURS or "unet_step" not in self._bundle.manifest.components
            if (stage == "step" and whole) or (stage == "plain_step" and not whole):
                continue
            name = "step" if stage == "plain_step" else stage
            in_what = stored if entry.contender.kind == OURS and stored != "fp32" else precision
            computed_in = COMPUTED_IN.get(in_what, in_what)
            if name in seconds and "unavailable" not in ceilings["matmul"].get(computed_in, {"unavailable": ""}):
                placed = place(work, seconds[name], ceilings, in_what, stage=name, calls=calls)
                rows.append(cast(t.Roof, asdict(placed)))
        return rows

    def _computed(self, contender: Contender) -> tuple[str, str]:
        """The form of the bundle's graphs whose work a contender does, and the precision that it computes in."""
        options = contender.options
        if contender.kind != OURS:
            return PORTABLE.name, str(options.get("dtype", options.get("precision")))
        engine, precision = options["engine"], options["precision"]
        decoder = self._bundle.manifest.components["vae_decoder"]
        form, _ = choose_graph(decoder, engine, KINDS[engine].graph_precision(precision))
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

    def _thumbnails(self, contest: Contest) -> dict[str, bytes]:
        """Small PNG files of the first image of each contender, by name."""
        found = {}
        for entry in contest.entries:
            if (images := measured.images(entry)) is not None:
                found[entry.contender.name] = _thumbnail(images[0])
        return found


def _thumbnail(pixels: NDArray[np.uint8]) -> bytes:
    image = Image.fromarray(pixels)
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
