"""Measure how closely exported components agree with their source in torch, and hold them to a gate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentrt.engines import Array, Engine
from latentrt.engines.errors import VerificationError

from ..components import Component
from ..graphs.export import cast_inputs

GATES = {"fp32": 80.0, "fp16": 40.0, "bf16": 25.0, "int8": 18.0, "fp8": 18.0, "int8-weights": 25.0}
"""Least PSNR in dB of every output against torch in fp32, by precision. Usual figures are 105 to 140 dB in fp32, and 55
to 75 dB in fp16."""

_GUIDANCE = 2.0


@dataclass(frozen=True)
class Check:
    """How closely a component agrees with its source.

    Attributes:
        component: Name of the component.
        precision: Precision of the graph.
        psnr: Lowest peak signal-to-noise ratio in dB over outputs and sizes; see :func:`psnr`.
    """

    component: str
    precision: str
    psnr: float


def psnr(reference: Array, received: Array) -> float:
    """Compute the peak signal-to-noise ratio in dB; the peak is the largest magnitude of the reference.

    Args:
        reference: Expected values.
        received: Values to compare.

    Returns:
        Infinity for equal arrays; NaN if the shapes differ or ``received`` has a value that is not finite.
    """
    reference, received = np.asarray(reference, np.float64), np.asarray(received, np.float64)
    if reference.shape != received.shape or not np.isfinite(received).all():
        return math.nan
    error = float(np.sqrt(np.mean(np.square(reference - received))))
    peak = float(np.abs(reference).max())
    return math.inf if error == 0 else 20 * math.log10(peak / error) if peak else -math.inf


def reference_outputs(component: Component, inputs: Mapping[str, Tensor]) -> dict[str, Array]:
    """Run a component's module with torch in fp32, and return its outputs by name."""
    with torch.no_grad():
        results = component.module(*(inputs[name] for name in component.example))
    results = results if isinstance(results, tuple) else (results,)
    return {name: result.float().numpy() for name, result in zip(component.outputs, results, strict=True)}


