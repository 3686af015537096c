"""What each policy for a cache of experts would have found in it, replaying what `record.py` recorded.

    python docs/experiments/offload/replay.py exits.npz full.npz

A policy says which experts leave when others must come in. A budget is a share of all experts. One access is a loop of a call: all
experts that its rows use, at once; what is missing is read, in waves where there is more than fits. The hit rate is the share of
experts that were there. `optimum` knows the future (Belady 1966: whatever is needed last leaves). The second table asks how good the
guesses are that a prefetch for loop k + 1 could be made from while loop k computes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

BUDGETS = (0.125, 0.25, 0.5, 0.75)
Access = tuple[int, np.ndarray]  # the loop, and the different experts that it uses


class Policy:
    """Ranks experts: of those that are in the cache and not needed now, the ones with the lowest rank leave."""

    def __init__(self, count: int, loops: int, slots: int) -> None:
        self.count, self.loops, self.slots = count, loops, slots
        self.now = 0
        self.last = np.full(count, -1.0)  # access that used it last

    def rank(self, k: int) -> np.ndarray:
        """(count,), after loop k's experts were used."""
        return self.last

    def used(self, k: int, experts: np.ndarray) -> None:
        self.now += 1
        self.last[experts] = self.now

    def leaves(self, k: int, resident: np.ndarray, number: int) -> np.ndarray:
        """Which of `resident` leave."""
        return resident[np.argsort(self.rank(k)[resident], kind="stable")[:number]]


class Lru(Policy):
    """The one that was not used for longest leaves."""


class Lfu(Policy):
    """The one that was used least often leaves; uses long ago count less."""

    HALF = 256.0  # tokens after which a use counts half

    def __init__(self, count: int, loops: int, slots: int) -> None:
        super().__init__(count, loops, slots)
        self.uses, self.weight = np.zeros(count), 1.0

    def used(self, k: int, experts: np.ndarray) -> None:
        super().used(k, experts)
        if k == 0:
            self.weight *= 2 ** (1 / self.HALF)  # instead of shrinking all others
        self.uses[experts] += self.weight

    def rank(self, k: int) -> np.ndarray:
        return self.uses + 1e-9 * self.weight * self.last / max(1, self.now)


class Segmented(Policy):
    """Every loop has its share of the slots, by how many experts it brought in, and what it brought in longest ago leaves."""

    def __init__(self, count: int, loops: int, slots: int) -> None:
        super().__init__(count, loops, slots)
        self.owner = np.full(count, -1)

    def used(self, k: int, experts: np.ndarray) -> None:
        super().used(k, experts)
        self.owner[experts] = k

    def leaves(self, k: int, resident: np.ndarray, number: int) -> np.ndarray:
        mine = np.bincount(self.owner[resident], minlength=self.loops)
        over = mine[self.owner[resident]] > self.slots / self.loops  # whoever has more than its share gives first
        order = np.lexsort((self.last[resident], ~over))
        return resident[order[:number]]


class Cycle(Policy):
    """What the last token used is needed again in the same loop of the next: the one whose loop is farthest ahead leaves."""

    def __init__(self, count: int, loops: int, slots: int) -> None:
        super().__init__(count, loops, slots)
        self.tokens = np.zeros(loops)
        self.at = np.full((loops, count), -1.0)  # visit of loop k that used it last

    def used(self, k: int, experts: np.ndarray) -> None:
        super().used(k, experts)
        self.tokens[k] += 1
        self.at[k, experts] = self.tokens[k]

    def rank(self, k: int) -> np.ndarray:
        ahead = (np.arange(self.loops) - k - 1) % self.loops  # loops until it comes round
        recent = self.at >= self.tokens[:, None]
        distance = np.where(recent & (self.tokens[:, None] > 0), ahead[:, None], self.loops).min(0)
        return -distance + self.last / (1 + self.now)


class Expected(Policy):
    """Each loop's own frequencies: the one that is least likely to be used soon leaves.

    An expert's rank is the sum over the loops ahead of how often tokens used it there, the next loop counting most.
    """

    HALF = 64.0  # tokens
    FADE = 0.8  # from one loop to the next

    def __init__(self, count: int, loops: int, slots: int) -> None:
        super().__init__(count, loops, slots)
        self.uses, self.weight = np.zeros((loops, count)), 1.0

    def used(self, k: int, experts: np.ndarray) -> None:
        super().used(k, experts)
        if k == 0:
            self.weight *= 2 ** (1 / self.HALF)
        self.uses[k, experts] += self.weight

    def rank(self, k: int) -> np.ndarray:
        ahead = (np.arange(self.loops) - k - 1) % self.loops
        return self.FADE**ahead @ self.uses + 1e-9 * self.weight * self.last / max(1, self.now)


class ExpectedFlat(Expected):
    """The same, by more tokens and farther ahead."""

    HALF, FADE = 256.0, 0.95


