"""Figures of readings, and what they say of the claims that are made for looped models.

Tokens of one text depend on each other, so errors come from whole texts: the standard error of a mean over them. A claim is
"kept" or "refuted" where the measured difference is farther than two of them from what would decide, and else "unclear".
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from .readings import Readings

# Differences in nats that are taken for none: deeper is never worse if its loss rises by no more than this.
NOTHING = {"entropy": 1e-3, "loss": 2e-3, "change": 1e-3}


@dataclass(frozen=True)
class Verdict:
    """On one claim."""

    claim: str
    verdict: str  # kept, refuted, unclear
    evidence: str


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """Of (n, T): the mean, and the standard error of the mean over texts, None for a single one."""
    of_texts = values.mean(1)
    return float(of_texts.mean()), error_of(of_texts)


def error_of(of_texts: np.ndarray) -> float | None:
    """The standard error of the mean of (n,), None for a single one."""
    return float(of_texts.std(ddof=1) / len(of_texts) ** 0.5) if len(of_texts) > 1 else None


def settled_at(change: np.ndarray, epsilon: float) -> np.ndarray:
    """The first iteration, from 1, that the next one changes by less than epsilon: (K, ...) -> (...); K where there is none."""
    below = change[1:] < epsilon
    return np.where(below.any(0), below.argmax(0) + 1, len(change))


def by_iteration(readings: Readings, epsilon: float) -> list[dict[str, Any]]:
    """A row for each iteration; `falls` and `entropy_difference` compare its entropy with the one before, token by token."""
    settled = settled_at(readings.change, epsilon)
    rows = []
    for k in range(readings.iterations):
        row: dict[str, Any] = {"iteration": k + 1}
        row["loss"], row["loss_error"] = mean_and_error(readings.loss[k])
        row["entropy"] = float(readings.entropy[k].mean())
        row["kl_to_last"] = float(readings.kl[k].mean())
        row["agrees_with_last"] = float(readings.agrees[k].mean())
        row["cosine_to_last"] = float(readings.cosine[k].mean())
        row["change"] = float(readings.change[k].mean()) if k else None
        row["settled"] = float((settled <= k + 1).mean()) if k + 1 < readings.iterations else None
        if k:
            difference = readings.entropy[k] - readings.entropy[k - 1]
            row["entropy_falls"] = float((difference <= 0).mean())
            row["entropy_difference"], row["entropy_error"] = mean_and_error(difference)
        rows.append(row)
    return rows


def settling(readings: Readings, epsilon: float) -> dict[str, Any]:
    """How many tokens settled at which iteration."""
    settled = settled_at(readings.change, epsilon)
    counts = np.bincount(settled.reshape(-1), minlength=readings.iterations + 1)
    return {
        "epsilon": epsilon,
        "tokens": {str(k): int(counts[k]) for k in range(1, readings.iterations)},
        "moved_to_the_end": int(counts[readings.iterations]),
    }


def verdicts(readings: Readings) -> list[Verdict]:
    """On what can be said without a task, probes, or another model."""
    return [
        _never_rises("entropy falls with every iteration", "entropy", readings.entropy),
        _never_rises("deeper is never worse", "loss", readings.loss),
        _never_rises("the state moves less with every iteration", "change", readings.change[1:], first=2),
    ]


def _never_rises(claim: str, name: str, values: np.ndarray, first: int = 1) -> Verdict:
    """`values` (K, n, T) from iteration `first` on: whether their mean rises anywhere by more than counts as nothing."""
    if len(values) < 2:
        return Verdict(claim, "unclear", "too few iterations to compare")
    steps = [mean_and_error(b - a) for a, b in itertools.pairwise(values)]
    errors = [error or 0.0 for _, error in steps]
    high = [mean + 2 * error for (mean, _), error in zip(steps, errors)]
    low = [mean - 2 * error for (mean, _), error in zip(steps, errors)]
    worst = int(np.argmax(low))
    means = values.mean((1, 2))
    course = f"{name} {means[0]:.4g} at {first}, {means.min():.4g} at {first + int(means.argmin())}, {means[-1]:.4g} at the end"
    if low[worst] > NOTHING[name]:
        mean, error = steps[worst][0], errors[worst]
        return Verdict(claim, "refuted", f"{course}; iteration {first + worst + 1} adds {mean:.2g} ± {error:.1g}")
    if max(high) <= NOTHING[name]:
        return Verdict(claim, "kept", course)
    return Verdict(claim, "unclear", f"{course}; some rise is within two standard errors")
