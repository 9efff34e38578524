"""The pipeline's side of a test: queries join a batch between steps, and leave it when their image is finished."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from latentrt.runtime.denoising.run import Run
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request.options import RequestOptions

from .driver import LoadgenProcess


class Answerer:
    """Answers queries with images, as many together as the batch has room for.

    Args:
        pipeline: The pipeline that draws.
        prompts: The prompts that queries name by index.
        options: Options of every request.
        batch: Most images that are drawn together.

    Attributes:
        warm_ups: Seconds of each batch of the warm-up.
    """

    def __init__(self, pipeline: Pipeline, prompts: Sequence[str], options: RequestOptions, batch: int) -> None:
        self._pipeline, self._prompts, self._options, self._batch = pipeline, prompts, options, batch
        self.warm_ups: list[float] = []

    def warm_up(self, seconds: float) -> Run:
        """Draw a full batch at least twice, and until ``seconds`` are over; returns one of the runs."""
        begin = time.perf_counter()
        while len(self.warm_ups) < 2 or time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            runs = [self._start(number % len(self._prompts)) for number in range(self._batch)]
            while not runs[0].done:
                self._pipeline.advance(runs)
            for run in runs:
                self._pipeline.finish(run)
            self.warm_ups.append(time.perf_counter() - start)
        return runs[0]

    def answer(self, loadgen: LoadgenProcess) -> None:
        """Answer queries until the test is over; requests join and leave the batch between steps.

        Raises:
            EngineError: if an engine fails, or loadgen does.
        """
        waiting: deque[tuple[int, int]] = deque()
        running: list[tuple[int, Run]] = []
        while (due := loadgen.due(wait=not waiting and not running)) is not None:
            waiting.extend(due)
            while waiting and len(running) < self._batch:
                number, index = waiting.popleft()
                running.append((number, self._start(index)))
            if not running:
                continue
            self._pipeline.advance([run for _, run in running])
            for number, run in running:
                if run.done:
                    self._pipeline.finish(run)
                    loadgen.complete(number)
            running = [(number, run) for number, run in running if not run.done]

    def _start(self, index: int) -> Run:
        return self._pipeline.start(self._prompts[index], **self._options)
