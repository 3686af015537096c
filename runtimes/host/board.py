"""A board on any target: a model that is given all cells at once, thinks, and fills them in. Nothing is kept between calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rmse_edge.errors import UserError
from rmse_edge.info import BoardInfo, ModelInfo
from rmse_edge.loop.dials import Dials

from .base import Arrays, Methods

BATCHED = ("prelude", "begin", "step", "head")  # what a host calls with several boards at once


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
        largest_batch: boards that the methods of `BATCHED` take together; None: any number.
    """

    def __init__(self, info: ModelInfo, methods: Methods, loop: str = "loop", largest_batch: int | None = 1) -> None:
        if info.board is None or info.state:
            what = "is a model of texts" if info.board is None else "keeps something between calls"
            raise ValueError(f"{info.name}: {what}, which no board does")
        self.info, self.board, self.methods, self.loop = info, info.board, methods, loop
        self.largest_batch = largest_batch

    def solve(self, cells: Sequence[int] | np.ndarray, dials: Dials, puzzle: int = 0) -> Solved:
        """Fill in one board.

        Args:
            cells: (cells,) symbols, as the model was trained to read them.
            puzzle: which of `BoardInfo.puzzles` it is of.
        Raises:
            UserError: the board has another size, or a cell or the puzzle is none of the model's.
        """
        given = check_cells(cells, self.board)
        self.info.check(dials)
        chunk = self.board.cells
        feeds: dict[str, Any] = {"board": given[None]} | dials.arrays() | self.puzzles(puzzle, 1, np.full)
        feeds |= self.methods.run("prelude", chunk, feeds)
        feeds |= self.methods.run(self.loop, chunk, feeds)
        if "coda" in self.info.methods:
            feeds |= self.methods.run("coda", chunk, feeds)
        logits = self.methods.run("head", chunk, feeds)["symbols"]
        return Solved(np.array(logits[0]), np.array(feeds["depth"]), int(feeds["iterations"]))

    def solve_batch(self, boards: np.ndarray, dials: Dials, puzzle: int = 0) -> list[Solved]:
        """Fill in boards (n, cells), together where the engine takes several at once (`largest_batch`): those that have
        stopped leave the batch.

        Raises:
            UserError: as `solve`.
        """
        if self.largest_batch == 1:
            return [self.solve(board, dials, puzzle) for board in boards]
        given = np.stack([check_cells(board, self.board) for board in boards])
        self.info.check(dials)
        run, chunk = self.methods.run, self.board.cells
        feeds: Arrays = {"board": given} | self.puzzles(puzzle, len(given), np.full)
        fixed = {name: np.array(array) for name, array in run("prelude", chunk, feeds).items()}
        begun = run("begin", chunk, fixed)
        carry = {name.removeprefix("first_"): np.array(array) for name, array in begun.items()}
        carry["depth"] = np.zeros(len(given), np.int64)
        rows, answers = np.arange(len(given)), [Solved(np.empty(0), np.empty(0), 0)] * len(given)
        for k in range(dials.max_loops):
            found = run("step", chunk, fixed | carry | dials.arrays() | {"k": np.array(k, np.int64)})
            carry = {name: np.array(found[f"next_{name}"]) for name in carry}
            going = carry["active"] & (k + 1 < dials.max_loops)
            if not going.all():
                logits = run("head", chunk, {"h": carry["h"][~going]})["symbols"]
                for row, own in zip(rows[~going], np.array(logits)):
                    answers[row] = Solved(own, np.array([k + 1]), k + 1)
                rows = rows[going]
                fixed, carry = ({name: array[going] for name, array in part.items()} for part in (fixed, carry))
            if not len(rows):
                break
        return answers

    def steps(self, cells: Sequence[int] | np.ndarray, dials: Dials, puzzle: int = 0) -> Iterator[Solved]:
        """The board after every iteration until it stops. Each is computed from the start, since an engine that has the loop
        in its graph shows the last one alone.
        """
        deepest = self.solve(cells, dials, puzzle)
        for k in range(1, deepest.iterations):
            yield self.solve(cells, replace(dials, max_loops=k, min_loops=min(k, dials.min_loops)), puzzle)
        yield deepest

    def puzzles(self, puzzle: int, count: int, full: Callable[..., Any]) -> dict[str, Any]:
        """What says of `count` boards which puzzle they are of; nothing, where there is one.

        Raises:
            UserError: there is no such puzzle.
        """
        if not 0 <= puzzle < self.board.puzzles:
            raise UserError(f"puzzle {puzzle} is none of the model's (0..{self.board.puzzles - 1})")
        return {} if self.board.puzzles == 1 else {"puzzle": full((count,), puzzle)}


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
