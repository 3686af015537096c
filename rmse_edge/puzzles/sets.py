"""Sets of boards: made here, and read from the CSV files that Sudoku-Extreme and Maze-Hard are published as.

    source,question,answer,rating        one board per line; `rating` is how hard it is

Training and test boards share no invariant (`Game.invariant`), so none of one is a symmetric form of one of the other.
"""

from __future__ import annotations

import csv
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from rmse_edge.errors import ArgumentError, TextError
from rmse_edge.files import new_file

from .game import Game

TEST_SHARE = 5  # of the invariants, one in so many is of test boards
FIELDS = ("source", "question", "answer", "rating")
PATIENCE = 200  # for each board found: so many in a row that were there already, and there are taken to be no others
LONGEST = 20_000  # of them in a row, at most: of the few new ones that may be left, none comes in any useful time

Line = tuple[int, list[str]]  # of a CSV: its number and its fields


@dataclass(frozen=True)
class Boards:
    """Boards and their answers."""

    given: np.ndarray  # (n, cells) int64
    answer: np.ndarray  # (n, cells) int64
    rating: np.ndarray  # (n,) int64

    def __len__(self) -> int:
        return len(self.given)

    def part(self, rows: np.ndarray | slice) -> Boards:
        return Boards(self.given[rows], self.answer[rows], self.rating[rows])


def made(
    game: Game, train: int, test: int, seed: int, progress: Callable[[int], None] = lambda _: None
) -> tuple[Boards, Boards]:
    """Training and test boards, a function of `seed`; of each class of symmetric boards there is one.

    Raises:
        ArgumentError: there are not as many.
    """
    draw = np.random.default_rng(seed)
    wanted = {False: train, True: test}
    rows: dict[bool, list[tuple[np.ndarray, np.ndarray, int]]] = {False: [], True: []}
    seen: set[int] = set()
    waited = 0
    while any(len(rows[side]) < wanted[side] for side in rows):
        board = game.generate(draw)
        number = game.invariant(board[0])
        side = number % TEST_SHARE == 0
        if number in seen or len(rows[side]) >= wanted[side]:
            waited += 1
            if waited > min(LONGEST, PATIENCE * (1 + len(seen))):
                name, got = ("test", len(rows[True])) if len(rows[True]) < test else ("count", len(rows[False]))
                raise ArgumentError(name, f"{wanted[name == 'test']} boards that differ by more than a symmetry were not "
                                          f"found, only {got}")  # fmt: skip
            continue
        seen.add(number)
        rows[side].append(board)
        waited = 0
        progress(1)
    return _stacked(rows[False]), _stacked(rows[True])


def _stacked(rows: list[tuple[np.ndarray, np.ndarray, int]]) -> Boards:
    return Boards(np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows]), np.array([r[2] for r in rows]))


def write_boards(path: Path, game: Game, boards: Boards, source: str) -> None:
    """Write a CSV, all or nothing."""
    with new_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        for given, answer, rating in zip(boards.given, boards.answer, boards.rating):
            writer.writerow((source, game.line(given), game.line(answer), rating))


def read_boards(path: Path, game: Game, most: int | None = None, seed: int | None = None) -> Boards:
    """The boards of a CSV.

    Args:
        most: no more than so many: the first of them.
        seed: in place of the first, some drawn at random, in the order of the file. Only these are checked: a published file
            has millions of lines.
    Raises:
        TextError: one line names the file, the line and what is wrong with it.
    """
    rows = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = _lines(path, file)
            if most is not None:
                lines = itertools.islice(lines, most) if seed is None else iter(_drawn(lines, most, seed))
            for number, row in lines:
                where = f"{path}, line {number}"
                if len(row) < 3:
                    raise TextError(f"{where}: {len(row)} fields, expected {len(FIELDS)}")
                given, answer = (_one(game, text, f"{where}: {name}") for name, text in zip(FIELDS[1:], row[1:3]))
                if (wrong := game.broken(given, answer)) is not None:
                    raise TextError(f"{where}: its answer is none: {wrong}")
                rows.append((given, answer, int(row[3]) if len(row) > 3 and row[3].strip().isdigit() else 0))
    except FileNotFoundError:
        raise TextError(f"{path}: no such file; expected a CSV of boards") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TextError(f"{path}: cannot be read as a CSV of boards ({error})") from None
    if not rows:
        raise TextError(f"{path}: holds no board")
    return _stacked(rows)


def _lines(path: Path, file: TextIO) -> Iterator[Line]:
    """What stands below the header, but for empty lines, as at the end."""
    lines = csv.reader(file)
    header = next(lines, None)
    if header is None or len(header) < 3 or header[1][:1].lower() != "q":
        raise TextError(f"{path}: expected a CSV whose first line is {','.join(FIELDS)}")
    for row in lines:
        if row:
            yield lines.line_num, row


def _drawn(lines: Iterator[Line], count: int, seed: int) -> list[Line]:
    """`count` of them, all as likely, in their order; no more than these are ever in memory (Vitter's algorithm R)."""
    draw = random.Random(seed)
    kept: list[Line] = []
    for i, line in enumerate(lines):
        if i < count:
            kept.append(line)
        elif (place := draw.randrange(i + 1)) < count:
            kept[place] = line
    return sorted(kept)


def _one(game: Game, text: str, where: str) -> np.ndarray:
    found = game.read(text, where)
    if len(found) != 1:
        raise TextError(f"{where}: {len(found)} boards, expected one")
    return found[0]


def unlike(game: Game, boards: Boards, known: Boards) -> Boards:
    """Those of `boards` that share no invariant with any of `known`: none of them is a symmetric form of one."""
    invariants = {game.invariant(given) for given in known.given}
    return boards.part(np.array([game.invariant(given) not in invariants for given in boards.given], bool))
