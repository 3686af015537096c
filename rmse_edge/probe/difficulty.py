"""Whether harder tokens settle later: difficulty is what another model finds hard, told apart from what is rare.

The judge is a checkpoint that the caller names, or n-grams of the text's first nine tenths, interpolated after Witten and Bell
(1991): p(w | c) = (count(c w) + types(c) p(w | shorter c)) / (count(c) + types(c)).
"""

from __future__ import annotations

from typing import Any

import numpy as np

LONGEST = 5  # of the n-grams
BITS = 62  # that a context and its next token may take as one number
RESAMPLES = 1000


class NGrams:
    """What the tokens before say of the next one, by counts."""

    def __init__(self, ids: np.ndarray, vocab_size: int) -> None:
        """
        Args:
            ids: (N,) int64, the text that is counted.
        """
        self.vocab_size = vocab_size
        longest = max(1, min(LONGEST, BITS // max(1, (vocab_size - 1).bit_length())))
        self.tables = []  # by length of the n-gram: contexts, their counts and types; n-grams and their counts
        for n in range(1, longest + 1):
            grams, counts = np.unique(_numbers(ids, n, vocab_size), return_counts=True)
            contexts, starts, types = np.unique(grams // vocab_size, return_index=True, return_counts=True)
            self.tables.append((contexts, np.add.reduceat(counts, starts), types, grams, counts))

    def losses(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """(n, T), (n, T) -> -log p of each target behind the tokens of its own text, nats."""
        rows = np.concatenate([tokens[:, :1], targets], 1)
        p = np.full(targets.shape, 1 / self.vocab_size)
        for n, (contexts, totals, types, grams, counts) in enumerate(self.tables, 1):
            keys = np.stack([_numbers(row, n, self.vocab_size) for row in rows])[:, max(0, 2 - n) :]
            reaches = p[:, max(0, n - 2) :]  # targets with that many tokens before them
            where, known = _found(contexts, keys // self.vocab_size)
            at, seen = _found(grams, keys)
            more = (counts[at] * seen + types[where] * reaches) / (totals[where] + types[where])
            p[:, max(0, n - 2) :] = np.where(known, more, reaches)
        return -np.log(p)


def _numbers(ids: np.ndarray, n: int, vocab_size: int) -> np.ndarray:
    """All n-grams of a text as numbers: (N,) -> (N - n + 1,)."""
    numbers = np.zeros(len(ids) - n + 1, np.int64)
    for i in range(n):
        numbers = numbers * vocab_size + ids[i : len(ids) - n + 1 + i]
    return numbers


def _found(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where keys are in a sorted table, and whether they are in it."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return at, table[at] == keys


def rarity(ids: np.ndarray, targets: np.ndarray, vocab_size: int) -> np.ndarray:
    """-log of how often each target stands in a text, one added."""
    counts = np.bincount(ids, minlength=vocab_size) + 1
    return -np.log(counts / counts.sum())[targets]


def correlation(settled: np.ndarray, difficulty: np.ndarray, rare: np.ndarray, seed: int) -> dict[str, Any]:
    """Spearman's rank correlation of when tokens settle with how hard they are, (n, T) each.

    Returns:
        `spearman`, `given_rarity` (what ranks of rarity explain taken out of both), and of each the interval of 95 % by
        resampling whole texts; and by tenths of difficulty, from easy to hard, the mean iteration.
    """
    draw = np.random.default_rng(seed)
    ranked = [ranks(a) for a in (settled, difficulty, rare)]
    found = [_correlations(*(r.reshape(-1) for r in ranked))]
    for _ in range(RESAMPLES if len(settled) > 1 else 0):
        rows = draw.integers(0, len(settled), len(settled))
        found.append(_correlations(*(r[rows].reshape(-1) for r in ranked)))
    table = np.array(found)
    result: dict[str, Any] = {}
    for column, name in enumerate(("spearman", "given_rarity")):
        result[name] = float(table[0, column])
        result[f"{name}_interval"] = (
            [float(q) for q in np.quantile(table[1:, column], (0.025, 0.975))] if len(found) > 1 else None
        )
    order = np.argsort(difficulty.reshape(-1), kind="stable")
    result["settled_by_tenth"] = [float(part.mean()) for part in np.array_split(settled.reshape(-1)[order], 10)]
    return result


def ranks(values: np.ndarray) -> np.ndarray:
    """Of all values, equal ones sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse].reshape(values.shape)


def _correlations(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> tuple[float, float]:
    """Pearson's of ranks, plain and partial; 0 where one of them does not vary."""
    ab, ac, bc = (pearson(x, y) for x, y in ((a, b), (a, given), (b, given)))
    left = (1 - ac**2) * (1 - bc**2)
    return ab, (ab - ac * bc) / left**0.5 if left > 1e-12 else 0.0


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of two arrays (N,); 0 where one of them does not vary."""
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else 0.0
