"""One text, token by token: what each iteration would have said next, as in a logit lens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rmse_edge.text import Tokenizer

from .readings import Readings, read
from .subjects import Subject

GUESSES = 5


@torch.no_grad()
def traced(
    subject: Subject, tokenizer: Tokenizer, ids: np.ndarray, readings: Readings | None = None
) -> list[dict[str, Any]]:
    """For every token of a text (N + 1,) but the last: its text, the next one's, and by iteration the likeliest next tokens with
    their probabilities, the entropy, the loss, and how much the state moved.

    Args:
        readings: of this text, where they are there already.
    """
    readings = readings or read(subject, ids[None])
    states, _ = subject.course(torch.from_numpy(ids[None, :-1]))
    best = [
        torch.softmax(subject.logits(state)[0].float(), -1).topk(min(GUESSES, subject.vocab_size)) for state in states
    ]
    words = [tokenizer.decode([int(i)]) for i in ids]
    rows = []
    for t in range(len(ids) - 1):
        loops = []
        for k, guesses in enumerate(best):
            change = readings.change[k, 0, t]
            loops.append({
                "guesses": [[tokenizer.decode([int(i)]), round(float(p), 4)]
                            for p, i in zip(guesses.values[t], guesses.indices[t])],
                "entropy": round(float(readings.entropy[k, 0, t]), 4),
                "loss": round(float(readings.loss[k, 0, t]), 4),
                "change": None if np.isnan(change) else round(float(change), 4),
            })  # fmt: skip
        rows.append({"token": words[t], "next": words[t + 1], "iterations": loops})
    return rows
