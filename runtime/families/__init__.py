"""The families of models that can be run: one small module each, on top of :mod:`.base`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from latentrt.engines.errors import BundleError, InvalidRequestError

from ..bundle.manifest import Manifest
from .base import Family as Family
from .base import Text as Text
from .flux import Flux
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXl
from .sdxl_refiner import StableDiffusionXlRefiner
from .stable_diffusion import StableDiffusion

FAMILIES: Mapping[str, type[Family]] = {
    family.name: family
    for family in (StableDiffusion, StableDiffusionXl, StableDiffusionXlRefiner, StableDiffusion3, Flux)
}
"""Families by the name that a manifest has."""


def family_of(manifest: Manifest) -> Family:
    """What a bundle's family can do.

    Raises:
        BundleError: if the family is unknown, or the manifest's settings are not its own.
    """
    if manifest.family not in FAMILIES:
        raise BundleError(
            f"the bundle is of the family {manifest.family!r}, and this version of latentrt runs "
            f"{', '.join(FAMILIES)}; upgrade latentrt (pip install --upgrade latentrt)"
        )
    return FAMILIES[manifest.family](manifest)


def refuse_foreign(family: Family, options: Iterable[str]) -> None:
    """Refuse options that a family does not have.

    Args:
        family: The family.
        options: Options that were given a value.

    Raises:
        InvalidRequestError: naming the first, and the families that have it.
    """
    for name in options:
        if name not in family.options and name in type(family).options:
            raise InvalidRequestError(
                f"the graphs of this bundle do not give what {name} needs; leave it out, or build from weights"
            )
        if name not in family.options:
            owners = " and ".join(known for known, other in FAMILIES.items() if name in other.options)
            raise InvalidRequestError(f"models of the family {family.name} have no {name}, only {owners}; leave it out")
