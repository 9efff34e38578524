"""The peer stable-diffusion.cpp, through its binding ``stable-diffusion-cpp-python``, on a CPU.

Options: ``dtype``, one of "fp32", "fp16" and "q8_0", the type of the weights; ``flash_attention`` and
``direct_convolution``, both off by default, as in the library.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import time
from pathlib import Path
from typing import Any

from .checkpoints import fingerprint, has_nested_names, nest_text_encoder
from .keeping import keep
from .wire import UnsupportedError, versions

TYPES = {"fp32": "f32", "fp16": "f16", "q8_0": "q8_0"}
"""The library's names of the types, by the names of the option."""

SAMPLERS = {"euler": "euler", "euler-a": "euler_a", "dpmpp-2m": "dpm++2m", "ddim": "ddim_trailing"}
"""The library's samplers that compute the same as diffusers' for the same noise levels, by LatentRT's names."""

_SIZES: dict[str, dict[str, Any]] = {
    "unet": {
        "in_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "vae": {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512], "scaling_factor": 0.18215},
    "text_encoder": {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 49408},
}
"""Sizes of Stable Diffusion 1.x, by the configs of a checkpoint's parts. They are constants in the library's source."""

_TRAINED = 1000
_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": _TRAINED,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v"}
_OTHER_SCHEDULES = (
    "trained_betas",
    "rescale_betas_zero_snr",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_flow_sigmas",
    "use_lu_lambdas",
    "thresholding",
)
_WEIGHTS = (
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
_CLIP_TOKENS = 49408
_PACKAGES = ("stable-diffusion-cpp-python", "pillow", "numpy")


class Contender:
    """The library's model, which implements :class:`latentrt.benchmarks.peers.wire.Contender`."""

    def __init__(self) -> None:
        self.model: Any = None

    def open(self, job: dict[str, Any]) -> dict[str, Any]:
        """Load the checkpoint from its folder, which includes quantising it."""
        source = Path(job["source"])
        dtype = job["options"].get("dtype", "fp16")
        if dtype not in TYPES:
            raise UnsupportedError(f"dtype is {dtype!r}, expected one of {', '.join(TYPES)}")
        check_job(job)
        check_checkpoint(source)
        config = _config(source, "scheduler", "scheduler_config.json")
        sigmas(config, job["sampler"], job["steps"])

        begin = time.perf_counter()
        importlib.import_module("numpy")
        library = importlib.import_module("stable_diffusion_cpp")
        imported = time.perf_counter()
        folder, converted = readable_folder(source, Path(job["workspace"]))
        prepared = time.perf_counter()
        # The library counts cores; its binding would take half of the processors, which may be half of the cores.
        threads = job["threads"] or library.stable_diffusion_cpp.sd_get_num_physical_cores()
        flash, direct = (bool(job["options"].get(key)) for key in ("flash_attention", "direct_convolution"))
        try:
            self.model = library.StableDiffusion(
                model_path=str(folder),
                wtype=TYPES[dtype],
                n_threads=threads,
                rng_type="cpu",  # equal to torch's generator
                sampler_rng_type="cpu",
                prediction=_PREDICTIONS[config.get("prediction_type", "epsilon")],
                vae_decode_only=True,
                flash_attn=flash,
                diffusion_conv_direct=direct,
                vae_conv_direct=direct,
                verbose=True,  # to standard error, where it says why it fails
            )
        except ValueError as error:
            raise RuntimeError(f"stable-diffusion.cpp cannot load the checkpoint: {error}") from error
        loaded = time.perf_counter()
        notes = [
            f"weights: {TYPES[dtype]}, but those of convolutions always f16, which are constants of the library",
            f"{threads} threads; images of a request are drawn one after the other, each from a seed one higher",
            "the noise levels are handed to it; it starts from noise times the first of them, s, where diffusers with "
            "timestep_spacing 'leading' takes the square root of s^2 + 1",
            "the seconds of the text encoder are those until the first step",
        ]
        words = tokenizer_size(source)
        if words != _CLIP_TOKENS:
            notes.append(
                f"its words are not this checkpoint's: it has CLIP's {_CLIP_TOKENS} tokens compiled in, the "
                f"checkpoint's tokenizer has {words}, so it draws from another prompt and its quality says nothing"
            )
        return {
            "import_seconds": imported - begin,
            "load_seconds": loaded - prepared,
            "compile_seconds": None,
            "prepare_seconds": prepared - imported if converted else None,
            "versions": versions(*_PACKAGES),
            "device": "cpu",
            "disk_bytes": sum((folder / file).stat().st_size for file in _WEIGHTS),
            "notes": notes,
        }

    def draw(self, request: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
        """Draw the job's images; seconds of steps are those between calls of the library's progress callback."""
        images, steps = request["images"] or job["images"], request["steps"] or job["steps"]
        config = _config(Path(job["source"]), "scheduler", "scheduler_config.json")
        levels = sigmas(config, job["sampler"], steps)
        reports: list[tuple[int, float]] = []
        begin = time.perf_counter()
        pictures = self.model.generate_image(
            prompt=job["prompt"],
            negative_prompt=job["negative_prompt"],
            width=job["width"],
            height=job["height"],
            cfg_scale=max(job["guidance"], 1.0),
            sample_method=SAMPLERS[job["sampler"]],
            sample_steps=steps,
            sigmas=",".join(repr(level) for level in levels),
            eta=1.0 if job["sampler"] == "euler-a" else 0.0,
            seed=job["seed"],
            batch_count=images,
            progress_callback=lambda step, _steps, _seconds: reports.append((step, time.perf_counter())),
        )
        end = time.perf_counter()
        if len(pictures) != images:
            raise RuntimeError(f"stable-diffusion.cpp drew {len(pictures)} images, expected {images}")
        if request["picture"]:
            numpy = importlib.import_module("numpy")
            numpy.save(request["picture"], numpy.stack([numpy.asarray(picture.convert("RGB")) for picture in pictures]))
        return {
            "total": end - begin,
            "text_encoder": reports[0][1] - begin,
            "prompt": None,
            "schedule": None,
            "steps": step_seconds(reports, steps),
            "vae_decoder": end - reports[-1][1],
        }

    def close(self) -> None:
        """Release the model."""
        if self.model is not None:
            self.model.close()
        self.model = None
        gc.collect()


def check_job(job: dict[str, Any]) -> None:
    """Check that the library supports a job; some prompts it would read in another way than diffusers.

    Raises:
        UnsupportedError: if the library does not support it.
    """
    if job["device"] != "cpu":
        raise UnsupportedError("this build of stable-diffusion.cpp runs on processors only")
    if job["sampler"] not in SAMPLERS:
        raise UnsupportedError(
            f"stable-diffusion.cpp has no sampler {job['sampler']!r} that computes what diffusers' does; "
            f"it has {', '.join(SAMPLERS)}"
        )
    if job["width"] % 64 or job["height"] % 64:
        raise UnsupportedError("stable-diffusion.cpp needs widths and heights that are multiples of 64")
    found = sorted(set("()[]<>\\") & set(job["prompt"] + job["negative_prompt"]))
    if found:
        raise UnsupportedError(
            f"stable-diffusion.cpp reads {' '.join(found)} in a prompt as weights, diffusers as text"
        )


def check_checkpoint(source: Path) -> None:
    """Check that a model has Stable Diffusion 1.x's sizes; for others the library would crash or draw nonsense.

    Raises:
        UnsupportedError: if a size differs.
    """
    for part, sizes in _SIZES.items():
        config = _config(source, part, "config.json")
        for key, expected in sizes.items():
            if config.get(key) != expected:
                raise UnsupportedError(
                    f"stable-diffusion.cpp has the sizes of Stable Diffusion 1.x compiled in: {part} {key} is "
                    f"{config.get(key)}, expected {expected}"
                )


def readable_folder(source: Path, workspace: Path) -> tuple[Path, bool]:
    """A folder with the checkpoint under the tensor names that the library knows, and whether it was written now.

    The library reads diffusers' folders, but knows only the older names of the text encoder's tensors.
    """
    if has_nested_names(source):
        return source, False
    target = workspace / f"stable-diffusion-cpp-{fingerprint(source)}"
    return target, keep(target, lambda folder: nest_text_encoder(source, folder)) is not None


def sigmas(config: dict[str, Any], sampler: str, steps: int) -> list[float]:
    """The ``steps`` + 1 noise levels of diffusers' sampler, from a scheduler's config.

    The library's own levels are those of ``timestep_spacing`` "linspace"; for the three spacings see table 2 of Lin et
    al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (https://arxiv.org/abs/2305.08891).

    Raises:
        UnsupportedError: if the config has a schedule that the library does not support.
    """
    for key, expected in _SCHEDULE.items():
        if config.get(key) != expected:
            raise UnsupportedError(f"stable-diffusion.cpp's {key} is {expected}, the checkpoint's is {config.get(key)}")
    for key in _OTHER_SCHEDULES:
        if config.get(key):
            raise UnsupportedError(f"noise levels with {key} are not supported for stable-diffusion.cpp")
    if config.get("prediction_type", "epsilon") not in _PREDICTIONS:
        raise UnsupportedError(f"stable-diffusion.cpp has no prediction_type {config['prediction_type']!r}")
    numpy = importlib.import_module("numpy")
    betas = numpy.linspace(_SCHEDULE["beta_start"] ** 0.5, _SCHEDULE["beta_end"] ** 0.5, _TRAINED) ** 2
    products = numpy.cumprod(1 - betas)
    table = ((1 - products) / products) ** 0.5
    visited = _timesteps(config, sampler, steps)
    last = table[0] if sampler == "ddim" and not config.get("set_alpha_to_one", True) else 0.0
    return [float(level) for level in (*numpy.interp(visited, numpy.arange(_TRAINED), table), last)]


def _timesteps(config: dict[str, Any], sampler: str, steps: int) -> Any:
    """The timesteps that diffusers' class of a sampler derives from ``timestep_spacing``."""
    numpy = importlib.import_module("numpy")
    spacing, offset = config.get("timestep_spacing", "linspace"), config.get("steps_offset", 0)
    # The class of "dpmpp-2m" computes one step more, and leaves out the last.
    count = steps + 1 if sampler == "dpmpp-2m" else steps
    if spacing == "linspace":
        even = numpy.linspace(0, _TRAINED - 1, count)[::-1][:steps]
        return even if sampler in ("euler", "euler-a") else even.round()
    if spacing == "leading":
        return (numpy.arange(count) * (_TRAINED // count))[::-1][:steps] + offset
    if spacing == "trailing":
        return numpy.arange(_TRAINED, 0, -_TRAINED / steps).round() - 1
    raise UnsupportedError(f"timestep_spacing is {spacing!r}, expected 'linspace', 'leading' or 'trailing'")


def step_seconds(reports: list[tuple[int, float]], steps: int) -> list[float]:
    """Seconds of each step, summed over all images, from the calls of the progress callback.

    Args:
        reports: The number of the step that ended, 0 where the first of an image begins, and the time, for each call.
        steps: Number of steps of an image.
    """
    seconds = [0.0] * steps
    for (_, before), (step, now) in itertools.pairwise(reports):
        if step > 0:  # the time before a 0 lies between two images
            seconds[step - 1] += now - before
    return seconds


def tokenizer_size(source: Path) -> int:
    """Number of tokens of a checkpoint's tokenizer."""
    whole, vocabulary = source / "tokenizer" / "tokenizer.json", source / "tokenizer" / "vocab.json"
    if vocabulary.is_file():
        return len(json.loads(vocabulary.read_text(encoding="utf-8")))
    content = json.loads(whole.read_text(encoding="utf-8"))
    added = {token["content"] for token in content.get("added_tokens", [])}
    return len(added | set(content["model"]["vocab"]))


def _config(source: Path, part: str, name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / part / name).read_text(encoding="utf-8"))
    return config
