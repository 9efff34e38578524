"""A contender that draws nothing and takes as long as it is told to; a program, as every contender is."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from latentrt.benchmarks.peers import wire


class FakeContender:
    """Options: ``seconds`` of a step; what goes wrong, and at which picture; ``shade`` of the picture."""

    def __init__(self) -> None:
        self.drawn = 0

    def open(self, job: dict[str, Any]) -> dict[str, Any]:
        options = job["options"]
        if options.get("unsupported"):
            raise wire.UnsupportedError(options["unsupported"])
        if options.get("fails"):
            raise ValueError(options["fails"])
        print("a library says hello")
        return {
            "import_seconds": 0.01,
            "load_seconds": 0.02,
            "compile_seconds": 0.02 if options.get("engine") == "openvino" else None,
            "prepare_seconds": None,
            "versions": {"fake": "1"},
            "device": "cpu",
            "disk_bytes": 1000,
            "notes": ["it is a fake"],
            "compiled_before": options.get("engine_cache") != "off",
        }

    def draw(self, request: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
        options = job["options"]
        self.drawn += 1
        if self.drawn == options.get("killed_at"):
            print("about to end", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.drawn == options.get("raises_at"):
            raise RuntimeError("the kernel gave up")
        if self.drawn == options.get("hangs_at"):
            time.sleep(3600)
        count = request["steps"] or job["steps"]
        images = request["images"] or job["images"]
        steps = [options["seconds"] * images] * count
        time.sleep(sum(steps))
        if request["picture"] is not None:
            import numpy as np

            shape = (images, job["height"], job["width"], 3)
            np.save(request["picture"], np.full(shape, options.get("shade", 100), np.uint8))
        told = dict.fromkeys(("text_encoder", "vae_decoder"), 0.001) | dict.fromkeys(("prompt", "schedule"))
        return {"total": sum(steps) + 0.002, "steps": steps, **told}

    def close(self) -> None:
        pass


if __name__ == "__main__":
    sys.exit(wire.serve(FakeContender))
