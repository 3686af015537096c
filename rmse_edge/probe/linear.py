"""Linear probes: how well a logistic regression reads a label off the state after each iteration, beside two controls.

The token alone: what follows from which token it is, to which any linear reading of its embedding adds nothing. Shuffled labels
(Hewitt and Liang, 2019): what the probe learns where there is nothing to learn, from the last state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rmse_edge.errors import UserError

from .labels import NONE
from .measures import error_of

TRAIN, TEST = 2000, 1000  # positions, at most
FEWEST = 20  # positions of a class, below which it is left out
ROUNDS = 100


def probed(
    states: list[np.ndarray],
    tokens: np.ndarray,
    labels: np.ndarray,
    seed: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any] | None:
    """One label.

    Args:
        states: after each iteration, (n, T, d) of n texts; texts with an even number are learnt from, odd ones tested.
        tokens: (n, T).
        labels: (n, T) classes, `NONE` for none.
    Returns:
        classes, majority (share of the commonest), token, shuffled, and by iteration the share that is right on tested positions,
        with what the last gains over the first and its standard error over texts. None: too few positions of two classes.
    """
    draw = np.random.default_rng(seed)
    common = [c for c in np.unique(labels[labels != NONE]) if _in_both(labels == c)]
    if len(common) < 2:
        return None
    rows = [np.argwhere(np.isin(labels, common) & (np.arange(len(labels)) % 2 == half)[:, None]) for half in (0, 1)]
    learnt, tested = (part[draw.permutation(len(part))[:most]] for part, most in zip(rows, (TRAIN, TEST)))
    known, asked = (labels[tuple(part.T)] for part in (learnt, tested))
    by_iteration, right = [], []
    for state in states:
        right.append(_right(state[tuple(learnt.T)], known, state[tuple(tested.T)], asked))
        by_iteration.append(float(right[-1].mean()))
        progress()
    one_hot = [np.eye(tokens.max() + 1, dtype=np.float32)[tokens[tuple(part.T)]] for part in (learnt, tested)]
    shuffled = draw.permutation(known)
    last = states[-1]
    gain = right[-1].astype(float) - right[0]
    of_texts = np.array([gain[tested[:, 0] == text].mean() for text in np.unique(tested[:, 0])])
    return {
        "classes": len(common),
        "positions": [len(learnt), len(tested)],
        "majority": float(np.bincount(asked).max() / len(asked)),
        "token": float(_right(one_hot[0], known, one_hot[1], asked).mean()),
        "shuffled": float(_right(last[tuple(learnt.T)], shuffled, last[tuple(tested.T)], asked).mean()),
        "by_iteration": by_iteration,
        "gain": float(gain.mean()),
        "gain_error": error_of(of_texts),
    }


def _in_both(member: np.ndarray) -> bool:
    """Whether a class (n, T) has enough positions in the texts that are learnt from and in those that are tested."""
    return bool(min(member[0::2].sum(), member[1::2].sum()) >= FEWEST)


def _right(x: np.ndarray, y: np.ndarray, tested: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """(m,) bool: which tested rows a regression on (x, y) gets right."""
    LogisticRegression, StandardScaler, make_pipeline, ConvergenceWarning, threadpool_limits = sklearn_parts()
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=ROUNDS))
    with warnings.catch_warnings(), threadpool_limits(torch.get_num_threads()):
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # so many rounds for all: what is not found by then counts as not found
        return probe.fit(x, y).predict(tested) == asked


def sklearn_parts() -> tuple[Any, ...]:
    """
    Raises:
        UserError: it is not installed.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from threadpoolctl import threadpool_limits  # which scikit-learn needs itself
    except ImportError:
        raise UserError("scikit-learn is not installed; install it with: pip install 'rmse-edge[probe]'") from None
    return LogisticRegression, StandardScaler, make_pipeline, ConvergenceWarning, threadpool_limits
