"""Tables of the manual whose rows tests write from what they measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DOCS = Path(__file__).resolve().parent.parent / "docs"
GATE = 45.0
"""Least PSNR in dB, on uint8 pictures."""


def psnr(pictures: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """PSNR in dB of the worst of some pictures."""
    assert pictures.shape == expected.shape
    errors = np.square(pictures.astype(np.float64) - expected).mean(axis=(1, 2, 3))
    return float(10 * np.log10(255**2 / max(errors.max(), 1e-9)))


class DocTable:
    """A table between two comments of a page; its rows are told apart by their first cells.

    Args:
        page: File in ``docs/``.
        begin: Comment, with the line's end, that the table's head follows.
        end: Comment behind the table.
        order: The first cells of every row, as many as tell it from the others.
    """

    def __init__(self, page: str, begin: str, end: str, order: Sequence[tuple[str, ...]]) -> None:
        self.path, self.begin, self.end, self.order = DOCS / page, begin, end, list(order)

    def key(self, row: Sequence[str]) -> tuple[str, ...]:
        """The cells that tell a row from the others."""
        return tuple(row[: len(self.order[0])])

    def rows(self) -> list[list[str]]:
        """Cells of every row that the page has."""
        text = self.path.read_text(encoding="utf-8")
        lines = text.partition(self.begin)[2].partition(self.end)[0].splitlines()[2:]
        return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]

    def hold(self, row: Sequence[str]) -> None:
        """See that the page has this row; with LATENTRT_WRITE_DOCS=1 write it."""
        if not os.environ.get("LATENTRT_WRITE_DOCS"):
            assert list(row) in self.rows(), f"{self.path.name} has another row; write it with LATENTRT_WRITE_DOCS=1"
            return
        text = self.path.read_text(encoding="utf-8")
        before, _, rest = text.partition(self.begin)
        table, _, after = rest.partition(self.end)
        kept = [each for each in self.rows() if self.key(each) != self.key(row)]
        rows = sorted([*kept, list(row)], key=lambda each: self.order.index(self.key(each)))
        lines = [*table.splitlines()[:2], *(f"| {' | '.join(each)} |" for each in rows)]
        self.path.write_text(f"{before}{self.begin}" + "\n".join(lines) + f"\n{self.end}{after}", encoding="utf-8")
