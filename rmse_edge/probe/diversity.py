"""Whether loops are different functions: the loss where loop i is given loop j's code.

A code is what tells one block which loop it is in, a row for each loop of a table of parameters: RMS-E's bias per loop and its
router's logits per loop. Models without such tables run the same function in every loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .subjects import Subject

CODES = ("step_encoding", "step_logits")


def exchanged(
    subject: Subject, blocks: np.ndarray, progress: Callable[[], None] = lambda: None
) -> dict[str, Any] | None:
    """The loss after the last loop, nats, with each loop's code in each loop's place; None: the model has no codes.

    Args:
        blocks: (n, T + 1) token ids.
    Returns:
        `loss` (K, K): row i, column j is loop i with the code of loop j, so that the diagonal is the model as it is; `rows`: the
        mean increase in row i, off the diagonal.
    """
    tables = codes(subject.model)
    if not tables:
        return None
    loops = len(tables[0])
    kept = [table.detach().clone() for table in tables]
    loss = np.zeros((loops, loops))
    as_it_is = _loss(subject, blocks)
    try:
        for i in range(loops):
            for j in range(loops):
                if i != j:
                    _give(tables, kept, i, j)
                    loss[i, j] = _loss(subject, blocks)
                    _give(tables, kept, i, i)
                else:
                    loss[i, j] = as_it_is
                progress()
    finally:
        for i in range(loops):
            _give(tables, kept, i, i)
    others = ~np.eye(loops, dtype=bool)
    return {"loss": loss.tolist(), "rows": [float(loss[i, others[i]].mean() - as_it_is) for i in range(loops)]}


def codes(model: Any) -> list[Tensor]:
    """The tables of a model, (K, n) each."""
    return [p for name, p in model.named_parameters() if name.rpartition(".")[2] in CODES]


@torch.no_grad()
def _give(tables: list[Tensor], kept: list[Tensor], loop: int, of: int) -> None:
    for table, before in zip(tables, kept):
        table[loop] = before[of]


@torch.no_grad()
def _loss(subject: Subject, blocks: np.ndarray) -> float:
    tokens = torch.from_numpy(blocks)
    logits = subject.logits(subject.course(tokens[:, :-1])[0][-1]).float()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
