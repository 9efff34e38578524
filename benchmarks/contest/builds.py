"""Build the bundle for each contender before a contest, timed: ``latentrt build-engine`` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence

from latentrt.engines.errors import LatentRTError

from .contenders import OURS, Contender
from .job import Job

_MAIN = "import sys; from latentrt.runtime.cli import main; sys.exit(main())"


def build(job: Job, contenders: Sequence[Contender], tell: Callable[[str], None]) -> dict[str, float]:
    """Build for each of LatentRT's contenders, one after the other into the job's bundle.

    Args:
        job: Names the source and the bundle, and the size that engines are compiled for.
        contenders: The contenders to be measured; peers build for themselves.
        tell: Called with a line for people about each build.

    Returns:
        Seconds by contender's name, without contenders that had nothing left to build. Exported graphs of an earlier
        build are reused, so that of several precisions the first takes longest.

    Raises:
        LatentRTError: if there is no source.
    """
    if job.source is None:
        raise LatentRTError("--build needs the model: name it with --source")
    seconds: dict[str, float] = {}
    for contender in contenders:
        if contender.kind != OURS:
            continue
        engine, precision = contender.options["engine"], contender.options["precision"]
        tell(f"{contender.label}: building")
        command = [sys.executable, "-c", _MAIN, "build-engine", str(job.source), "--output", str(job.bundle), "--json"]
        command += ["--engine", engine, "--precision", precision]
        command += ["--width", str(job.width), "--height", str(job.height), "--batch", str(job.images)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            # The contender will not open either, and the report will say why.
            tell(f"{contender.label}: not built: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
            continue
        built = json.loads(done.stdout)
        if not built["exported"] and all(engine["reused"] for engine in built["engines"]):
            tell(f"{contender.label}: built before")
            continue
        seconds[contender.name] = float(built["seconds"])
        tell(f"{contender.label}: built in {seconds[contender.name]:.1f} s")
    return seconds
