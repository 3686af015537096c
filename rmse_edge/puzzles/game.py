"""What a host, a data set and a trainer ask of a kind of board. Cells are symbols as published data sets number them."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from rmse_edge.errors import TextError
from rmse_edge.info import BoardKind


class Game(Protocol):
    """Boards of one kind and size. Symbol 0 is padding and stands in no board."""

    kind: BoardKind
    size: int  # cells of a side
    symbols: int

    def read(self, text: str, where: str) -> list[np.ndarray]:
        """The boards of a text as people write them, (cells,) int64 each.

        Raises:
            TextError: one line: there is none, one is incomplete, or a character stands for nothing.
        """

    def show(self, cells: np.ndarray, marked: np.ndarray | None = None) -> str:
        """A board as people write it; `marked` (cells,) bool are set apart."""

    def line(self, cells: np.ndarray) -> str:
        """A board as data sets write it: one character per cell."""

    def broken(self, given: np.ndarray, answer: np.ndarray) -> str | None:
        """Which rule an answer breaks, in words; None: it solves the board. Exact."""

    def generate(self, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        """A board with one answer, its answer, and how hard it is."""

    def invariant(self, given: np.ndarray) -> int:
        """A number below 2^64 that all boards share which symmetries make of this one: other numbers, other boards."""

    def augmented(
        self, given: np.ndarray, answer: np.ndarray, draw: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Boards (n, cells) and their answers, each by a random symmetry of its own."""


def whole_boards(cells: list[int], count: int, where: str) -> list[np.ndarray]:
    """Cells in reading order as boards of `count`.

    Raises:
        TextError: there are none, or cells are left over.
    """
    if not cells:
        raise TextError(f"{where}: holds no board; expected {count} cells")
    if left := len(cells) % count:
        which = "a board" if len(cells) < count else f"board {len(cells) // count + 1}"
        raise TextError(f"{where}: {which} has {left} cells, expected {count}")
    return list(np.array(cells, np.int64).reshape(-1, count))
