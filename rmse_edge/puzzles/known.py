"""The games there are."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from rmse_edge.errors import UserError
from rmse_edge.info import BoardInfo, BoardKind

from .game import Game
from .maze import Maze
from .sudoku import Sudoku


def game_of(kind: BoardKind | None, cells: int) -> Game:
    """The rules of boards of so many cells.

    Raises:
        UserError: there are none of this kind and size.
    """
    if kind is None:
        raise UserError("what its boards are is not known; put puzzle into its config.json (sudoku or maze)")
    size = round(cells**0.5)
    if size * size != cells:
        raise UserError(f"a {kind} has {cells} cells, which is no square")
    return Sudoku(size) if kind == "sudoku" else Maze(size)


def game_of_model(board: BoardInfo) -> Game:
    """The rules of a model's boards.

    Raises:
        UserError: they are not known, or have other symbols than the model.
    """
    game = game_of(board.kind, board.cells)
    if game.symbols != board.symbols:
        raise UserError(f"a {game.kind} of {board.cells} cells has {game.symbols} symbols, the model {board.symbols}")
    return game


@lru_cache(maxsize=8)
def example_board(kind: BoardKind, cells: int) -> tuple[int, ...]:
    """A board with one answer, always the same."""
    return tuple(game_of(kind, cells).generate(np.random.default_rng(0))[0].tolist())
