"""The families of models that can be run: one small module each, on top of :mod:`.base`."""

from __future__ import annotations

from collections.abc import Iterable

from latentrt.engines.errors import BundleError, InvalidRequestError

from ..bundle.manifest import Manifest
from .base import Family as Family
from .base import Text as Text
from .flux import Flux
from .sd3 import StableDiffusion3
from .sdxl import StableDiffusionXl
from .sdxl_refiner import StableDiffusionXlRefiner
from .stable_diffusion import StableDiffusion

FAMILIES: dict[str, type[Family]] = {
    family.name: family
    for family in (StableDiffusion, StableDiffusionXl, StableDiffusionXlRefiner, StableDiffusion3, Flux)
}
"""Families by their name in a manifest; a further family is one more entry."""


def family_of(manifest: Manifest) -> Family:
    """The family of a bundle, for that bundle.

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
    """Refuse options of a request that a family does not have.

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
