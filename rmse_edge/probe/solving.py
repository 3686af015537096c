"""Which problems a model solves after each iteration, by difficulty, and when it settles on their answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rmse_edge.errors import UserError
from rmse_edge.text import Tokenizer

from .difficulty import pearson, ranks
from .measures import settled_at
from .problems import HARDEST, drawn
from .readings import read
from .subjects import Subject


def solved(
    subject: Subject,
    tokenizer: Tokenizer,
    name: str,
    count: int,
    epsilon: float,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Problems of one kind, several to a text, with a blank line between them; a problem counts as solved where the likeliest
    token is right at every place of the answer, given the answer so far.

    Returns:
        problems by difficulty, the share solved (iterations, difficulties), the mean iteration at which an answer's last token
        settled, and how that is correlated with the difficulty (Spearman).
    Raises:
        UserError: the tokenizer has no token for a character of theirs, or a problem is longer than the model's texts.
    """
    rows, places = _sheets(tokenizer, name, count, subject.length, seed)
    readings = read(subject, rows, progress)
    settled = settled_at(readings.change, epsilon)
    right = readings.likeliest == readings.targets  # (K, n, T)
    difficulty = np.array([d for *_, d in places])
    by_problem = np.array([right[:, row, first:last].all(1) for row, first, last, _ in places])  # (problems, K)
    when = np.array([settled[row, last - 1] for row, _, last, _ in places])
    levels = range(1, HARDEST + 1)
    return {
        "problems": [int((difficulty == d).sum()) for d in levels],
        "solved": [[float(by_problem[difficulty == d, k].mean()) for d in levels] for k in range(len(right))],
        "settled": [float(when[difficulty == d].mean()) for d in levels],
        "spearman": pearson(ranks(difficulty), ranks(when)),
    }


def _sheets(
    tokenizer: Tokenizer, name: str, count: int, length: int, seed: int
) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """Rows of `length` + 1 tokens, and of each problem its row, the targets of its answer (first, last) and its difficulty."""
    between = tokenizer.encode_more("\n")
    rows: list[list[int]] = [[]]
    places = []
    for problem in drawn(name, count, seed):
        question = tokenizer.encode_more(problem.text[: problem.answer])
        answer = tokenizer.encode_more(problem.answered)
        ids = question + answer + tokenizer.encode_more("\n") + between
        if len(ids) > length + 1:
            raise UserError(f"{name}: a problem has {len(ids)} tokens, the model's texts have {length}")
        if len(rows[-1]) + len(ids) > length + 1:
            rows.append([])
        first = len(rows[-1]) + len(question) - 1
        places.append((len(rows) - 1, first, first + len(answer), problem.difficulty))
        rows[-1] += ids
    filled = [row + between * (length + 1 - len(row)) for row in rows]
    return np.array([row[: length + 1] for row in filled], np.int64), places
