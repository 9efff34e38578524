"""The manual's table of a request's options; ``python -m latentrt.runtime.inputs.options_table`` prints it."""

from __future__ import annotations

from ..families import FAMILIES
from ..request.kinds import Choice
from ..request.options import OPTIONS, Option


def options_table() -> str:
    """A Markdown table with a row for each option: name, values, default, families, meaning."""
    rows = [("Option", "Values", "Default", "Families", "Meaning"), ("---",) * 5]
    rows += [
        (f"`{name}`", _values(option), option.shown_default, families_with(option), _meaning(option))
        for name, option in OPTIONS.items()
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def families_with(option: Option) -> str:
    """Names of the families that have an option; ``all`` if no family lacks it."""
    if not option.by_family:
        return "all"
    owners = [name for name, family in FAMILIES.items() if option.name in family.options]
    return "all" if len(owners) == len(FAMILIES) else ", ".join(f"`{name}`" for name in owners)


def _values(option: Option) -> str:
    """Accepted values: words to choose from, or the kind of value and its bounds."""
    if isinstance(option.kind, Choice):
        return ", ".join(f"`{word}`" for word in option.kind.words)
    return ", ".join(filter(None, (option.kind.noun, option.kind.bounds)))


def _meaning(option: Option) -> str:
    """The option's help and details as sentences."""
    needed = "" if option.needs is None else f" Goes with `{option.needs}`."
    details = f" {option.details}" if option.details else ""
    return f"{option.help[0].upper()}{option.help[1:]}.{details}{needed}"


if __name__ == "__main__":
    print(options_table(), end="")
