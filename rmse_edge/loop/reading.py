"""`Reader` for models with a trajectory: every state of whole texts, computed at once as training does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .course import Course, Stop, Watcher
from .dials import Dials
from .stop import stops


class HasTrajectory(Protocol):
    """A model that computes all states of whole texts, (B, T), from an empty past."""

    def trajectory(
        self,
        tokens: Tensor,
        loops: int | None = None,
        stop: Stop | None = None,
        *,
        every: bool = True,
        watcher: Watcher | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """-> (states (B, T, n) after each iteration, gate logits (loops, B, T), depth (B, T)).

        A state is all that `read_out` reads of an iteration. `stop` is given what exit rules compare, (B, T, d), which may be
        a part of it.
        """

    def read_out(self, state: Tensor) -> Tensor:
        """Such a state -> logits, (B, T, V)."""


def stop_of(dials: Dials, logits: Callable[[Tensor], Tensor]) -> Stop | None:
    """Exit rules as a `Stop`; None where all are off. `logits` gives those of states, for the entropy rule."""
    if not dials.exits:
        return None
    scalars = {name: torch.from_numpy(value) for name, value in dials.arrays().items()}

    def stop(k: int, before: Tensor, after: Tensor, log_survival: Tensor) -> Tensor:
        found = logits(after) if dials.exit_entropy else None
        return stops(k, before, after, log_survival, scalars, found)

    return stop


class TrajectoryReader:
    """`Reader` by `trajectory`."""

    def __init__(self, model: Any, dials: Dials, head: nn.Module) -> None:
        """
        Args:
            model: `HasTrajectory`, and `head` of `LoopModel`.
            dials: the model's own.
            head: the layer whose product of a normed state is the logits.
        """
        self.model, self.head = model, head
        self._stop = stop_of(dials, lambda h: model.head(h)["logits"])
        self.exits = self._stop is not None

    def read(
        self,
        tokens: Tensor,
        stop: bool = False,
        loops: int | None = None,
        every: bool = True,
        watcher: Watcher | None = None,
    ) -> Course:
        ends = self._stop if stop else None
        states, gates, depth = self.model.trajectory(tokens, loops, ends, every=every, watcher=watcher)
        return Course(states, depth, gates)

    def logits(self, state: Tensor) -> Tensor:
        return self.head(state)

    def read_by_head(self, state: Tensor) -> Tensor:
        return state
