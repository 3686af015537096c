"""Boards solved, by depth and by halting threshold, from what was found after every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

THRESHOLDS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


def table_of_depths(exact: np.ndarray, cells: np.ndarray) -> list[dict[str, Any]]:
    """Of (K, n) whether a board is solved after each step, and the share of its cells that is right."""
    return [
        {"steps": k, "solved": float(e.mean()), "cells": float(c.mean())}
        for k, (e, c) in enumerate(zip(exact, cells), 1)
    ]


def halted_at(score: np.ndarray, threshold: float) -> np.ndarray:
    """(n,) steps from 1 on, of halting scores (K, n): the first that reaches the threshold, else the last; 1 disables."""
    reached = (score >= threshold) & (threshold < 1)
    return np.where(reached.any(0), reached.argmax(0), len(score) - 1) + 1


def table_of_thresholds(exact: np.ndarray, score: np.ndarray, thresholds: Sequence[float]) -> list[dict[str, Any]]:
    """What halting brings and costs: solved, mean steps, and false halts, boards that halted early and unsolved."""
    rows = []
    for threshold in thresholds:
        steps = halted_at(score, threshold)
        right = exact[steps - 1, np.arange(len(steps))]
        false = ~right & (steps < len(score))
        rows.append(
            {
                "threshold": threshold,
                "solved": float(right.mean()),
                "mean_steps": float(steps.mean()),
                "false_halts": float(false.mean()),
            }
        )
    return rows
