"""The peer diffusers: its StableDiffusionPipeline on PyTorch, eager or compiled, in the environment ``diffusers``.

Options: ``dtype`` (``"fp32"``, ``"fp16"``, ``"bf16"``), ``compile`` (True, or a mode of ``torch.compile``) and
``channels_last`` (a memory layout in which convolutions may be faster).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import wire
from .drawing import CudaClock, Drawing, HostClock, check_options, scheduler
from .keeping import MARKER

_OPTIONS: dict[str, tuple[Any, ...]] = {
    "dtype": ("fp32", "fp16", "bf16"),
    "compile": (False, True, "reduce-overhead", "max-autotune"),
    "channels_last": (False, True),
}


class Contender:
    """diffusers' pipeline, which reads the checkpoint without conversion."""

    def __init__(self) -> None:
        self._drawing: Drawing | None = None
        self._device = "cpu"
        self._cache: CompileCache | None = None

    def open(self, job: dict[str, Any]) -> dict[str, Any]:
        """Load the pipeline; torch.compile compiles later, in the first draw of a size."""
        options, source = job["options"], Path(job["source"])
        check_options(options, _OPTIONS)
        compiled, notes = options.get("compile", False), []
        if compiled:  # before the import of PyTorch, which reads the folder of its cache
            self._cache = CompileCache(
                Path(job["workspace"]), json.dumps([str(source.resolve()), options, job["threads"]])
            )
            notes.append(self._cache.open())
        begin = time.perf_counter()
        import torch
        from diffusers import StableDiffusionPipeline

        imported = time.perf_counter()
        self._device = job["device"]
        if self._device == "cuda" and not torch.cuda.is_available():
            raise wire.UnsupportedError(f"PyTorch {torch.__version__} finds no CUDA device")
        if job["threads"]:
            torch.set_num_threads(job["threads"])
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[options.get("dtype", "fp32")]
        pipe = StableDiffusionPipeline.from_pretrained(
            source,
            torch_dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
        )
        pipe.scheduler = scheduler(job["sampler"], pipe.scheduler.config)
        pipe.to(self._device)
        if options.get("channels_last"):
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.vae.to(memory_format=torch.channels_last)
        if compiled:
            mode = None if compiled is True else compiled
            pipe.unet.compile(mode=mode)
            pipe.vae.decoder.compile(mode=mode)
        self._drawing = Drawing(pipe, CudaClock() if self._device == "cuda" else HostClock())
        if self._device == "cuda":
            torch.cuda.synchronize()
        return {
            "import_seconds": imported - begin,
            "load_seconds": time.perf_counter() - imported,
            "compile_seconds": None,
            "prepare_seconds": None,
            "versions": wire.versions("diffusers", "transformers", "torch"),
            "device": torch.cuda.get_device_name() if self._device == "cuda" else "cpu",
            "disk_bytes": _weights(source),
            "notes": notes,
            **self._device_memory(),
        }

    def draw(self, request: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
        """Draw the job's images."""
        if self._drawing is None:
            raise RuntimeError("nothing is open")
        with self._cache.in_use() if self._cache is not None else contextlib.nullcontext():
            answer = self._drawing.draw(request, job)
        return {**answer, **self._device_memory()}

    def close(self) -> None:
        """Release the pipeline."""
        self._drawing = None

    def _device_memory(self) -> dict[str, Any]:
        if self._device != "cuda":
            return {}
        import torch

        return {"device_peak_bytes": torch.cuda.max_memory_allocated()}


class CompileCache:
    """The compiled code of torch.compile, kept in the workspace from one process to the next.

    A process that is killed while it compiles leaves broken files, on which torch.compile would fail from then on. So
    the folder has a marker except during a draw, and a folder without one is emptied.

    Args:
        workspace: The job's workspace.
        key: Everything that decides the code besides PyTorch, which checks that itself.
    """

    def __init__(self, workspace: Path, key: str) -> None:
        self._folder = workspace / f"torch-compile-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self._marker = self._folder / MARKER
        self._lock: int | None = None

    def open(self) -> str:
        """Make torch.compile keep its code here; returns a sentence on the code that is there already.

        While another process uses the folder, this one uses a temporary folder.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(f"{self._folder}.lock", os.O_RDWR | os.O_CREAT, 0o644)  # until the process ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._temporary = tempfile.TemporaryDirectory(prefix="torch-compile-")
            self._folder = Path(self._temporary.name)
            self._marker = self._folder / MARKER
        found = self._marker.is_file()
        if not found:
            shutil.rmtree(self._folder)
            self._folder.mkdir()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self._folder / "inductor")
        os.environ["TRITON_CACHE_DIR"] = str(self._folder / "triton")
        state = "held code from before" if found else "was empty"
        return f"torch.compile compiles in the first request of a size; its cache {state}."

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """A context for everything that may compile."""
        self._marker.unlink(missing_ok=True)
        yield
        self._marker.touch()


def _weights(source: Path) -> int:
    """Size of the weights that are loaded, in bytes; files of a variant (``model.fp16.safetensors``) do not count."""
    files = [path for part in ("text_encoder", "unet", "vae") for path in (source / part).glob("*.safetensors")]
    return sum(path.stat().st_size for path in files if path.stem.count(".") == 0)
