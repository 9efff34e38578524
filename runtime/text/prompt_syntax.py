"""Prompts as people write them: ``(word)``, ``(words:1.2)``, ``[words]``, nested, escaped by ``\\``, with ``BREAK``.

The syntax is that of AUTOMATIC1111's web interface ("Attention/emphasis" in its manual): a pair of round brackets
multiplies the weight of its content by 1.1, a pair of square ones divides it by 1.1, and a number before the closing
round bracket is the factor itself. Factors of nested brackets multiply. A backslash makes a bracket (or backslash) a
mere character. ``BREAK``, in capitals and a word of its own, begins a new chunk of tokens.

Nothing is an error: a closing bracket without an opening one, and a number that is none, are taken literally; a bracket
that is never closed reaches to the end. Time is linear in the length, however deep the brackets are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

EMPHASIS = 1.1
"""Factor of a pair of round brackets without a number, and divisor of a pair of square ones."""
MAX_WEIGHT = 1e3
"""Largest weight, positive or negative; nested brackets would otherwise leave the range of fp32."""

_ROUND, _SQUARE = "(", "["
_TOKEN = re.compile(
    r"\\[\\()\[\]]"  # an escaped character
    r"|:\s{0,16}([+-]?(?:\d{1,16}(?:\.\d{0,16})?|\.\d{1,16}))\s{0,16}\)"  # a factor with its bracket
    r"|(?<!\w)BREAK(?!\w)"
    r"|[()\[\]]"
    r"|[^\\()\[\]:B]+"
    r"|.",
    re.DOTALL,
)


@dataclass(frozen=True)
class Span:
    """A piece of a prompt.

    Attributes:
        text: Text to tokenise, with escapes undone.
        weight: Factor on its tokens' states; 1 changes nothing.
    """

    text: str
    weight: float = 1.0


@dataclass
class _Bracket:
    """An opened bracket: its kind, and how many pieces came before it."""

    kind: str
    first: int


def parse(prompt: str) -> list[list[Span]]:
    """Cut a prompt into pieces of one weight each.

    Args:
        prompt: Any text.

    Returns:
        Sections between ``BREAK``, one at least, each with its pieces in order. Neighbours of equal weight are one
        piece, and none is empty, so that a prompt without syntax is one section with one piece (none if it is empty).
    """
    texts: list[str | None] = []  # None is a break
    factors: dict[int, list[float]] = {}  # by the piece before which they begin to count
    ends: dict[int, list[float]] = {}  # by the piece before which they end
    opened: list[_Bracket] = []

    def close(bracket: _Bracket, factor: float) -> None:
        if bracket.first < len(texts):
            factors.setdefault(bracket.first, []).append(factor)
            ends.setdefault(len(texts), []).append(factor)

    for found in _TOKEN.finditer(prompt):
        token, number = found[0], found[1]
        if number is not None and opened and opened[-1].kind == _ROUND:
            close(opened.pop(), float(number))
        elif number is not None:
            # No round bracket is open that the number could belong to, so all of it is text, its bracket too.
            texts.append(token)
        elif token in (_ROUND, _SQUARE):
            opened.append(_Bracket(token, len(texts)))
        elif token == ")" and opened and opened[-1].kind == _ROUND:
            close(opened.pop(), EMPHASIS)
        elif token == "]" and opened and opened[-1].kind == _SQUARE:
            close(opened.pop(), 1 / EMPHASIS)
        elif token == "BREAK":
            texts.append(None)
        else:
            texts.append(token[1:] if token[0] == "\\" and len(token) > 1 else token)
    for bracket in reversed(opened):
        close(bracket, EMPHASIS if bracket.kind == _ROUND else 1 / EMPHASIS)
    return _sections(texts, _weights(len(texts), factors, ends))


def _weights(count: int, factors: dict[int, list[float]], ends: dict[int, list[float]]) -> Iterator[float]:
    """The weight of each piece: the product of the factors that are open there.

    Brackets are nested, so those that end at a place are the last that began. Products are therefore kept on a stack,
    and nothing is ever divided.
    """
    products = [1.0]
    for place in range(count):
        for _ in ends.get(place, ()):
            products.pop()
        for factor in reversed(factors.get(place, [])):  # the outermost was closed last
            products.append(max(-MAX_WEIGHT, min(MAX_WEIGHT, products[-1] * factor)))
        yield products[-1]


def _sections(texts: Sequence[str | None], weights: Iterator[float]) -> list[list[Span]]:
    """Sections between breaks, with neighbours of equal weight joined; blanks around a break are dropped."""
    sections: list[list[tuple[list[str], float]]] = [[]]
    for text, weight in zip(texts, weights, strict=True):
        if text is None:
            sections.append([])
        elif sections[-1] and sections[-1][-1][1] == weight:
            sections[-1][-1][0].append(text)
        else:
            sections[-1].append(([text], weight))
    joined = [[Span("".join(parts), weight) for parts, weight in section] for section in sections]
    if len(joined) > 1:
        joined = [_stripped(section) for section in joined]
    return joined


def _stripped(section: Sequence[Span]) -> list[Span]:
    """A section without blanks at either end, and without pieces that are empty then."""
    found = list(section)
    if found:
        found[0] = Span(found[0].text.lstrip(), found[0].weight)
        found[-1] = Span(found[-1].text.rstrip(), found[-1].weight)
    return [span for span in found if span.text]