def other_size(component: Component, *, batch: int = 1, seed: int = 1) -> dict[str, Tensor]:
    """Draw random inputs whose variable lengths, but for the batch, are 1.5 times those of the exported example.

    Args:
        component: The component.
        batch: Number of rows.
        seed: Seed of torch's generator.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    for name, example in component.example.items():
        names = component.dynamic[name]
        shape = [
            batch if names.get(axis) == "batch" else length * 3 // 2 if axis in names else length
            for axis, length in enumerate(example.shape)
        ]
        if example.is_floating_point():
            drawn = torch.rand(shape, generator=generator) * float(example.max() - example.min()) + float(example.min())
            inputs[name] = (
                drawn if name in component.keep_fp32 else torch.randn(shape, generator=generator) * example.std()
            )
        else:
            inputs[name] = torch.randint(int(example.max()) + 1, shape, generator=generator)
    return inputs


def check_component(component: Component, engine: Engine, precision: str) -> Check:
    """Run an engine on the exported example and on another size, and compare its outputs with torch in fp32.

    Args:
        component: The component.
        engine: An opened engine of its graph, which takes fp32 in place of half precision.
        precision: Precision of the graph.

    Raises:
        VerificationError: if an output falls below the gate of ``precision``, is not finite, or is missing.
    """
    if precision not in GATES:
        raise VerificationError(f"{component.name} is {precision}, for which no gate is known ({', '.join(GATES)})")
    worst = math.inf
    for inputs in (dict(component.example), other_size(component)):
        reference = reference_outputs(component, inputs)
        feeds = {name: tensor.numpy() for name, tensor in cast_inputs(component, inputs, "fp32").items()}
        results = engine.run(feeds)
        for name, expected in reference.items():
            value = psnr(expected, results[name]) if name in results else math.nan
            if not value >= GATES[precision]:  # also when it is NaN
                raise VerificationError(
                    f"{component.name} ({precision}) does not compute what its source computes: output {name!r} "
                    f"agrees to {value:.1f} dB, at least {GATES[precision]:.0f} dB are required"
                )
            worst = min(worst, value)
    return Check(component.name, precision, worst)


def check_stages(component: Component, engines: Mapping[str, Engine], precision: str) -> Check:
    """Run one guided step through the stages, and compare its result with guidance over torch's predictions in fp32.

    Steps, for the exported example and for another size:
        1. torch predicts both halves of guidance.
        2. The prompt and schedule stages run, and their results join the inputs of the step.
        3. The step gets an update that returns the guided prediction, or for a ControlNet sums to add to and scales.
        4. The step runs, and its results are compared.

    Args:
        component: The denoiser or ControlNet, with its roles.
        engines: Opened engines of its stages, by name; they take fp32 in place of half precision.
        precision: Precision of the graphs.

    Raises:
        VerificationError: if an input of the step is missing, or a result falls below the gate of ``precision``, is not
            finite, or is missing.
    """
    roles = component.roles
    if roles is None:
        raise VerificationError(f"{component.name} has no stages: it is not a denoiser")
    worst = math.inf
    for inputs in (dict(component.example), other_size(component, batch=2)):
        # Step 1: both halves have the same latents and times, and each its own row of conditioning.
        of_samples = (roles.sample, *roles.time, *roles.latents, *roles.beside)
        first = {n: t[:1] if n in of_samples else t for n, t in inputs.items()}
        both = {n: torch.cat([t, t]) if len(t) == 1 else t for n, t in first.items()}
        reference = reference_outputs(component, both)
        # Step 2.
        sample = np.asarray(first[roles.sample].float().numpy())
        known = {n: t.numpy() for n, t in cast_inputs(component, inputs, "fp32").items()}
        known |= {n: known[n][:1] for n in (*roles.time, *roles.latents, *roles.beside)}
        step = engines[f"{component.name}_step"]
        for name in (f"{component.name}_prompt", f"{component.name}_schedule"):
            if name in engines:
                stage = engines[name]
                rows = {n: known[n] for n in stage.inputs}
                if any(n in roles.vectors for n in rows):
                    rows |= {n: np.repeat(rows[n], 2, axis=0) for n in roles.time if n in rows}
                known |= stage.run(rows)
        # Step 3.
        one = np.ones(1, np.float32)
        known |= {
            "registers": sample[:, None],
            "noise": np.zeros_like(sample),
            "update": np.array([[[0, 1, 0]]], np.float32),
            "input_scale": one,
            "guidance": one * np.float32(_GUIDANCE),
            "guidance_rescale": 0 * one,
            "rows": np.zeros(2, np.int64),
            "unconditional": np.array([0]),
            "conditional": np.array([1]),
        }
        if roles.residuals:
            scales = np.linspace(0.5, 1.5, 2 * len(reference), dtype=np.float32).reshape(2, -1)
            sums = {name: values[::-1] for name, values in reference.items()}
            known |= {"control_scale": scales}
            known |= {name.replace("residual", "sum"): values for name, values in sums.items()}
            expected = {
                name: sums[name] + scales[:, number, None, None, None] * values
                for number, (name, values) in enumerate(reference.items())
            }
        else:
            unconditional, conditional = np.split(reference[roles.prediction], 2)
            expected = {"updated_registers": unconditional + _GUIDANCE * (conditional - unconditional)}
        if missing := [n for n in step.inputs if n not in known]:
            raise VerificationError(f"{component.name} in stages needs {missing[0]!r}, which no stage computes")
        # Step 4.
        found = step.run({n: known[n] for n in step.inputs})
        if not roles.residuals:
            found = {name: values[:, 0] for name, values in found.items()}
        figures = [psnr(values, found[name]) if name in found else math.nan for name, values in expected.items()]
        value = math.nan if any(map(math.isnan, figures)) else min(figures)
        if not value >= GATES[precision]:
            raise VerificationError(
                f"{component.name} in stages ({precision}) does not compute what its source computes: a guided step "
                f"agrees to {value:.1f} dB, at least {GATES[precision]:.0f} dB are required"
            )
        worst = min(worst, value)
    return Check(component.name, precision, worst)


def heavy_weight(component: Component) -> str | None:
    """Return the name of the first weight that exceeds the range of fp16; ``None`` if there is none."""
    limit = torch.finfo(torch.float16).max
    for path, weight in component.module.named_parameters():
        if weight.numel() and float(weight.abs().max()) > limit:
            return path
    return None
