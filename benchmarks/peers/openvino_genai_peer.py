"""The peer OpenVINO GenAI: its ``Text2ImagePipeline`` on a CPU, for models that Optimum Intel converts.

Options: ``precision``, one of "fp32" (weights and arithmetic), "bf16" (weights in 16 bits, arithmetic in bfloat16, on
processors that have it) and "int8" (weights in 8 bits, arithmetic as in "bf16", or in float32 where there is none).
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .checkpoints import fingerprint, folder_bytes, has_nested_names, nest_text_encoder, run_tool
from .keeping import keep
from .wire import UnsupportedError, versions

WEIGHT_FORMATS = {"fp32": "fp32", "bf16": "fp16", "int8": "int8"}
"""Optimum Intel's weight formats, by precision."""

SCHEDULERS = {
    "euler": "EULER_DISCRETE",
    "euler-a": "EULER_ANCESTRAL_DISCRETE",
    "ddim": "DDIM",
    "pndm": "PNDM",
    "lcm": "LCM",
    "flow-euler": "FLOW_MATCH_EULER_DISCRETE",
}
"""Members of ``openvino_genai.Scheduler.Type`` by sampler. Its ``LMS_DISCRETE`` is another name of ``DDIM``."""

_LOADED = ("text_encoder", "unet", "vae_decoder", "tokenizer")
_PACKAGES = ("openvino-genai", "openvino", "openvino-tokenizers", "optimum-intel", "diffusers", "transformers", "torch")
_PLACEHOLDER = "EulerDiscreteScheduler"

# A program in a process of its own: GenAI's generator that equals torch's would import torch, which no user of GenAI
# needs, into the process that is measured.
_NOISE = """
import sys, numpy, torch
seed, count, path, *shape = sys.argv[1:]
generator = torch.Generator("cpu").manual_seed(int(seed))
shape = [int(length) for length in shape]
numpy.save(path, numpy.stack([torch.randn(shape, generator=generator).numpy() for _ in range(int(count))]))
"""


