"""Sudoku of 4, 6 or 9: a solver that counts its guesses, boards with one solution, symmetries, rules.

Symbols as in Sudoku-Extreme: 0 padding, 1 a blank cell, d + 1 the digit d.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from hashlib import blake2b

import numpy as np

from rmse_edge.errors import ArgumentError, TextError
from rmse_edge.info import BoardKind

from .game import whole_boards

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows and columns of a box
BLANKS, SEPARATORS = ".0_*", " |+-\t\r\n"
MORE = 5  # givens beyond what one solution needs, at most, of boards that are made


@cache
def units(size: int) -> tuple[tuple[int, ...], ...]:
    """Rows, columns and boxes, as cells."""
    high, wide = BOXES[size]
    span = range(size)
    rows = [tuple(r * size + c for c in span) for r in span]
    columns = [tuple(r * size + c for r in span) for c in span]
    boxes = [
        tuple((top + r) * size + left + c for r in range(high) for c in range(wide))
        for top in range(0, size, high)
        for left in range(0, size, wide)
    ]
    return (*rows, *columns, *boxes)


@cache
def _units_of(size: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    return tuple(tuple(u for u in units(size) if cell in u) for cell in range(size * size))


@cache
def _peers(size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple({p for u in of for p in u} - {cell}) for cell, of in enumerate(_units_of(size)))


class _Search:
    """The fixed solver: singles, in cells and in units, until there are none; then a guess in the cell with fewest digits."""

    def __init__(self, size: int, draw: np.random.Generator | None = None) -> None:
        self.size, self.draw, self.guesses = size, draw, 0

    def place(self, options: list[int], cell: int, bit: int) -> bool:
        """Leave one digit to a cell, with what follows; False: a contradiction. Options are bits, by cell."""
        found = [(cell, bit)]
        while found:
            cell, bit = found.pop()
            if not options[cell] & bit:
                return False
            options[cell] = bit
            for peer in _peers(self.size)[cell]:
                if options[peer] & bit:
                    options[peer] &= ~bit
                    left = options[peer]
                    if not left:
                        return False
                    if left & (left - 1) == 0:
                        found.append((peer, left))
        return True

    def settle(self, options: list[int]) -> bool:
        """Place digits that have one cell left in a unit, until there is none."""
        changed = True
        while changed:
            changed = False
            for unit in units(self.size):
                once = twice = 0
                for cell in unit:
                    twice |= once & options[cell]
                    once |= options[cell]
                if once != (1 << self.size) - 1:
                    return False
                for cell in unit:
                    alone = options[cell] & once & ~twice
                    if alone and options[cell] != alone:
                        if alone & (alone - 1) or not self.place(options, cell, alone):
                            return False
                        changed = True
        return True

    def solutions(self, options: list[int]) -> Iterator[list[int]]:
        if not self.settle(options):
            return
        open_cells = [cell for cell, left in enumerate(options) if left & (left - 1)]
        if not open_cells:
            yield options
            return
        cell = min(open_cells, key=lambda i: options[i].bit_count())
        bits = [1 << d for d in range(self.size) if options[cell] >> d & 1]
        if self.draw is not None:
            self.draw.shuffle(bits)
        for bit in bits:
            self.guesses += 1
            tried = options.copy()
            if self.place(tried, cell, bit):
                yield from self.solutions(tried)


def solved(given: np.ndarray, size: int, most: int = 2) -> tuple[list[np.ndarray], int]:
    """Solutions of a board (cells,), at most so many, and how often the fixed solver guessed to find the first of them."""
    search = _Search(size)
    options = [(1 << size) - 1] * size**2
    for cell, symbol in enumerate(given.tolist()):
        if symbol > 1 and not search.place(options, cell, 1 << (symbol - 2)):
            return [], 0
    found: list[np.ndarray] = []
    guesses = 0
    for answer in search.solutions(options):
        if not found:
            guesses = search.guesses
        found.append(np.array([bit.bit_length() + 1 for bit in answer]))
        if len(found) >= most:
            break
    return found, guesses


class Sudoku:
    """See `Game`."""

    kind: BoardKind = "sudoku"

    def __init__(self, size: int) -> None:
        """
        Raises:
            ArgumentError: no such size.
        """
        if size not in BOXES:
            raise ArgumentError("size", f"got {size}, expected one of {', '.join(map(str, BOXES))}")
        self.size, self.symbols = size, size + 2

    def read(self, text: str, where: str) -> list[np.ndarray]:
        cells = []
        for number, line in enumerate(text.splitlines(), 1):
            for character in line:
                if character in BLANKS:
                    cells.append(1)
                elif character in "123456789":
                    if (digit := int(character)) > self.size:
                        raise TextError(
                            f"{where}, line {number}: {digit} is no digit of a {self.size}x{self.size} Sudoku"
                        )
                    cells.append(digit + 1)
                elif character not in SEPARATORS:
                    raise TextError(
                        f"{where}, line {number}: {character!r} is no cell; expected 1..{self.size}, or . for blank"
                    )
        return whole_boards(cells, self.size**2, where)

    def line(self, cells: np.ndarray) -> str:
        return "".join("?" if s == 0 else "." if s == 1 else str(s - 1) for s in cells.tolist())

    def show(self, cells: np.ndarray, marked: np.ndarray | None = None) -> str:
        high, wide = BOXES[self.size]
        text = self.line(cells)
        rows = []
        for r in range(self.size):
            if r and r % high == 0:
                rows.append("+".join("-" * (2 * wide + (1 if left > 0 else 0)) for left in range(0, self.size, wide)))
            row = ""
            for c in range(self.size):
                cell = r * self.size + c
                before = "| " if c and c % wide == 0 else ""
                row += before + text[cell] + ("*" if marked is not None and marked[cell] else " ")
            rows.append(row.rstrip())
        return "\n".join(rows)

    def broken(self, given: np.ndarray, answer: np.ndarray) -> str | None:
        span = range(self.size)
        for cell in range(self.size**2):
            at = f"row {cell // self.size + 1}, column {cell % self.size + 1}"
            if answer[cell] < 2:
                return f"{at} is left blank"
            if given[cell] > 1 and answer[cell] != given[cell]:
                return f"{at} is given as {given[cell] - 1} and became {answer[cell] - 1}"
        for i, unit in enumerate(units(self.size)):
            digits = answer[list(unit)]
            if len(set(digits.tolist())) < self.size:
                twice = next(int(d) - 1 for d in digits if (digits == d).sum() > 1)
                return f"{('row', 'column', 'box')[i // len(span)]} {i % len(span) + 1} has {twice} twice"
        return None

    def generate(self, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        search = _Search(self.size, draw)
        answer = np.array([b.bit_length() + 1 for b in next(search.solutions([(1 << self.size) - 1] * self.size**2))])
        given = answer.copy()
        for cell in draw.permutation(self.size**2):
            given[cell] = 1
            if len(solved(given, self.size)[0]) != 1:
                given[cell] = answer[cell]
        blank = np.flatnonzero(given == 1)
        more = draw.permutation(blank)[: draw.integers(0, MORE + 1)]
        given[more] = answer[more]
        return given, answer, solved(given, self.size)[1]

    def invariant(self, given: np.ndarray) -> int:
        """Colours of cells, lines, boxes and digits, refined three times by those of what they lie on: what a graph's
        automorphisms cannot change (Weisfeiler and Leman 1968).
        """
        size, symbols = self.size, given.tolist()
        cells = [int(s > 1) for s in symbols]
        digits = [0] * size
        groups = units(size)
        for _ in range(3):
            of_units = [_mix(*sorted(cells[i] for i in unit)) for unit in groups]
            around = [
                (*sorted((of_units[i // size], of_units[size + i % size])), of_units[2 * size + _box(size, i)])
                for i in range(size**2)
            ]
            digits = [_mix(*sorted(cells[i] for i, s in enumerate(symbols) if s == d + 2)) for d in range(size)]
            cells = [_mix(cells[i], *around[i], digits[s - 2] if s > 1 else 0) for i, s in enumerate(symbols)]
        return _mix(size, *sorted(cells), *sorted(digits))

    def augmented(
        self, given: np.ndarray, answer: np.ndarray, draw: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        n, size = len(given), self.size
        high, wide = BOXES[size]
        rows, columns = _lines(n, size, high, draw), _lines(n, size, wide, draw)
        cells = rows[:, :, None] * size + columns[:, None, :]  # (n, size, size): where each cell comes from
        if high == wide:
            turned = draw.random(n) < 0.5
            cells[turned] = cells[turned].transpose(0, 2, 1)
        cells = cells.reshape(n, -1)
        names = np.concatenate(
            [np.tile([0, 1], (n, 1)), draw.permuted(np.tile(np.arange(2, size + 2), (n, 1)), axis=1)], 1
        )
        row = np.arange(n)[:, None]
        return names[row, given[row, cells]], names[row, answer[row, cells]]


def _box(size: int, cell: int) -> int:
    high, wide = BOXES[size]
    return cell // size // high * (size // wide) + cell % size // wide


def _lines(n: int, size: int, together: int, draw: np.random.Generator) -> np.ndarray:
    """n orders of the rows, (n, size), that keep rows of a band together."""
    bands = draw.permuted(np.tile(np.arange(size // together), (n, 1)), axis=1)  # (n, bands)
    inside = draw.permuted(np.tile(np.arange(together), (n, size // together, 1)), axis=2)
    return (bands[:, :, None] * together + inside).reshape(n, size)


def _mix(*numbers: int) -> int:
    return int.from_bytes(blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")
