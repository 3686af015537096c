"""Whether a model's work must be the same whatever its tensors hold.

Eager code looks at its tensors to save work: positions that have stopped are left out, experts that nobody chose are never
read. A recorded graph cannot (its shapes are those of the recording), and on a GPU each look makes the host wait. Within
`fixed_work` nothing is looked at: positions that have stopped are computed and not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_fixed = ContextVar("fixed", default=False)


@contextmanager
def fixed_work() -> Iterator[None]:
    """The work of the models that are run within is the same whatever their tensors hold; the numbers are those without."""
    token = _fixed.set(True)
    try:
        yield
    finally:
        _fixed.reset(token)


def is_fixed() -> bool:
    """Whether within `fixed_work`, or while a graph is traced."""
    # In this order: a tracer cannot follow the variable, and while it traces it need not.
    return torch.compiler.is_exporting() or _fixed.get()


def rows_of(experts: Tensor, n_experts: int) -> Tensor:
    """How many rows each expert has: (P,) int64 -> (n_experts,) int64. `torch.bincount` would have a GPU's host wait."""
    return torch.zeros(n_experts, dtype=torch.int64, device=experts.device).scatter_add_(
        0, experts, torch.ones_like(experts)
    )
