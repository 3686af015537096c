"""Bytes that a call reads from memory: weights and kept state, operator by operator, counted on shapes (dry.py).

What is counted is what the operators of a recording read of tensors that are there before the call: a matrix once however
many rows it multiplies, of looked-up rows and of experts those that are read, of rings every slot, filled or not, as the
layers read them. Left out is what lies between two operators (activations, and the copy of the past that attention makes
when it joins it with the call): it is small for one row, and comes from the cache. So this is what a bound needs: no
implementation of the same form reads less.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .drive import id_of

# Of what these are given first, only what they give is read: rows by an index.
ROWS = ("aten::embedding", "aten::index", "aten::index_select", "aten::gather")


class Reads(TorchDispatchMode):
    """Bytes read of some tensors by everything that runs within."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {id_of(t) for t in tensors}
        self.read: dict[tuple[Any, ...], int] = {}  # a part of a tensor that is read by two operators counts once

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]
        outside = {id_of(t) for t in tree_leaves(found) if isinstance(t, Tensor)}
        for i, t in enumerate(tree_leaves((args, kwargs or {}))):
            if not isinstance(t, Tensor) or id_of(t) not in self.known or id_of(t) in outside:
                continue  # of ours; a view reads nothing
            nbytes = t.nbytes
            if name in ROWS and i == 0:
                nbytes = min(nbytes, found.nbytes)
            elif name == "rmse_edge::packed_product":
                nbytes = _of_experts(t, args, nbytes)
            self.read[id_of(t), t.storage_offset(), tuple(t.shape)] = nbytes
        return found

    def taken(self) -> int:
        """Bytes since the last time."""
        total = sum(self.read.values())
        self.read.clear()
        return total


def _of_experts(t: Tensor, args: tuple[Any, ...], nbytes: int) -> int:
    """Of a stack of experts those that pairs are of: as if all were different, but no more than there are."""
    stack, experts = args[1], args[5] if len(args) > 5 else None
    if experts is None or t.dim() != stack.dim() or t is experts:
        return nbytes
    return nbytes // t.shape[0] * min(t.shape[0], experts.numel())