class Optimum(Policy):
    """Knows when each expert is used next."""

    def __init__(self, count: int, loops: int, slots: int, accesses: list[Access]) -> None:
        super().__init__(count, loops, slots)
        self.next = np.full((len(accesses) + 1, count), len(accesses), np.int32)
        for i in range(len(accesses) - 1, -1, -1):
            self.next[i] = self.next[i + 1]
            self.next[i, accesses[i][1]] = i

    def rank(self, k: int) -> np.ndarray:
        return -self.next[self.now]


POLICIES: dict[str, Callable[..., Policy]] = {
    "LRU": Lru,
    "LFU": Lfu,
    "segmented by loop": Segmented,
    "last token's cycle": Cycle,
    "expected": Expected,
    "expected, flat": ExpectedFlat,
}


def replay(policy: Policy, accesses: list[Access], slots: int) -> tuple[float, np.ndarray]:
    """(hit rate, hit rate per loop). Experts that do not fit pass through the slots in waves."""
    resident = np.zeros(policy.count, bool)
    hits, total = np.zeros(policy.loops), np.zeros(policy.loops)
    for k, experts in accesses:
        there = resident[experts]
        hits[k] += there.sum()
        total[k] += len(experts)
        missing = experts[~there]
        policy.used(k, experts)
        if len(experts) >= slots:  # the last wave stays
            resident[:] = False
            resident[np.concatenate([experts[there], missing])[-slots:]] = True
            continue
        number = resident.sum() + len(missing) - slots
        if number > 0:
            others = resident.copy()
            others[experts] = False
            resident[policy.leaves(k, np.flatnonzero(others), int(number))] = False
        resident[missing] = True
    return hits.sum() / total.sum(), hits / np.maximum(1, total)


def accesses_of(experts: np.ndarray, rows: int) -> list[Access]:
    """The accesses of calls of so many tokens."""
    found = []
    for start in range(0, len(experts), rows):
        call = experts[start : start + rows]
        for k in range(call.shape[1]):
            used = np.unique(call[:, k][call[:, k] >= 0])
            if len(used):
                found.append((k, used.astype(np.int64)))
    return found


def guesses(trace: dict[str, np.ndarray]) -> list[tuple[str, float, float]]:
    """(guess, share of it that loop k + 1 uses, share of loop k + 1's experts that it has) of single tokens."""
    experts, ahead, drift = (trace[name].astype(np.int64) for name in ("experts", "ahead", "drift"))
    tokens, loops, top = experts.shape
    kinds: dict[str, list[tuple[int, int, int]]] = {}
    frequent = np.zeros((loops, int(trace["count"])))
    for t in range(1, tokens):
        frequent *= 2 ** (-1 / Expected.HALF)
        for k in range(loops - 1):
            if experts[t, k + 1, 0] < 0:
                break
            needed = set(experts[t, k + 1].tolist())
            last = set(experts[t - 1, k + 1].tolist()) - {-1}
            router = set(ahead[t, k].tolist())
            often = set(np.argpartition(frequent[k + 1], -top)[-top:].tolist())
            for name, guess in (
                ("the last token's experts in loop k + 1", last),
                ("the router of loop k + 1 on the state that entered loop k", router),
                ("what loop k + 1 used most often of late", often),
                ("the scores of loop k, moved as they moved before", set(drift[t, k].tolist())),
                ("router and last token", router | last),
            ):
                kinds.setdefault(name, []).append((len(guess), len(guess & needed), len(needed)))
        for k in range(loops):
            if experts[t, k, 0] >= 0:
                frequent[k, experts[t, k]] += 1
    sums = {name: np.array(found).sum(0) for name, found in kinds.items()}
    return [(name, right / max(1, made), right / needed) for name, (made, right, needed) in sums.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--rows", default="1,64")
    args = parser.parse_args()
    for file in args.traces:
        trace = dict(np.load(file))
        count, loops = int(trace["count"]), trace["experts"].shape[1]
        for rows in map(int, args.rows.split(",")):
            accesses = accesses_of(trace["experts"], rows)
            print(f"\n{file.stem}, calls of {rows}: hit rate in %\n")
            print("| policy | " + " | ".join(f"{100 * b:g} %" for b in BUDGETS) + " |")
            print("|---|" + "---|" * len(BUDGETS))
            for name, make in (POLICIES | {"optimum": lambda *a, of=accesses: Optimum(*a, of)}).items():
                rates = []
                for budget in BUDGETS:
                    slots = max(1, int(budget * count))
                    rates.append(replay(make(count, loops, slots), accesses, slots)[0])
                print(f"| {name} | " + " | ".join(f"{100 * r:.1f}" for r in rates) + " |")
        print(
            f"\n{file.stem}: guesses of loop k + 1, in %\n\n| guess | of it right | of what is needed |\n|---|---|---|"
        )
        for name, precision, recall in guesses(trace):
            print(f"| {name} | {100 * precision:.1f} | {100 * recall:.1f} |")


if __name__ == "__main__":
    main()
