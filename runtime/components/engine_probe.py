"""Engines that can run here, their precisions, and the reason where one cannot run."""

from __future__ import annotations

from latentrt.engines.errors import EngineUnavailableError, InvalidRequestError
from latentrt.engines.kind import PRESENT, Availability
from latentrt.engines.kinds import KINDS, kind_of

from ..bundle.manifest import PRECISIONS


def probe(name: str) -> Availability:
    """Look whether an engine can run here, by loading its SDK.

    Args:
        name: A key of :data:`latentrt.engines.kinds.KINDS`.

    Raises:
        InvalidRequestError: if the name is unknown.
    """
    return kind_of(name).probe()


def check_engine(name: str, precision: str | None) -> None:
    """Refuse an engine or a precision that cannot run here, before anything is opened.

    Raises:
        InvalidRequestError: if the name or the precision is unknown, or the engine never computes in it.
        EngineUnavailableError: if something is missing on this machine; the message names it.
    """
    check_precision(name, precision)
    found = probe(name)
    if found.state != PRESENT:
        raise EngineUnavailableError(found.detail)
    kind_of(name).require(precision)


def check_precision(name: str, precision: str | None) -> None:
    """Refuse a precision that no machine could run.

    Raises:
        InvalidRequestError: if the name or the precision is unknown, or the engine never computes in it.
    """
    kind = kind_of(name)
    if precision is None:
        return
    if precision not in PRECISIONS:
        raise InvalidRequestError(f"unknown precision {precision!r}; known precisions: {', '.join(PRECISIONS)}")
    if precision not in kind.precisions:
        others = ", ".join(other.name for other in KINDS.values() if precision in other.precisions)
        raise InvalidRequestError(
            f"{name} does not compute in {precision}; choose {', '.join(kind.precisions)}, "
            f"or one of the engines {others}"
        )
