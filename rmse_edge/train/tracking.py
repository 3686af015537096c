"""Tasks of a state that follows every token: parity, and addition modulo m (Deletang et al. 2022, arXiv 2207.02098; the tasks of
Mamba-3, arXiv 2603.15569). Trained on short sequences, measured on longer ones.

    tokens    1 0 1 1 0        each a number below m
    targets   1 1 0 1 1        the sum of all until there, modulo m; parity: m = 2

Every position is asked, so a sequence of n positions stands for one of every length up to n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from rmse_edge.schema import Expected

from .sequences import HELD_OUT, Lengths, OfLengths, as_batch, lines, right
from .sources import Batch, Plural, Sized, require

SHORTEST = 3


@dataclass(frozen=True)
class ModularAddition(OfLengths):
    name: ClassVar[str] = "modular_addition"
    shortest: ClassVar[int] = SHORTEST

    modulus: Plural = 5
    train: Annotated[int, Field(ge=SHORTEST, le=2**20)] = 40  # positions of a training sequence, at most
    test: Lengths = (40, 64, 128, 256)  # positions up to which answers are counted, behind those of the length before
    count: Sized = 64  # sequences that are measured

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "test", list(self.test) == sorted(set(self.test)), "lengths that rise")

    @property
    def words(self) -> int:
        return self.modulus

    def draw(self, draw: np.random.Generator, count: int, length: int) -> Batch:
        tokens = draw.integers(0, self.modulus, (count, length))
        return as_batch(tokens, tokens.cumsum(1) % self.modulus)

    def evaluate(self, model: Any) -> dict[str, Any]:
        """Share of right answers by length; `scaled`: 0 for who guesses, 1 for who knows."""
        batch = self.draw(np.random.default_rng((HELD_OUT, 1)), self.count, max(self.test))
        hits, _ = right(model, batch)
        chance, found = 1 / self.modulus, []
        for first, end in zip((0, *self.test), self.test):
            share = float(hits[:, first:end].float().mean())
            found.append({"from": first + 1, "to": end, "right": share, "scaled": (share - chance) / (1 - chance)})
        return {"lengths": found, "chance": chance}

    def curves(self, result: dict[str, Any]) -> tuple[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]:
        return "length, at most", lines(result["lengths"], "to", lambda _: self.name)


@dataclass(frozen=True)
class Parity(ModularAddition):
    name: ClassVar[str] = "parity"

    modulus: Annotated[int, Field(ge=2, le=2), Expected("2")] = 2
