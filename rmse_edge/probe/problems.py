"""Problems whose difficulty is known, as lines of text: to train on, alone or mixed into a text, and to probe with.

    hops       ad bf cg dh ea fc gb he|a3=f     follow a map of letters from a, three times
    addition   47+85=231                        digits from the lowest on, so each can be said as soon as it is known
    brackets   ([]{<=>})                        close what is open

Answers follow the `=` and end with the line. A character is a token where a model's tokenizer has one for each; other tokenizers
cut them as they cut any text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import KINDS

HARDEST = 8  # hops, digits, open brackets
LETTERS = "abcdefgh"
PAIRS = ("()", "[]", "{}", "<>")


@dataclass(frozen=True)
class Problem:
    """A line of text with its end, where its answer begins, and how hard it is, from 1."""

    text: str
    answer: int
    difficulty: int

    @property
    def answered(self) -> str:
        """The answer, without the end of the line."""
        return self.text[self.answer : -1]


def _problem(question: str, answer: str, difficulty: int) -> Problem:
    return Problem(f"{question}={answer}\n", len(question) + 1, difficulty)


def hops(draw: np.random.Generator, difficulty: int) -> Problem:
    """A random permutation of letters, followed `difficulty` times."""
    image = draw.permutation(len(LETTERS))
    order = draw.permutation(len(LETTERS))
    start = at = int(draw.integers(len(LETTERS)))
    for _ in range(difficulty):
        at = int(image[at])
    pairs = " ".join(LETTERS[i] + LETTERS[image[i]] for i in order)
    return _problem(f"{pairs}|{LETTERS[start]}{difficulty}", LETTERS[at], difficulty)


def addition(draw: np.random.Generator, difficulty: int) -> Problem:
    """Two numbers of `difficulty` digits and their sum, the lowest digits first."""
    low = 10 ** (difficulty - 1) if difficulty > 1 else 0
    a, b = (int(draw.integers(low, 10**difficulty)) for _ in range(2))
    backwards = (str(n)[::-1] for n in (a, b, a + b))
    first, second, total = backwards
    return _problem(f"{first}+{second}", total, difficulty)


def brackets(draw: np.random.Generator, difficulty: int) -> Problem:
    """Brackets of four kinds, of which `difficulty` are open at the end; as many pairs were opened and closed between."""
    text, closed = "", difficulty
    open_ones: list[str] = []
    while len(open_ones) < difficulty or closed:
        if closed and draw.random() < 0.5:
            text += str(draw.choice(PAIRS))
            closed -= 1
        elif len(open_ones) < difficulty:
            open_ones.append(str(draw.choice(PAIRS)))
            text += open_ones[-1][0]
    return _problem(text, "".join(pair[1] for pair in reversed(open_ones)), difficulty)


PROBLEMS: dict[str, Callable[[np.random.Generator, int], Problem]] = dict(zip(KINDS, (hops, addition, brackets)))


def drawn(name: str, count: int, seed: int, hardest: int = HARDEST) -> list[Problem]:
    """`count` problems of one kind, as many of every difficulty from 1 on, in random order; a function of `seed`."""
    draw = np.random.default_rng([list(PROBLEMS).index(name), seed])
    return [PROBLEMS[name](draw, 1 + int(i) % hardest) for i in draw.permutation(count)]


def mixed(text: str, share: float, kinds: list[str], seed: int) -> str:
    """A text with problems between its paragraphs, so that they are about `share` of all characters."""
    draw = np.random.default_rng(seed)
    parts, written, problems = [], 0, 0
    for paragraph in text.split("\n\n"):
        while problems < share / (1 - share) * written:
            kind = kinds[int(draw.integers(len(kinds)))]
            problem = PROBLEMS[kind](draw, int(draw.integers(1, HARDEST + 1)))
            parts.append(problem.text.rstrip("\n"))
            problems += len(problem.text) + 1
        parts.append(paragraph)
        written += len(paragraph) + 2
    return "\n\n".join(parts)
