"""The kinds of adapter, and a model opened with some of them. A new kind is a module here and an entry in the table."""

from __future__ import annotations

from collections.abc import Iterable

from latentrt.engines.errors import InvalidRequestError

from ..model import Model
from ..source.source import Source
from .base import AdapterFiles
from .controlnet import ControlNetFiles
from .ip_adapter import IpAdapterFiles
from .lora import LoraFiles
from .safety_checker import SafetyCheckerFiles
from .tiny_vae import TinyVaeFiles

ADAPTERS: tuple[type[AdapterFiles], ...] = (
    LoraFiles,
    TinyVaeFiles,
    ControlNetFiles,
    IpAdapterFiles,
    SafetyCheckerFiles,
)
"""Kinds of adapter, in the order in which they are put on a model. The order is part of a model's fingerprint: a new
kind is appended."""


def open_model(source: Source, files: Iterable[AdapterFiles] = ()) -> Model:
    """A source with adapters; every file of theirs is checked here.

    Args:
        source: The checked source.
        files: At most one entry of each kind, in any order. Kinds that :data:`ADAPTERS` does not list come last.

    Raises:
        SourceError: if a file is missing, damaged, of a kind that is not supported, or for another model.
        InvalidRequestError: if an adapter does not go with the source, or two entries are of one kind.
    """
    place = {kind: number for number, kind in enumerate(ADAPTERS)}
    given = sorted(files, key=lambda each: place.get(type(each), len(place)))
    kinds = [type(each) for each in given]
    if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
        raise InvalidRequestError(f"{twice[0].title} is given in two ways; give all files of one kind together")
    adapters = []
    for each in given:
        each.check(source)
        adapters.append(each.open(source))
    return Model(source, tuple(adapters))
