"""The declaration of an option of a request; :mod:`.options` has one for each."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .kinds import Choice, Kind, Limits


@dataclass(frozen=True)
class Option:
    """An option of a request.

    Attributes:
        help: What it is, as a phrase without a full stop: for the command line, the schema and the manual.
        kind: What it accepts, with its bounds.
        details: Sentences that the schema and the manual add.
        default: The value without it. ``None`` is decided by the bundle or by the other options.
        otherwise: What the value is without it, in words, where ``default`` does not say.
        from_bundle: Whether the bundle's manifest has the default.
        neutral: The value that asks for nothing, where that is not ``default``.
        by_family: Whether some families of models lack it.
        two_predictions: Whether it acts on guidance from two predictions, which some models do not have.
        needs: Another option without which this one means nothing.
        metavar: What the command line calls its value.
        flag: Whether ``latentrt generate`` has it under its own name.
        label: Its entry in a PNG's text: ``None`` makes one of the name, and an empty one leaves it out.
        name: Its name; filled in from the declaration.
        hint: Its type; filled in from the declaration.
    """

    help: str
    kind: Kind
    details: str = ""
    default: Any = None
    otherwise: str = ""
    from_bundle: bool = False
    neutral: Any = None
    by_family: bool = False
    two_predictions: bool = False
    needs: str | None = None
    metavar: str | None = None
    flag: bool = True
    label: str | None = None
    name: str = ""
    hint: Any = None

    @functools.cached_property
    def optional(self) -> bool:
        """Whether ``None`` stands for the default."""
        return types.NoneType in typing.get_args(self.hint)

    @property
    def title(self) -> str:
        """Its entry in a PNG's text; empty if it has none there."""
        return self.name.replace("_", " ").capitalize() if self.label is None else self.label

    @property
    def shown_default(self) -> str:
        """The value of a request without the option, for people."""
        if self.otherwise or self.default is None:
            return self.otherwise or ("the bundle's" if self.from_bundle else "")
        if isinstance(self.default, bool):
            return str(self.default).lower()
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default) or "empty"

    @property
    def summary(self) -> str:
        """Its help, bounds and default; words to choose from are left out unless there are many."""
        listed = isinstance(self.kind, Choice) and not self.kind.many
        default = f"default: {self.shown_default}" if self.shown_default else ""
        notes = "; ".join(filter(None, ("" if listed else self.kind.bounds, default)))
        return f"{self.help} ({notes})" if notes else self.help

    def used(self, value: Any) -> bool:
        """Whether a checked value asks for something that would not happen anyway."""
        return value not in (None, "", self.default if self.neutral is None else self.neutral)

    def value(self, options: Mapping[str, Any], limits: Limits) -> Any:
        """Its checked value for a request.

        Args:
            options: What a caller gives, with or without this option.
            limits: What the bounds depend on.

        Raises:
            InvalidRequestError: if the value is wrong.
        """
        given = options.get(self.name, self.default)
        if given is None and self.from_bundle:
            given = getattr(limits.manifest.defaults, self.name)
        if given is None and self.optional:
            return self.default
        return self.kind.check(self.name, given, limits)
