"""What laying out experts by what is used together saves in reads, and what keeping the hottest in memory for good does to hits.

    python docs/experiments/offload/placement.py exits.npz full.npz

The traces are those of `record.py`. Experts are laid out, and the hottest chosen, by the first half of the tokens; the second half is
replayed with LRU. A read is a run of missing experts that lie one behind the other: of an access of one token, since a call of 64
reads nearly all there are. `pinned` keeps a share of the slots for the experts that the first half used most.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from replay import BUDGETS, Access, Lru, accesses_of, replay

from rmse_edge.export.executorch.placement import places_of

PINNED = (0.0, 0.25, 0.5)  # of the slots


def together(accesses: list[Access], count: int) -> np.ndarray:
    """(count, count), in how many accesses two experts were used."""
    found = np.zeros((count, count), np.int64)
    for _, experts in accesses:
        found[np.ix_(experts, experts)] += 1
    return found


class Watched(Lru):
    """LRU that never lets `pinned` go, and keeps what was missing."""

    def __init__(self, count: int, loops: int, slots: int, pinned: np.ndarray) -> None:
        super().__init__(count, loops, slots)
        self.pinned = pinned

    def rank(self, k: int) -> np.ndarray:
        return np.where(self.pinned, np.inf, self.last)


def missing(accesses: list[Access], count: int, slots: int) -> list[np.ndarray]:
    """What each access has to read, with LRU."""
    last, found = np.full(count, -1), []
    resident = np.zeros(count, bool)
    for now, (_, experts) in enumerate(accesses):
        absent = experts[~resident[experts]]
        found.append(absent)
        last[experts] = now
        resident[absent] = True
        there = np.flatnonzero(resident)
        if len(there) > slots:
            resident[there[np.argsort(last[there], kind="stable")[: len(there) - slots]]] = False
    return found


def reads(absent: list[np.ndarray], places: np.ndarray) -> int:
    return sum(1 + int((np.diff(np.sort(places[experts])) > 1).sum()) for experts in absent if len(experts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path)
    args = parser.parse_args()
    print("| trace | budget | experts read per token | reads, by number | reads, by profile |"
          + "".join(f" hits, {100 * share:g} % pinned |" for share in PINNED) + "\n" + "|---" * (5 + len(PINNED)) + "|")  # fmt: skip
    for file in args.traces:
        trace = dict(np.load(file))
        count, loops, half = int(trace["count"]), trace["experts"].shape[1], len(trace["experts"]) // 2
        before, after = accesses_of(trace["experts"][:half], 1), accesses_of(trace["experts"][half:], 1)
        pairs = together(before, count)
        places = places_of(pairs)
        hottest = np.argsort(-pairs.diagonal(), kind="stable")
        for budget in BUDGETS:
            slots = int(budget * count)
            absent = missing(after, count, slots)
            hits = []
            for share in PINNED:
                pinned = np.isin(np.arange(count), hottest[: int(share * slots)])
                hits.append(replay(Watched(count, loops, slots, pinned), after, slots)[0])
            cells = [sum(map(len, absent)), reads(absent, np.arange(count)), reads(absent, places)]
            print(f"| {file.stem} | {100 * budget:g} % | " + " | ".join(f"{n / half:.2f}" for n in cells) + " | "
                  + " | ".join(f"{100 * h:.1f}" for h in hits) + " |")  # fmt: skip


if __name__ == "__main__":
    main()
