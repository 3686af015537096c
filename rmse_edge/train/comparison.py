"""Training runs of several models compared: at equal tokens, at equal FLOPs, with the error over seeds.

Runs of one seed see the same blocks in the same order, so differences are taken seed by seed. An interval is that of Student's t
at 95 %: with three seeds 2.5 standard deviations to either side. SciPy knows it, which the extra `probe` brings.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Axis = Literal["tokens", "flops"]


@dataclass(frozen=True)
class Run:
    """One model trained once."""

    variant: str
    seed: int
    parameters: int
    flops_per_token: float
    tokens: tuple[int, ...]  # that it has read when it is validated, rising
    loss: tuple[float, ...]  # of the same blocks, nats
    final: float  # of the whole validation split after training, nats

    def along(self, axis: Axis) -> np.ndarray:
        """Where it was validated: tokens, or the FLOPs spent on them."""
        return np.array(self.tokens, dtype=float) * (self.flops_per_token if axis == "flops" else 1.0)

    def at(self, axis: Axis, where: float) -> float:
        """The loss there, on straight lines between validations over the logarithm of the axis; NaN outside of them."""
        places = self.along(axis)
        if not places[0] <= where <= places[-1] * (1 + 1e-9):
            return float("nan")
        return float(np.interp(np.log(where), np.log(places), self.loss))

    def needed(self, axis: Axis, loss: float) -> float | None:
        """How many tokens or FLOPs bring it to `loss` first, interpolated likewise; None: it does not get there."""
        places = np.log(self.along(axis))
        below = [i for i, value in enumerate(self.loss) if value <= loss]
        if not below:
            return None
        if not (i := below[0]):
            return float(np.exp(places[0]))
        share = (self.loss[i - 1] - loss) / (self.loss[i - 1] - self.loss[i])
        return float(np.exp(places[i - 1] + share * (places[i] - places[i - 1])))


@dataclass(frozen=True)
class Difference:
    """Of a loss, seed by seed."""

    values: tuple[float, ...]  # nats; negative: the first of the two is better

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def half(self) -> float | None:
        """Half of the 95 % interval of the mean; None with fewer than two seeds."""
        n = len(self.values)
        if n < 2:
            return None
        from scipy.stats import t

        return float(t.ppf(0.975, n - 1)) * statistics.stdev(self.values) / n**0.5

    def verdict(self, margin: float = 0.0) -> str:
        """On the claim that the first is better, or no worse than by `margin`: kept, refuted or unclear."""
        half = self.half
        if half is None:
            return "one seed" if self.values else "not measured"
        if self.mean + half < margin:
            return "kept"
        return "refuted" if self.mean - half > margin else "unclear"

    def __str__(self) -> str:
        half = self.half
        return f"{self.mean:+.3f}" + ("" if half is None else f" ± {half:.3f}") if self.values else ""


def by_seed(runs: Sequence[Run], variant: str) -> dict[int, Run]:
    return {run.seed: run for run in runs if run.variant == variant}


def difference(runs: Sequence[Run], first: str, second: str, axis: Axis) -> Difference:
    """The loss of `first` less that of `second`, for every seed of both.

    At equal tokens: of the whole validation split, after training. At equal FLOPs: on the curves, at the end of the one
    that has spent fewer; a seed whose dearer run had not been validated by then is left out.
    """
    ours, theirs = by_seed(runs, first), by_seed(runs, second)
    found = []
    for seed in sorted(ours.keys() & theirs.keys()):
        a, b = ours[seed], theirs[seed]
        if axis == "tokens":
            found.append(a.final - b.final)
        else:
            end = min(a.along(axis)[-1], b.along(axis)[-1])
            found.append(a.at(axis, end) - b.at(axis, end))
    found = [value for value in found if not math.isnan(value)]
    return Difference(tuple(found))


def recovered(runs: Sequence[Run], variant: str, shallow: str, deep: str) -> tuple[float, ...]:
    """The share of what `deep` gains over `shallow` that `variant` gains, seed by seed, after as many tokens."""
    found = [by_seed(runs, name) for name in (variant, shallow, deep)]
    seeds = sorted(set.intersection(*(set(of) for of in found)))
    of_seeds = ([of[seed].final for of in found] for seed in seeds)
    return tuple((low - own) / (low - high) for own, low, high in of_seeds)
