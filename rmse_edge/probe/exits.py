"""What stopping early costs by each rule, read off the same states: loss against mean iterations.

A token leaves at the first iteration whose score reaches a threshold, and its prediction there counts. All other tokens find all
of its iterations, as if none had been left out: what keys and values of iterations that were not run cost besides depends on the
model's policy for them, and `docs/experiments/exits/policies.py` measures that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .readings import Readings

POINTS = 24  # of a frontier
COST = 0.01  # of the loss of all iterations
# Prophet (arXiv 2508.19982): a lead of the likeliest token that suffices, in logits, by how far the work is.
PROPHET = (7.5, 5.0, 2.5)


def scores(readings: Readings) -> dict[str, np.ndarray]:
    """By rule, (K, n, T): the higher, the sooner a token may leave. -inf where a rule says nothing yet."""
    progress = np.minimum((3 * np.arange(readings.iterations)) // readings.iterations, 2)
    found = {
        "change": -readings.change,
        "entropy": -readings.entropy,
        "KL": -readings.kl_to_before,
        "lead": readings.lead,
        "Prophet": readings.lead / np.array(PROPHET)[progress, None, None],
    }
    if readings.brake is not None:
        found = {"gate": readings.brake} | found
    return {name: np.where(np.isnan(score), -np.inf, score) for name, score in found.items()}


def frontiers(readings: Readings) -> dict[str, Any]:
    """
    Returns:
        `fixed`: the loss of every depth for all tokens; `rules`: for each the rows (threshold, mean iterations, loss) from few
        iterations to many, and `saved`: the largest share of the iterations saved at a loss of at most 1 % above that of all;
        Prophet's own thresholds as a row of their own (the threshold 1 of its rule).
    """
    full = float(readings.loss[-1].mean())
    found: dict[str, Any] = {"fixed": [float(loss.mean()) for loss in readings.loss], "rules": {}}
    every_rule = scores(readings)
    for name, score in every_rule.items():
        best = score[:-1].max(0).reshape(-1)  # what decides whether a token leaves before the last
        every = np.concatenate([score[:-1].reshape(-1), best])
        every = every[np.isfinite(every)]
        if not len(every):
            continue  # two iterations, and the rule compares two
        thresholds = np.unique(np.quantile(every, np.linspace(0, 1, POINTS)))
        rows = [_row(readings.loss, score, float(t)) for t in thresholds]
        fitting = [row["mean_iterations"] for row in rows if row["loss"] <= (1 + COST) * full]
        saved = 1 - min([*fitting, float(readings.iterations)]) / readings.iterations
        found["rules"][name] = {"rows": sorted(rows, key=lambda row: row["mean_iterations"]), "saved": saved}
    found["rules"]["Prophet"]["published"] = _row(readings.loss, every_rule["Prophet"], 1.0)
    return found


def _row(loss: np.ndarray, score: np.ndarray, threshold: float) -> dict[str, float]:
    leaves = score >= threshold
    leaves[-1] = True
    depth = leaves.argmax(0)
    at = np.take_along_axis(loss, depth[None], 0)[0]
    return {"threshold": threshold, "mean_iterations": float(depth.mean()) + 1, "loss": float(at.mean())}