class Contender:
    """GenAI's pipeline, which implements :class:`latentrt.benchmarks.peers.wire.Contender`."""

    def __init__(self) -> None:
        self.genai: Any = None
        self.pipeline: Any = None
        self.folder = Path()
        self.images = 0
        self.properties: dict[str, Any] = {}
        self.noise: dict[tuple[int, int], Any] = {}

    def open(self, job: dict[str, Any]) -> dict[str, Any]:
        """Convert the checkpoint if necessary, load it, and compile it for the job's size."""
        precision = job["options"].get("precision", "fp32")
        if precision not in WEIGHT_FORMATS:
            raise UnsupportedError(f"precision is {precision!r}, expected one of {', '.join(WEIGHT_FORMATS)}")
        check_job(job, _scheduler_config(Path(job["source"])))

        begin = time.perf_counter()
        self.genai = importlib.import_module("openvino_genai")
        core = importlib.import_module("openvino").Core()
        import_seconds = time.perf_counter() - begin

        has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and not has_bf16:
            raise UnsupportedError(
                "this processor has no bfloat16 arithmetic, and OpenVINO would compute in float32 without saying so"
            )
        del core
        bfloat16 = precision != "fp32" and has_bf16
        self.properties = {"INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32"}
        if job["threads"]:
            self.properties["INFERENCE_NUM_THREADS"] = job["threads"]

        begin = time.perf_counter()
        self.folder, converted = converted_folder(Path(job["source"]), Path(job["workspace"]), precision)
        prepared = time.perf_counter()
        loaded = self._load(job, job["images"])
        compiled = time.perf_counter()
        self._noise(job, job["images"], job["steps"])
        return {
            "import_seconds": import_seconds,
            "load_seconds": loaded - prepared,
            "compile_seconds": compiled - loaded,
            "prepare_seconds": prepared - begin if converted else None,
            "versions": versions(*_PACKAGES),
            "device": "cpu",
            "disk_bytes": sum(folder_bytes(self.folder / part) for part in _LOADED),
            "notes": [
                f"weights: {WEIGHT_FORMATS[precision]} as exported by Optimum Intel; arithmetic: "
                + ("bfloat16" if bfloat16 else "float32"),
                "compiled for one size and number of images; another number is loaded and compiled anew, untimed",
                "the seconds of the text encoder are whole milliseconds: GenAI counts them so",
                "the noise is torch's, made in another process, so that torch takes no memory in this one",
            ],
        }

    def draw(self, request: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
        """Draw the job's images; the seconds of the steps are those of GenAI's own metrics."""
        images, steps = request["images"] or job["images"], request["steps"] or job["steps"]
        if images != self.images:
            self._load(job, images)
        settings = {
            "width": job["width"],
            "height": job["height"],
            "num_images_per_prompt": images,
            "num_inference_steps": steps,
            "guidance_scale": job["guidance"],
            "generator": _replay(self.genai, self._noise(job, images, steps)),
        }
        if job["negative_prompt"] and job["guidance"] > 1:  # GenAI refuses a negative prompt without effect
            settings["negative_prompt"] = job["negative_prompt"]
        last_step = 0.0

        def note_time(_step: int, _steps: int, _latent: Any) -> bool:
            nonlocal last_step
            last_step = time.perf_counter()
            return False  # go on

        begin = time.perf_counter()
        try:
            result = self.pipeline.generate(job["prompt"], callback=note_time, **settings)
        except RuntimeError as error:
            raise _translated(error) from error
        pixels = importlib.import_module("numpy").array(result.data)
        end = time.perf_counter()
        if request["picture"]:
            importlib.import_module("numpy").save(request["picture"], pixels)
        metrics = self.pipeline.get_performance_metrics()
        return {
            "total": end - begin,
            "text_encoder": sum(metrics.get_text_encoder_infer_duration().values()) / 1e3,
            "prompt": None,
            "schedule": None,
            "steps": [microseconds / 1e6 for microseconds in metrics.raw_metrics.iteration_durations],
            "vae_decoder": end - last_step,
        }

    def close(self) -> None:
        """Release the pipeline."""
        self.pipeline = None
        gc.collect()

    def _load(self, job: dict[str, Any], images: int) -> float:
        """Load and compile the pipeline for a number of images; returns the time between loading and compiling."""
        self.close()  # a compiled pipeline cannot be reshaped, and two at once may not fit into memory
        try:
            pipeline = self.genai.Text2ImagePipeline(str(self.folder))
            kind = getattr(self.genai.Scheduler.Type, SCHEDULERS[job["sampler"]])
            config = self.folder / "scheduler" / "scheduler_config.json"
            pipeline.set_scheduler(self.genai.Scheduler.from_config(str(config), kind))
            pipeline.reshape(images, job["height"], job["width"], job["guidance"])
            loaded = time.perf_counter()
            pipeline.compile("CPU", **self.properties)
        except RuntimeError as error:
            raise _translated(error) from error
        self.pipeline, self.images = pipeline, images
        return loaded

    def _noise(self, job: dict[str, Any], images: int, steps: int) -> Any:
        """Torch's noise for a job, ``[steps + 1, images, channels, height / factor, width / factor]``.

        The first array is for the latents, the others for the steps of samplers that add noise.
        """
        if (images, steps) not in self.noise:
            channels, factor = latent_shape(Path(job["source"]))
            shape = (images, channels, job["height"] // factor, job["width"] // factor)
            with tempfile.TemporaryDirectory() as folder:
                path = str(Path(folder) / "noise.npy")
                arguments = [str(number) for number in (job["seed"], steps + 1, path, *shape)]
                run_tool("the program that draws noise", [sys.executable, "-c", _NOISE, *arguments], {})
                self.noise[images, steps] = importlib.import_module("numpy").load(path)
        return self.noise[images, steps]


def check_job(job: dict[str, Any], config: dict[str, Any]) -> None:
    """Check that GenAI supports a job; some settings it would ignore without a message.

    Args:
        job: The job.
        config: The config of the checkpoint's scheduler.

    Raises:
        UnsupportedError: if GenAI does not support it.
    """
    if job["device"] != "cpu":
        raise UnsupportedError("OpenVINO has no CUDA devices")
    if job["sampler"] not in SCHEDULERS:
        raise UnsupportedError(f"OpenVINO GenAI has no sampler {job['sampler']!r}; it has {', '.join(SCHEDULERS)}")
    kind = config.get("prediction_type", "epsilon")
    if job["sampler"] == "lcm" and kind != "epsilon":  # GenAI would read memory that it never wrote, and crash
        raise UnsupportedError(f"OpenVINO GenAI's sampler 'lcm' supports models that predict epsilon, not {kind!r}")
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        if config.get(key) and job["sampler"] == "euler-a":  # which ignores them; the other samplers refuse them
            raise UnsupportedError(f"OpenVINO GenAI's sampler 'euler-a' does not know {key}")


def converted_folder(source: Path, workspace: Path, precision: str) -> tuple[Path, bool]:
    """The folder with the checkpoint in GenAI's form, and whether it was converted now.

    The folder depends on the checkpoint's files and on the versions of the packages.
    """
    decides = (f"{name} {version}" for name, version in versions(*_PACKAGES).items())
    weights = WEIGHT_FORMATS[precision]
    target = workspace / f"openvino-genai-{weights}-{fingerprint(source, *decides)}"
    return target, keep(target, lambda folder: _convert(source, folder, weights)) is not None


def _convert(source: Path, folder: Path, weights: str) -> None:
    links = folder / "source"
    links.mkdir()
    model = source
    if not has_nested_names(source):
        nest_text_encoder(source, links)
        model = links
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(model)]
    command += ["--task", "text-to-image", "--library", "diffusers", "--weight-format", weights, str(folder)]
    text = run_tool("optimum-cli", command, {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"})
    if "newly initialized" in text:  # transformers goes on with random weights
        raise RuntimeError("Optimum Intel did not find all weights of the checkpoint under the names that it expects")
    shutil.rmtree(links)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(readable_config(_scheduler_config(source))), encoding="utf-8")


def readable_config(config: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's config that GenAI can read.

    Its JSON parser refuses infinity, which diffusers writes, and it cannot load a pipeline with a class that it does
    not know, even if another class is set afterwards.
    """
    finite = {key: value for key, value in config.items() if not isinstance(value, float) or math.isfinite(value)}
    return {**finite, "_class_name": _PLACEHOLDER}


def latent_shape(source: Path) -> tuple[int, int]:
    """Channels of a checkpoint's latents, and the factor between the sides of images and latents."""
    vae = json.loads((source / "vae" / "config.json").read_text(encoding="utf-8"))
    return vae["latent_channels"], 2 ** (len(vae["block_out_channels"]) - 1)


def _scheduler_config(source: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    return config


def _replay(genai: Any, noise: Any) -> Any:
    """A generator of GenAI that returns the arrays of ``noise`` one after the other."""
    tensor = importlib.import_module("openvino").Tensor

    class Replay(genai.Generator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.left = iter(noise)

        def randn_tensor(self, shape: Any) -> Any:
            """The next array; only in this shape is it the noise that torch would draw."""
            drawn = next(self.left)
            if tuple(shape) != drawn.shape:
                raise ValueError(f"GenAI asks for noise of shape {tuple(shape)}, expected {drawn.shape}")
            return tensor(drawn.copy())

        def next(self) -> float:
            raise NotImplementedError("GenAI asks for single numbers, which are not the ones that torch would draw")

    return Replay()


def _translated(error: RuntimeError) -> Exception:
    """An UnsupportedError for settings that GenAI's message calls unsupported; else the error unchanged."""
    text = str(error)
    if "supported" in text and ("scheduler" in text.lower() or "Parameter '" in text):
        return UnsupportedError(f"OpenVINO GenAI refuses: {' '.join(text.split(':', 3)[-1].split())}")
    return error
