"""What the rounds gave: a cell for every contestant, test and depth, with the speed of every round or why there is none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from .field import BASELINE, CONTESTANTS


@dataclass
class Cell:
    """One contestant at one test and depth."""

    model: str
    threads: int
    contestant: str
    test: str  # "pp512": tokens of a prompt; "tg128": tokens one by one
    loops: int | None  # of every token; None: it has no loop, or stops by itself
    speeds: dict[int, float] = field(default_factory=dict)  # round -> tokens/s
    mean_loops: float | None = None
    gb_per_s: list[float] = field(default_factory=list)  # of weights that were multiplied with, from wherever they came
    peak_bytes: int | None = None  # resident memory of its process, at most, over all its rows
    file_bytes: int | None = None
    failed: str | None = None  # one line

    @property
    def median(self) -> float | None:
        """Tokens/s."""
        return median(self.speeds.values()) if self.speeds else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """The slowest and the fastest round, tokens/s."""
        return (min(self.speeds.values()), max(self.speeds.values())) if self.speeds else None

    def ratio(self, cells: Iterable[Cell]) -> float | None:
        """Times as fast as llama.cpp: the median over rounds of the ratio within each, so that drift meets both alike."""
        base = next(
            (
                c
                for c in cells
                if (c.model, c.threads, c.test, c.contestant) == (self.model, self.threads, self.test, BASELINE)
            ),
            None,
        )
        if base is None:
            return None
        ratios = [speed / base.speeds[n] for n, speed in self.speeds.items() if n in base.speeds]
        return median(ratios) if ratios else None

    def summary(self, cells: Iterable[Cell]) -> dict[str, Any]:
        """Under stable names."""
        return {
            **asdict(self),
            "title": CONTESTANTS[self.contestant],
            "speeds": [self.speeds[n] for n in sorted(self.speeds)],
            "median": self.median,
            "spread": self.spread,
            "ratio": self.ratio(cells),
            "gb_per_s": median(self.gb_per_s) if self.gb_per_s else None,
        }
