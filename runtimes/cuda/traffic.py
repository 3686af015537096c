"""Bytes that calls of a model read from memory (reads.py says which), for a roofline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .dry import Graph, dry_run
from .reads import Reads

ITERATION, ONCE = "step ", ("prelude", "begin", "coda", "head", "commit")


@dataclass(frozen=True)
class Traffic:
    """Bytes read by the calls of a model, by rows of a call and recording."""

    read: Mapping[int, Mapping[str, int]]

    def of_call(self, chunk: int, iterations: float) -> float:
        """Bytes of one call of `chunk` rows; of a mean number of iterations the mean, where iterations read alike."""
        of = self.read[chunk]
        steps = [nbytes for name, nbytes in of.items() if name.startswith(ITERATION)]
        whole = int(iterations)
        part = (iterations - whole) * steps[whole] if whole < len(steps) else 0.0
        return sum(of.get(name, 0) for name in ONCE) + sum(steps[:whole]) + part

    def of_iteration(self, chunk: int) -> int:
        """Bytes of the first iteration: what would have to lie in a cache for the others to come from there."""
        return self.read[chunk][f"{ITERATION}0"]


def traffic(model: Any, held: Mapping[str, Any] | None = None) -> Traffic:
    """Count a model's reads.

    Args:
        model: on any device, or on none.
        held: as in `dry_run`.
    """
    found: dict[int, dict[str, int]] = {}

    def note(graph: Graph, reads: Reads) -> None:
        found.setdefault(graph.chunk, {})[graph.name] = reads.taken()

    dry_run(model, held, note)
    return Traffic(found)
