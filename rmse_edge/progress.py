"""How far long work is: its parts have costs, and what is done of them is told as one share of the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Lock

# Told what is being done, and what share of the whole is done, 0 to 1.
Report = Callable[[str, float], object]


def silent(_: str, __: float) -> None:
    """A `Report` to nobody."""


class Work:
    """Parts that report their steps; several threads may do so at once.

    Args:
        costs: of each part, all in one unit.
    """

    def __init__(self, costs: Mapping[str, float], report: Report) -> None:
        self.costs, self.report = costs, report
        self._total = sum(costs.values()) or 1.0
        self._begun = self._done = 0.0
        self._lock = Lock()

    def start(self, part: str, steps: float) -> Callable[[float], None]:
        """Begin a part of so many steps, those before it are done; to be called with its steps since the last call."""
        each = self.costs[part] / max(steps, 1)
        begun = self._done = self._begun
        self._begun += self.costs[part]

        def note(done: float) -> None:
            with self._lock:
                self._done = min(self._done + done * each, begun + self.costs[part])
                self.report(part, self._done / self._total)

        note(0)
        return note


class Stages:
    """Work that tells only which stage begins: a stage is done when the next one begins.

    Args:
        plan: how the names of the stages begin, in order, and what each costs. A stage that is not in it costs nothing.
    """

    def __init__(self, plan: Sequence[tuple[str, float]], report: Report) -> None:
        self.plan, self.report = plan, report
        self._next = 0
        self._done = 0.0
        self._total = sum(cost for _, cost in plan) or 1.0

    def __call__(self, stage: str) -> None:
        for at in range(self._next, len(self.plan)):
            if stage.startswith(self.plan[at][0]):
                self._done = sum(cost for _, cost in self.plan[:at])
                self._next = at + 1
                break
        self.report(stage, self._done / self._total)
