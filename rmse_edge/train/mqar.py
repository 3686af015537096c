"""Multi-query associative recall as published (Arora et al. 2023, Zoology, arXiv 2312.04927; its code's `multiquery_ar`).

    k1 v1 k2 v2 ... | x x k2 x x x k1 x ...       x: any token
    pairs             queries: the model is to say the value of the key it has just read

Keys and values of a sequence are drawn without repetition from the two halves of the vocabulary. A query stands an even number of
positions, 2 g, behind the pairs; g is drawn by a power law, with weights a g^(a - 1), so that most keys are asked for soon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from rmse_edge.schema import Expected

from .sequences import HELD_OUT, Sequences, as_batch, lines, share_right
from .sources import IGNORED, Batch, Plural, Seed, Sized, require

# Positions and pairs.
Setting = tuple[Plural, Sized]
Settings = Annotated[tuple[Setting, ...], Field(min_length=1), Expected("a list of [positions, pairs]")]


@dataclass(frozen=True)
class Mqar(Sequences):
    """Token 0 is no key: the published code marks with it what is to be filled."""

    name: ClassVar[str] = "mqar"

    tokens: Annotated[int, Field(ge=4, le=2**20)] = 8192  # that there are
    train: Settings = ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))
    test: Settings = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 64))
    power: Annotated[float, Field(gt=0, le=1), Expected("a number above 0, at most 1")] = 0.01  # a; 1: all gaps alike
    count: Sized = 64  # sequences of each setting that are measured

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train", "test"):
            even = all(length % 2 == 0 and 4 * pairs <= length for length, pairs in getattr(self, name))
            require(self, name, even, "even numbers of positions, at least 4 for each pair")
        most = max(pairs for _, pairs in (*self.train, *self.test))
        require(self, "tokens", self.tokens // 2 - 1 >= most, f"at least {2 * most + 2}, of which half are keys")

    @property
    def longest(self) -> int:
        return max(length for length, _ in (*self.train, *self.test))

    @property
    def words(self) -> int:
        return self.tokens

    def batch(self, count: int, seed: Seed) -> Batch:
        draw = np.random.default_rng(seed)
        return self.draw(draw, count, *self.train[int(draw.integers(len(self.train)))])

    def validation(self, count: int) -> Batch:
        """Of the last setting of training."""
        return self.draw(np.random.default_rng(HELD_OUT), count, *self.train[-1])

    def draw(self, draw: np.random.Generator, count: int, length: int, pairs: int) -> Batch:
        """`count` sequences of `length` positions with so many pairs."""
        half, rows = self.tokens // 2, np.arange(count)[:, None]
        keys, values = (
            first + np.stack([draw.permutation(many)[:pairs] for _ in range(count)])
            for first, many in ((1, half - 1), (half, self.tokens - half))
        )
        tokens = draw.integers(0, self.tokens, (count, length))
        targets = np.full((count, length), IGNORED)
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        weights = np.arange(1, (length - 2 * pairs) // 2 + 1) ** (self.power - 1.0)
        # One after the other without repetition, by these weights: the first of exponential times with such rates.
        gaps = np.argsort(draw.exponential(size=(count, len(weights))) / weights, 1)[:, :pairs]
        tokens[rows, 2 * pairs + 2 * gaps], targets[rows, 2 * pairs + 2 * gaps] = keys, values
        return as_batch(tokens, targets)

    def evaluate(self, model: Any) -> dict[str, Any]:
        """Share of queries that are answered, by setting."""
        found = []
        for length, pairs in self.test:
            batch = self.draw(np.random.default_rng((HELD_OUT, length, pairs)), self.count, length, pairs)
            found.append({"positions": length, "pairs": pairs, "right": share_right(model, batch)})
        return {"settings": found, "chance": 1 / (self.tokens - self.tokens // 2)}

    def curves(self, result: dict[str, Any]) -> tuple[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]:
        return "pairs", lines(result["settings"], "pairs", lambda setting: f"{setting['positions']} positions")
