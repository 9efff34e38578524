"""The abilities of a bundle, collected from its manifest, its family and its compiled engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from latentrt.engines.errors import BundleError, InvalidRequestError
from latentrt.engines.kinds import KINDS

from .bundle.manifest import IMAGE_ENCODER, SAFETY_CHECKER, Manifest
from .bundle.reader import Bundle
from .components.engine_choice import EngineSettings, graph_for
from .components.opening import components_for
from .components.plans import planned
from .denoising.plain import between_whole
from .families import Family, family_of
from .inputs.create import create_request
from .inputs.starting_image import tasks_of
from .request.control import controlnets_of
from .request.options import MAX_PIXELS, MAX_SIDE
from .samplers import SAMPLERS


def abilities(bundle: Bundle) -> dict[str, Any]:
    """Everything that a request, or :meth:`~latentrt.runtime.pipeline.Pipeline.load`, may ask of a bundle.

    Returns:
        The entries of :meth:`~latentrt.runtime.families.Family.abilities`, and ``tasks``, ``controlnets``,
        ``ip_adapter`` and ``safety_checker`` (whether there is one), ``samplers``, ``sizes`` (the number that sides are
        multiples of, the longest side, and the most pixels of a request), ``loops``, and ``engines``: by each engine
        that could run the bundle its precisions, whether or not it runs on this machine.

    Raises:
        BundleError: if the family is unknown.
    """
    manifest = bundle.manifest
    family = family_of(manifest)
    return {
        **family.abilities(),
        "tasks": tasks_of(family),
        "controlnets": list(controlnets_of(manifest)),
        "ip_adapter": IMAGE_ENCODER in manifest.components,
        "safety_checker": SAFETY_CHECKER in manifest.components,
        "samplers": _samplers(manifest, family, whole=_takes_whole_timesteps(manifest, family)),
        "sizes": {"multiple": family.size_multiple, "longest": family.longest or MAX_SIDE, "pixels": MAX_PIXELS},
        "loops": [loop for loop in ("fused", "plain") if _has(bundle, loop)],
        "engines": _engines(bundle),
    }


def _takes_whole_timesteps(manifest: Manifest, family: Family) -> bool:
    """Whether the denoiser's graphs take timesteps as whole numbers, as some do that others exported."""
    graphs = manifest.components[family.denoiser].graphs.values() if family.denoiser in manifest.components else ()
    return any(spec.name == "timestep" and spec.dtype.startswith("int") for graph in graphs for spec in graph.inputs)


def _samplers(manifest: Manifest, family: Family, *, whole: bool) -> list[str]:
    """Samplers that fit the model's scheduler and prediction type; with ``whole`` those that visit whole timesteps."""
    found, usual = [], create_request(manifest, "", seed=0)
    for name in SAMPLERS:
        try:
            plan = family.plan(dataclasses.replace(usual, sampler=name))
        except InvalidRequestError:
            continue
        if not whole or between_whole(plan) is None:
            found.append(name)
    return found


def _has(bundle: Bundle, loop: str) -> bool:
    try:
        components = components_for(bundle, loop)
    except BundleError:
        return False
    return set(components) <= set(bundle.manifest.components)


def _engines(bundle: Bundle) -> Mapping[str, list[str]]:
    found = {name: [each for each in kind.precisions if _serves(bundle, name, each)] for name, kind in KINDS.items()}
    return {name: precisions for name, precisions in found.items() if precisions}


def _serves(bundle: Bundle, engine: str, precision: str) -> bool:
    """Whether the bundle has every graph or plan that an engine opens."""
    components = components_for(bundle)
    if KINDS[engine].needs_plans:
        return all(precision in planned(bundle, engine, component) for component in components)
    settings = EngineSettings(engine, precision)
    try:
        for component in components:
            graph_for(bundle, component, settings)
    except BundleError:
        return False
    return True
