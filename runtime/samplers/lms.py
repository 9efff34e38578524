"""Linear multistep: Adams-Bashforth for unequal steps, as Katherine Crowson's k-diffusion applies it to diffusion."""

from __future__ import annotations

from itertools import islice

from .config import Config, Request
from .lagrange import lagrange_basis
from .plan import Plan, PlanBuilder
from .schedule import noise_schedule, ve_row
from .ve import ve_schedule

ORDER = 4


def lms(config: Config, request: Request) -> Plan:
    """The last four derivatives, extrapolated by the polynomial through them. As diffusers' LMSDiscreteScheduler.

    A run that begins further on (:attr:`Request.begin`) begins with one derivative. That class then weighs it as if
    there were those of the steps before, too, which do not add up to the length of the step.
    """
    levels = ve_schedule(config, request, noise_schedule(config, zero_snr=False), karras_bounds=False)
    builder = PlanBuilder(ORDER)
    x, *history = builder.basis[:ORDER]
    output = builder.basis[ORDER]
    for i, (t, sigma, _) in islice(enumerate(levels.steps()), request.begin, None):
        derivatives = [levels.derivative(x, output, sigma), *history]
        order = min(i + 1 - request.begin, ORDER)
        weights = _weights(levels.sigmas[i + 1 - order : i + 1][::-1].tolist(), float(levels.sigmas[i + 1]))
        latent = x + sum(weight * derivative for weight, derivative in zip(weights, derivatives, strict=False))
        builder.append(t, [latent, *derivatives[: ORDER - 1]], **ve_row(sigma))
    return builder.build(levels.init_scale)


def _weights(sigmas: list[float], following: float) -> list[float]:
    """Integrals from ``sigmas[0]`` to ``following`` of the Lagrange polynomials over ``sigmas``, latest first."""
    # Centred on the latest level, where the polynomials are best conditioned.
    nodes = [sigma - sigmas[0] for sigma in sigmas]
    return [float(lagrange_basis(nodes, i).integ()(following - sigmas[0])) for i in range(len(nodes))]
