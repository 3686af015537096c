"""A needle in a haystack: one value somewhere in a text of words, asked for later, also in texts longer than those of training.

    w w w ! v w w ... w w ! w w w ... w !        !: the mark; v: the value, which is to be said at every later mark

Words are drawn at random, so only the mark says what is to be kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from .sequences import HELD_OUT, Lengths, OfLengths, as_batch, lines, share_right
from .sources import IGNORED, Batch, Plural, Sized, require

MARK = 0  # then values, then words
SHORTEST = 16
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # where the value stands, of all places before the last mark


@dataclass(frozen=True)
class Needle(OfLengths):
    name: ClassVar[str] = "needle"
    shortest: ClassVar[int] = SHORTEST

    values: Plural = 32
    hay: Plural = 64  # words there are
    questions: Sized = 4  # marks behind the value in training, at most; the last position is one
    train: Annotated[int, Field(ge=SHORTEST, le=2**20)] = 256  # positions of a training sequence, at most
    test: Lengths = (128, 256, 512, 1024)
    count: Sized = 32  # sequences of each length and depth that are measured

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "test", min(self.test) >= SHORTEST, f"lengths of at least {SHORTEST}")

    @property
    def words(self) -> int:
        return 1 + self.values + self.hay

    def draw(self, draw: np.random.Generator, count: int, length: int, depth: float | None = None) -> Batch:
        """
        Args:
            depth: 0: the value stands at the beginning, 1: right before the mark that asks, which then is the last position
                alone; None: anywhere, and it may be asked for several times.
        """
        tokens = draw.integers(1 + self.values, self.words, (count, length))
        targets = np.full((count, length), IGNORED)
        for row, asked in zip(tokens, targets):
            at = int(draw.integers(length - 2)) if depth is None else round(depth * (length - 3))
            value = 1 + int(draw.integers(self.values))
            row[at : at + 2] = MARK, value
            places = [length - 1]
            if depth is None:
                between = draw.permutation(np.arange(at + 2, length - 1))
                places += list(between[: int(draw.integers(self.questions))])
            row[places], asked[places] = MARK, value
        return as_batch(tokens, targets)

    def evaluate(self, model: Any) -> dict[str, Any]:
        """Share of values that are said, by length and depth."""
        found = []
        for length in self.test:
            for i, depth in enumerate(DEPTHS):
                batch = self.draw(np.random.default_rng((HELD_OUT, length, i)), self.count, length, depth)
                found.append({"positions": length, "depth": depth, "right": share_right(model, batch)})
        return {"places": found, "chance": 1 / self.values}

    def curves(self, result: dict[str, Any]) -> tuple[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]:
        return "positions", lines(result["places"], "positions", lambda place: f"depth {place['depth']}")
