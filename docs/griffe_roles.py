"""A griffe extension: Sphinx roles of docstrings, such as ``:class:`Plan```, become code for the site."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|data|func|meth|mod|attr|exc):`~?\.*([^`<]*?)(?:\s*<[^`>]*>)?`")


class PlainRoles(griffe.Extension):
    """Replace each role by its text in code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object, before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
