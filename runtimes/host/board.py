"""A board on any target: a model that is given all cells at once, thinks, and fills them in. Nothing is kept between calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rmse_edge.errors import UserError
from rmse_edge.info import BoardInfo, ModelInfo
from rmse_edge.loop.dials import Dials

from .base import Methods


@dataclass(frozen=True)
class Solved:
    """What a board became."""

    logits: np.ndarray  # (cells, symbols) float32
    depth: np.ndarray  # int64, of everything that stops by itself; (1,) where that is the whole board
    iterations: int  # what the call really cost

    @property
    def cells(self) -> np.ndarray:
        """(cells,) int64: the likeliest symbol of each."""
        return self.logits.argmax(-1)


class BoardRuntime:
    """A looped model that fills in boards, on any target's `Methods`.

    Args:
        loop: the method that iterates.
    """

    def __init__(self, info: ModelInfo, methods: Methods, loop: str = "loop") -> None:
        if info.board is None or info.state:
            what = "is a model of texts" if info.board is None else "keeps something between calls"
            raise ValueError(f"{info.name}: {what}, which no board does")
        self.info, self.board, self.methods, self.loop = info, info.board, methods, loop

    def solve(self, cells: Sequence[int] | np.ndarray, dials: Dials) -> Solved:
        """Fill in one board.

        Args:
            cells: (cells,) symbols, as the model was trained to read them.
        Raises:
            UserError: the board has another size, or a cell holds no symbol of the model.
        """
        given = check_cells(cells, self.board)
        self.info.check(dials)
        chunk = self.board.cells
        feeds: dict[str, Any] = {"board": given[None]} | dials.arrays()
        feeds |= self.methods.run("prelude", chunk, feeds)
        feeds |= self.methods.run(self.loop, chunk, feeds)
        if "coda" in self.info.methods:
            feeds |= self.methods.run("coda", chunk, feeds)
        logits = self.methods.run("head", chunk, feeds)["symbols"]
        return Solved(np.array(logits[0]), np.array(feeds["depth"]), int(feeds["iterations"]))


def check_cells(cells: Sequence[int] | np.ndarray, board: BoardInfo) -> np.ndarray:
    """The cells as (cells,) int64.

    Raises:
        UserError: see `BoardRuntime.solve`.
    """
    given = np.asarray(cells, np.int64)
    if given.shape != (board.cells,):
        raise UserError(f"a board of {given.size} cells; expected {board.cells}")
    if (beyond := given[(given < 0) | (given >= board.symbols)]).size:
        raise UserError(f"cell {beyond[0]} is no symbol of the model (0..{board.symbols - 1})")
    return given
