"""Mazes: without circles, between two ends that lie as far apart as any two cells do.

Symbols as in Maze-Hard: 0 padding, then "#" a wall, " " free, "S" the start, "G" the goal, "o" the shortest path.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from rmse_edge.errors import ArgumentError, TextError
from rmse_edge.info import BoardKind

from .game import whole_boards

LETTERS = "?# SGo"
WALL, FREE, START, GOAL, PATH = range(1, 6)
SMALLEST, LARGEST = 5, 64


class Maze:
    """See `Game`."""

    kind: BoardKind = "maze"
    symbols = 6

    def __init__(self, size: int) -> None:
        """
        Raises:
            ArgumentError: no such size.
        """
        if not SMALLEST <= size <= LARGEST:
            raise ArgumentError("size", f"got {size}, expected {SMALLEST}..{LARGEST}")
        self.size = size

    def read(self, text: str, where: str) -> list[np.ndarray]:
        cells: list[int] = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue  # between boards; a row has walls at its ends
            whole = len(line) == self.size**2  # as data sets write it
            if len(line) != self.size and not whole:
                raise TextError(f"{where}, line {number}: a row of {len(line)} cells, expected {self.size}")
            for character in line:
                if character not in LETTERS[1:]:
                    raise TextError(
                        f"{where}, line {number}: {character!r} is no cell; expected one of {LETTERS[1:]!r}"
                    )
                cells.append(LETTERS.index(character))
        boards = whole_boards(cells, self.size**2, where)
        for i, board in enumerate(boards, 1):
            if (board == START).sum() != 1 or (board == GOAL).sum() != 1:
                raise TextError(
                    f"{where}: board {i} has {(board == START).sum()} S and {(board == GOAL).sum()} G, expected one of each"
                )
        return boards

    def line(self, cells: np.ndarray) -> str:
        return "".join(LETTERS[s] for s in cells.tolist())

    def show(self, cells: np.ndarray, marked: np.ndarray | None = None) -> str:
        letters = list(self.line(cells))
        if marked is not None:  # behind its letter, as in a Sudoku: what a cell became is seen too
            letters = [letter + "* "[not mark] for letter, mark in zip(letters, marked)]
        return "\n".join("".join(letters[at : at + self.size]) for at in range(0, len(letters), self.size))

    def broken(self, given: np.ndarray, answer: np.ndarray) -> str | None:
        fixed = given != FREE
        changed = np.flatnonzero((answer != given) & (fixed | (answer != PATH)))
        if changed.size:
            at = f"row {changed[0] // self.size + 1}, column {changed[0] % self.size + 1}"
            return f"{at} was {LETTERS[given[changed[0]]]!r} and became {LETTERS[answer[changed[0]]]!r}"
        open_cells = np.isin(answer, (START, GOAL, PATH))
        along = self._steps(open_cells, int(np.flatnonzero(given == START)[0]))
        goal = int(np.flatnonzero(given == GOAL)[0])
        if along[goal] < 0:
            return "the path does not reach the goal"
        shortest = self._steps(given != WALL, int(np.flatnonzero(given == START)[0]))[goal]
        if (length := int(open_cells.sum()) - 1) > shortest:
            return f"{length} cells are marked, where the shortest path has {shortest}"
        return None

    def generate(self, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        size = self.size
        free = np.zeros((size, size), bool)
        at = [(1, 1)]
        free[1, 1] = True
        while at:  # the last cell goes on to a random neighbour, two further, that is not free yet
            r, c = at[-1]
            ways = [(r + y, c + x) for y, x in ((2, 0), (-2, 0), (0, 2), (0, -2))]
            ways = [(y, x) for y, x in ways if 0 < y < size - 1 and 0 < x < size - 1 and not free[y, x]]
            if not ways:
                at.pop()
                continue
            y, x = ways[draw.integers(len(ways))]
            free[y, x] = free[(r + y) // 2, (c + x) // 2] = True
            at.append((y, x))
        passable = free.reshape(-1)
        start = int(self._steps(passable, size + 1).argmax())
        steps = self._steps(passable, start)
        goal = int(steps.argmax())
        given = np.where(passable, FREE, WALL)
        given[start], given[goal] = START, GOAL
        answer = given.copy()
        cell = goal
        while (cell := next(n for n in self._neighbours(cell) if steps[n] == steps[cell] - 1)) != start:
            answer[cell] = PATH
        return given, answer, int(steps[goal])

    def invariant(self, given: np.ndarray) -> int:
        grid = given.reshape(self.size, self.size).astype(np.uint8)
        forms = [np.rot90(g, k).tobytes() for g in (grid, grid.T) for k in range(4)]
        return int.from_bytes(blake2b(min(forms), digest_size=8).digest(), "little")

    def augmented(
        self, given: np.ndarray, answer: np.ndarray, draw: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        cells = np.arange(self.size**2).reshape(self.size, self.size)
        ways = np.stack([np.rot90(g, k).reshape(-1) for g in (cells, cells.T) for k in range(4)])
        chosen = ways[draw.integers(0, 8, len(given))]
        row = np.arange(len(given))[:, None]
        return given[row, chosen], answer[row, chosen]

    def _neighbours(self, cell: int) -> list[int]:
        r, c = divmod(cell, self.size)
        ways = ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))
        return [y * self.size + x for y, x in ways if 0 <= y < self.size and 0 <= x < self.size]

    def _steps(self, passable: np.ndarray, start: int) -> np.ndarray:
        """Of every cell, how many steps it is from `start`; -1: it cannot be reached."""
        steps = np.full(self.size**2, -1)
        steps[start], edge = 0, [start]
        while edge:
            cell = edge.pop(0)
            for n in self._neighbours(cell):
                if passable[n] and steps[n] < 0:
                    steps[n] = steps[cell] + 1
                    edge.append(n)
        return steps
