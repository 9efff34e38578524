"""The peer Optimum: its ORTStableDiffusionPipeline on ONNX Runtime, fp32 on the CPU, in ``optimum-onnx``.

Its environment has transformers 4, which cannot read two parts of a checkpoint that transformers 5 writes. So it reads
a copy in which they are adapted:

- The tokenizer's class needs ``vocab.json`` and ``merges.txt``, whose contents are in ``tokenizer.json``.
- The text encoder's weights must be named ``text_model.<name>``; under ``<name>`` random ones would replace them.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from . import wire
from .checkpoints import NESTED
from .conversion import converted
from .drawing import Drawing, HostClock, check_options, scheduler, size

_PACKAGES = ("optimum-onnx", "onnxruntime", "diffusers", "transformers", "torch")


class Contender:
    """Optimum's pipeline, which runs graphs that Optimum exported."""

    def __init__(self) -> None:
        self._drawing: Drawing | None = None

    def open(self, job: dict[str, Any]) -> dict[str, Any]:
        """Export the checkpoint if necessary, and load it."""
        check_options(job["options"], {"dtype": ("fp32",)})
        if job["device"] != "cpu":
            raise wire.UnsupportedError("Optimum's environment has ONNX Runtime for the CPU, not for a GPU")
        found = wire.versions(*_PACKAGES)
        model = converted("optimum_onnx_peer", Path(job["source"]), Path(job["workspace"]), found)
        begin = time.perf_counter()
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTStableDiffusionPipeline  # type: ignore[import-not-found,unused-ignore]

        imported = time.perf_counter()
        settings = onnxruntime.SessionOptions()
        if job["threads"]:
            settings.intra_op_num_threads = job["threads"]
            torch.set_num_threads(job["threads"])
        pipe = ORTStableDiffusionPipeline.from_pretrained(
            model.folder,
            export=False,
            provider="CPUExecutionProvider",
            session_options=settings,
            local_files_only=True,
        )
        pipe.scheduler = scheduler(job["sampler"], pipe.scheduler.config)
        self._drawing = Drawing(pipe, HostClock())
        return {
            "import_seconds": imported - begin,
            "load_seconds": time.perf_counter() - imported,
            "compile_seconds": None,
            "prepare_seconds": model.seconds,
            "versions": found,
            "device": "cpu",
            "disk_bytes": size(model.folder, "*.onnx", "*.onnx_data"),
            "notes": [*model.notes, "Optimum opens the VAE's encoder too, which a job does not need."],
        }

    def draw(self, request: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
        """Draw the job's images."""
        if self._drawing is None:
            raise RuntimeError("nothing is open")
        return self._drawing.draw(request, job)

    def close(self) -> None:
        """Release the sessions."""
        self._drawing = None


def convert(source: Path, target: Path) -> list[str]:
    """Export a checkpoint with Optimum's own exporter; returns the adaptations, a sentence each."""
    from optimum.exporters.onnx import main_export  # type: ignore[import-not-found,unused-ignore]

    adapted = target / "source"
    notes = adapt(source, adapted)
    main_export(
        str(adapted),
        target,
        task="text-to-image",
        library_name="diffusers",
        dtype="fp32",
        no_post_process=True,
        do_validation=False,
        local_files_only=True,
    )
    shutil.rmtree(adapted)
    return notes


def adapt(source: Path, target: Path) -> list[str]:
    """Make a checkpoint that transformers 4 reads, with links to all parts that need no change.

    Returns:
        The changes, a sentence each.

    Raises:
        UnsupportedError: if the text encoder's weights are not in one safetensors file.
    """
    from safetensors.torch import load_file, save_file

    for part in ("text_encoder", "tokenizer"):
        (target / part).mkdir(parents=True)
    for path in source.iterdir():
        if path.name in ("model_index.json", "scheduler", "unet", "vae"):
            (target / path.name).symlink_to(path.resolve())
    for path in (source / "tokenizer").iterdir():
        (target / "tokenizer" / path.name).symlink_to(path.resolve())
    notes = []
    if not (source / "tokenizer" / "vocab.json").exists():
        _write_vocabulary(source / "tokenizer" / "tokenizer.json", target / "tokenizer")
        notes.append(
            "Optimum's transformers 4 reads the tokenizer from vocab.json and merges.txt, made of tokenizer.json."
        )
    encoder = source / "text_encoder"
    (target / "text_encoder" / "config.json").symlink_to((encoder / "config.json").resolve())
    weights = encoder / "model.safetensors"
    if not weights.is_file():
        raise wire.UnsupportedError(f"{encoder} has no model.safetensors")
    copy = target / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    if any(name.startswith(NESTED) for name in tensors):
        copy.symlink_to(weights.resolve())
    else:
        save_file({NESTED + name: tensor for name, tensor in tensors.items()}, copy, {"format": "pt"})
        notes.append(
            "Optimum's transformers 4 reads the text encoder's weights under names that begin with text_model."
        )
    return notes


def _write_vocabulary(tokenizer: Path, target: Path) -> None:
    """Write the vocabulary and the merges of a ``tokenizer.json`` as the files of CLIP's own code.

    Source: https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py, which skips the first line of merges.
    """
    model = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]
    pairs = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    (target / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (target / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
