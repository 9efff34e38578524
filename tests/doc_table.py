"""Tables of the manual whose rows tests write from what they measured."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DOCS = Path(__file__).resolve().parent.parent / "docs"
GATE = 45.0
"""Least PSNR in dB, on uint8 images."""


def psnr(images: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """PSNR in dB of the worst of some images."""
    assert images.shape == expected.shape
    errors = np.square(images.astype(np.float64) - expected).mean(axis=(1, 2, 3))
    return float(10 * np.log10(255**2 / max(errors.max(), 1e-9)))


class DocTable:
    """A table of the manual, kept as ``docs/data/NAME.json``; its rows are told apart by their first cells.

    The site shows it where a page says ``<!-- generated: table NAME -->``, see ``docs/hooks.py``.

    Args:
        name: Name of the file, without its ending.
        order: The first cells of every row, as many as tell it from the others.
    """

    def __init__(self, name: str, order: Sequence[tuple[str, ...]]) -> None:
        self.path, self.order = DOCS / "data" / f"{name}.json", list(order)

    def key(self, row: Sequence[str]) -> tuple[str, ...]:
        """The cells that tell a row from the others."""
        return tuple(row[: len(self.order[0])])

    def rows(self) -> list[list[str]]:
        """Cells of every row that the file has."""
        rows: list[list[str]] = self._table()["rows"]
        return rows

    def hold(self, row: Sequence[str]) -> None:
        """See that the table has this row; with LATENTRT_WRITE_DOCS=1 write it."""
        if not os.environ.get("LATENTRT_WRITE_DOCS"):
            assert list(row) in self.rows(), f"{self.path.name} has another row; write it with LATENTRT_WRITE_DOCS=1"
            return
        kept = [each for each in self.rows() if self.key(each) != self.key(row)]
        rows = sorted([*kept, list(row)], key=lambda each: self.order.index(self.key(each)))
        text = json.dumps({**self._table(), "rows": rows}, indent=2, ensure_ascii=False)
        self.path.write_text(f"{text}\n", encoding="utf-8")

    def _table(self) -> dict[str, Any]:
        table: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return table
