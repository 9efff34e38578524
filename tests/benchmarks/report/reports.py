"""Reports of benchmarks that were never run, with figures as a run would give them, from a seed."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

REFERENCE = "diffusers-fp32"
HOSTILE = "</script><b onclick=alert(1)>&\"'|`*_<!--]]> \u2028 \N{HEAVY BLACK HEART}"

_CONTENDERS: dict[str, tuple[str, str, dict[str, float], float]] = {
    # label, kind, times relative to the reference, PSNR
    REFERENCE: ("diffusers, fp32", "peer", {"text": 1.0, "step": 1.0, "vae": 1.0, "memory": 1.0}, 100.0),
    "diffusers-fp32-compile": ("diffusers, fp32, torch.compile", "peer", {"text": 0.9, "step": 0.86, "vae": 0.8}, 83.2),
    "diffusers-bf16": ("diffusers, bf16", "peer", {"text": 1.3, "step": 1.62, "vae": 1.5, "memory": 0.7}, 33.9),
    "optimum-onnx": ("Optimum ONNX, fp32", "peer", {"text": 0.7, "step": 0.83, "vae": 0.9, "memory": 1.2}, 74.1),
    "openvino-genai": ("OpenVINO GenAI, fp32", "peer", {"text": 0.5, "step": 0.62, "vae": 0.6, "memory": 0.8}, 58.4),
    "latentrt-onnxruntime": ("LatentRT, ONNX Runtime fp32", "latentrt", {"step": 0.68, "vae": 0.8, "memory": 0.4}, 76),
    "latentrt-openvino": ("LatentRT, OpenVINO fp32", "latentrt", {"step": 0.55, "vae": 0.61, "memory": 0.5}, 72.5),
    "latentrt-openvino-int8": ("LatentRT, OpenVINO INT8", "latentrt", {"step": 0.34, "vae": 0.4, "memory": 0.3}, 31.2),
}
_MISSING = {
    "latentrt-openvino-bf16": (
        "LatentRT, OpenVINO bf16",
        "latentrt",
        "unavailable",
        "the processor has no bf16 instructions (avx512_bf16 or amx_bf16); take fp32 or int8",
    ),
    "stable-diffusion-cpp": (
        "stable-diffusion.cpp, fp32",
        "peer",
        "failed",
        "it ended with signal 6 while it loaded the model: "
        "GGML_ASSERT(tensor->ne[0] == 768) failed, at src/conditioner.hpp:412",
    ),
}
_SIZES: dict[str, dict[str, Any]] = {
    "emoji": {"side": 64, "steps": 20, "step": 0.041, "text": 0.009, "vae": 0.052, "rss": 1.1e9, "flops": 1.9e9},
    "sd15": {"side": 512, "steps": 3, "step": 11.8, "text": 0.31, "vae": 9.6, "rss": 6.8e9, "flops": 1.6e12},
}


def interval(values: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """The median and a bootstrap interval of it."""
    medians = np.median(rng.choice(values, (200, len(values))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


def summary(values: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """What a report says of a stage."""
    p50, p90, p99 = (float(np.quantile(values, q)) for q in (0.5, 0.9, 0.99))
    cv = float(values.std(ddof=1) / values.mean())
    return interval(values, rng) | {"p50": p50, "p90": p90, "p99": p99, "cv": cv, "count": len(values)}


def make(kind: str = "emoji", *, seed: int = 0, rounds: int = 10) -> dict[str, Any]:
    """A report.

    Args:
        kind: ``"emoji"``: all steps were measured. ``"sd15"``: three of twenty, the rest is extrapolated.
        seed: Seed of the noise in the figures.
        rounds: Rounds of each contender.
    """
    rng, size = np.random.default_rng(seed), _SIZES[kind]
    control = 0.05 * np.exp(rng.normal(0, 0.012, rounds))
    contenders = [_measured(name, kind, rounds, rng) for name in _CONTENDERS]
    reference = next(each for each in contenders if each["name"] == REFERENCE)
    for contender in contenders:
        for stage in ("total", "step"):
            mine, theirs = (
                np.array(each["samples"][stage]).reshape(rounds, -1).mean(1) for each in (contender, reference)
            )
            contender["ratios"][stage] = interval(theirs / mine, rng) | {"pairs": rounds}
    contenders += [
        _empty(name, label, kind_) | {"state": state, "reason": reason}
        for name, (label, kind_, state, reason) in _MISSING.items()
    ]
    return {
        "schema": "latentrt-bench/1",
        "created": "2026-11-22T08:30:00Z",
        "complete": True,
        "missing": [],
        "machine": {
            "processor": "AMD EPYC 7763 64-Core Processor",
            "cpus": 2,
            "memory_bytes": 33_656_000_000,
            "system": "Linux 6.1.0-18-amd64, x86_64, glibc 2.36",
            "governor": None,
            "instructions": ["avx2", "fma", "f16c"],
            "gpus": [],
            "python": "3.11.7",
            "latentrt": "0.1.0",
            "load_before": 0.42,
        },
        "model": {
            "name": "emoji" if kind == "emoji" else "stable-diffusion-1.5-size",
            "parameters": {"text_encoder": 3_100_000, "unet": 14_700_000, "vae_decoder": 1_200_000},
            "width": size["side"],
            "height": size["side"],
            "trained": kind == "emoji",
        },
        "job": {
            "prompt": "a red apple",
            "negative_prompt": "",
            "seed": 7,
            "steps": size["steps"],
            "sampler": "euler",
            "guidance": 4.0,
            "width": size["side"],
            "height": size["side"],
            "images": 1,
            "threads": 2,
            "device": "cpu",
        },
        "method": {
            "rounds_asked": rounds,
            "rounds_done": rounds,
            "warm_up": 2,
            "residency": "resident",
            "budget_seconds": None,
            "order": "round-robin, each round rotated by one",
            "confidence": 0.95,
            "resamples": 2000,
        },
        "control": {
            "samples": control.tolist(),
            "what": "a product of two 1024 x 1024 matrices in numpy, fp32, once a round",
            "cv": float(control.std(ddof=1) / control.mean()),
        },
        "reference": {"contender": REFERENCE, "why": "it is what most people run, in full precision"},
        "ceilings": {
            "threads": 2,
            "matmul": {
                "fp32": {"flops_per_second": 1.31e11, "samples": [1.29e11, 1.31e11, 1.32e11], "library": "OpenVINO"},
                "bf16": {"unavailable": "the processor has no bf16 instructions"},
                "int8": {"flops_per_second": 2.9e11, "samples": [2.8e11, 2.9e11], "library": "OpenVINO"},
            },
            "copy": {"bytes_per_second": 2.1e10, "samples": [2.0e10, 2.1e10, 2.2e10]},
        },
        "contenders": contenders,
        "loadgen": [
            {
                "scenario": scenario,
                "valid": valid,
                "result": result,
                "settings": {"batch": 1},
                "notes": ["The run was to last 60 s; MLPerf asks for 600 s."],
                "summary": f"MLPerf Results\nScenario : {scenario}\nResult is : {'VALID' if valid else 'INVALID'}\n",
                "versions": {"mlcommons-loadgen": "5.1.2"},
            }
            for scenario, valid, result in (
                ("SingleStream", True, {"90.0th percentile latency (ns)": 611_204_112, "QPS": 1.71}),
                ("Offline", True, {"Samples per second": 2.41}),
                ("Server", False, {"Scheduled samples per second": 1.52}),
            )
        ],
    }


def picture(shade: int, side: int = 64) -> bytes:
    """A PNG file of a disc."""
    y, x = np.mgrid[:side, :side] / side - 0.5
    disc = (x**2 + y**2 < 0.16)[..., None]
    pixels = np.where(disc, np.stack([230 - 40 * x, 60 + 60 * y + shade, 50 + 0 * x], -1), 255).clip(0, 255)
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def hostile(rounds: int = 4) -> dict[str, Any]:
    """A report in which every text that comes from outside tries to break out of where it is put."""
    report = make(rounds=rounds)
    report["job"] |= {"prompt": HOSTILE, "negative_prompt": HOSTILE + "\n| a | b |\n# heading"}
    report["machine"] |= {"processor": HOSTILE, "system": HOSTILE}
    report["model"]["name"] = HOSTILE
    report["missing"] = [HOSTILE]
    for contender in report["contenders"]:
        contender["label"] = f"{contender['name']} {HOSTILE}"
        contender["notes"] = [HOSTILE]
        contender["versions"] = {HOSTILE: HOSTILE}
        contender["options"] = {HOSTILE: HOSTILE}
        contender["reason"] = HOSTILE if contender["reason"] else None
    report["loadgen"][0]["summary"] = HOSTILE
    return report


def _empty(name: str, label: str, kind: str) -> dict[str, Any]:
    samples = {stage: [] for stage in ("total", "text_encoder", "prompt", "schedule", "step", "vae_decoder")}
    return {
        "name": name,
        "label": label,
        "kind": kind,
        "state": "measured",
        "reason": None,
        "options": {},
        "versions": {},
        "notes": [],
        "cold": None,
        "samples": samples,
        "summary": {},
        "ratios": {},
        "throughput": [],
        "memory": None,
        "disk_bytes": None,
        "build_seconds": None,
        "quality": None,
        "extrapolated": None,
        "roofline": [],
    }


def _measured(name: str, kind: str, rounds: int, rng: np.random.Generator) -> dict[str, Any]:
    label, whose, factors, psnr = _CONTENDERS[name]
    size, ours = _SIZES[kind], whose == "latentrt"
    factors = {"text": 0.5, "memory": 1.0} | factors

    def noisy(seconds: float, shape: tuple[int, ...], cv: float) -> np.ndarray:
        return seconds * np.exp(rng.normal(0, cv, shape))

    common = noisy(1.0, (rounds, 1), 0.02)
    step = common * noisy(size["step"] * factors["step"], (rounds, size["steps"]), 0.03)
    step[:, 0] *= 1.12  # caches are cold after the text encoder
    text = noisy(size["text"] * factors["text"], (rounds,), 0.04)
    vae = noisy(size["vae"] * factors["vae"], (rounds,), 0.03)
    few = noisy(0.001, (rounds,), 0.05) if ours else np.zeros(0)
    total = text + step.sum(1) + vae + 0.003
    tells = name != "openvino-genai"  # it reports steps, but no stages
    contender = _empty(name, label, whose)
    stages = {
        "total": total,
        "text_encoder": text if tells else np.zeros(0),
        "prompt": few,
        "schedule": few,
        "step": step,
        "vae_decoder": vae if tells else np.zeros(0),
    }
    load = 0.3 * size["rss"] / 1e9
    compiles = "openvino" in name or "compile" in name
    rss = int(size["rss"] * factors["memory"])
    contender |= {
        "options": {"dtype": "fp32"},
        "versions": {"python": "3.11.7", "latentrt" if ours else name.split("-")[0]: "0.1.0"},
        "notes": ["torch.compile compiles when it first draws"] if "compile" in name else [],
        "cold": {
            "import": 0.4 if ours else 3.1,
            "load": load,
            "compile": 6.2 if compiles else None,
            "compile_cached": 0.8 if ours and compiles else None,
            "first_picture": float(total[0] * 1.4),
            "process_to_picture": float(total[0] * 1.4 + load + (0.4 if ours else 3.1)),
        },
        "samples": {stage: values.tolist() for stage, values in stages.items()},
        "summary": {stage: summary(values.ravel(), rng) for stage, values in stages.items() if values.size},
        "memory": {"peak_rss_bytes": rss, "loaded_rss_bytes": int(rss * 0.8), "device_peak_bytes": None},
        "disk_bytes": int(size["rss"] * 0.3 * (0.27 if "int8" in name else 1)),
        "build_seconds": 38.5 if ours or "openvino" in name else None,
        "quality": {"psnr": psnr, "ssim": 1.0 if psnr == 100 else 1 - 10 ** (-psnr / 25), "reference": REFERENCE},
        "throughput": [
            {"images": n, "seconds": seconds.tolist(), "per_minute": interval(60 * n / seconds, rng)}
            for n in (1, 2, 4, 8)
            for seconds in [noisy(float(total.mean()) * (0.25 + 0.75 * n), (5,), 0.02)]
            if ours or name == REFERENCE
        ],
    }
    if kind == "sd15":
        whole = text + 20 * step.mean(1) + vae
        contender["extrapolated"] = {"steps": 20, "seconds": interval(whole, rng)}
    if ours:
        precision = "int8" if "int8" in name else "fp32"
        contender["roofline"] = [
            _roof(stage, flops * size["flops"], flops * size["flops"] / intensity, float(np.median(values)), precision)
            for stage, flops, intensity, values in (
                ("text_encoder", 0.03, 4.5, text),
                ("step", 1.0, 41.0, step),
                ("vae_decoder", 1.3, 55.0, vae),
            )
        ]
    return contender


def _roof(stage: str, flops: float, moved: float, seconds: float, precision: str) -> dict[str, Any]:
    peak = {"fp32": 1.31e11, "int8": 2.9e11}[precision]
    ceiling = min(peak, 2.1e10 * flops / moved)
    achieved = min(flops / seconds, 0.97 * ceiling)
    return {
        "stage": stage,
        "flops": flops,
        "bytes": moved,
        "seconds": seconds,
        "calls": 10,
        "achieved_flops": achieved,
        "ceiling_flops": ceiling,
        "percent": 100 * achieved / ceiling,
        "bound": "compute" if ceiling == peak else "memory",
        "precision": precision,
    }
