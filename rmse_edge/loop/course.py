"""A model's course over whole texts, as calibration needs it: every iteration watched, the states of every exit kept.

`Reader` is what an architecture may implement itself (`Arch.reader`); rmse_edge/quantize/reader.py has one for all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# Which of C positions stop, (B, C) bool: stop(k from 0, state before, state after (B, C, d), log_survival (B, C)).
Stop = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Watcher(Protocol):
    """Is told what a model is about to compute. Positions are those of a piece of the text: (B, C)."""

    def begins(self, valid: Tensor) -> None:
        """A piece of the text; `valid` (B, C) bool: positions that are not padding."""

    def iterates(self, active: Tensor, log_survival: Tensor | None, computed: Tensor | None, k: int) -> None:
        """An iteration, k from 0.

        Args:
            active: (B, C) bool, positions that have not stopped.
            log_survival: (B, C), logarithm of the chance that the exit gate has let a position run so far; None: no gate.
            computed: (B, M) the positions that its modules are given, where these are fewer; None: all, or the active ones.
        """

    def ends(self) -> None:
        """The loop is over: what is computed from here on is computed for every valid position."""


@dataclass
class Course:
    """What became of texts (B, T)."""

    # (B, T, n) what the logits are read off: after every iteration, or after the last alone.
    states: list[Tensor]
    depth: Tensor  # (B, T) int64
    gates: Tensor | None  # (K, B, T) the exit gate's logits; None: the model has no gate, or does not say


class Reader(Protocol):
    """Reads whole texts with one model, from an empty past."""

    exits: bool  # whether any of its own exit rules is on

    def read(
        self,
        tokens: Tensor,
        stop: bool = False,
        loops: int | None = None,
        every: bool = True,
        watcher: Watcher | None = None,
    ) -> Course:
        """
        Args:
            tokens: (B, T) int64.
            stop: positions stop by the model's own exit rules; otherwise all run to the end.
            loops: so many, if they are fewer or may be asked for; the trained depth by default.
            every: keep the states of every exit.
        """

    def logits(self, state: Tensor) -> Tensor:
        """(B, T, n) of a course's states -> (B, T, V)."""

    def read_by_head(self, state: Tensor) -> Tensor:
        """(B, T, n) of a course's states -> what the head's weight is multiplied with, (B, T, K)."""
