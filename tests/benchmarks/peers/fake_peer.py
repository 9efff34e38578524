"""A contender that misbehaves as libraries do; tests copy it into a folder with the peers' own modules."""

import os
import sys
from pathlib import Path

from . import wire
from .conversion import converted


class OutOfMemoryError(RuntimeError):
    pass


class Contender:
    def open(self, job):
        if "source" in job:
            made = converted("fake_peer", Path(job["source"]), Path(job["workspace"]), {"fake": "1"})
            return {"prepare_seconds": made.seconds, "notes": made.notes}
        print("library says hello")
        os.system("echo so does its program; cat")
        return {"notes": [job["say"], sys.path[0]]}

    def draw(self, request, job):
        kind = request["picture"]
        if kind == "unsupported":
            raise wire.UnsupportedError("it cannot do this")
        if kind == "memory":
            raise MemoryError
        if kind == "device memory":
            raise OutOfMemoryError("CUDA ran out")
        if kind == "allocator":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
        if kind == "hog":
            return {"total": len(bytearray(os.urandom(64 << 20)))}
        raise ValueError("a message\nof two lines")

    def close(self):
        pass


def convert(source, target):
    print("an exporter says hello")
    if not (source / "model").is_file():
        raise ValueError("no model")
    (target / "converted").write_bytes(b"x")
    return ["it was adapted"]
