"""What a loop carries so that positions may stop: by one of the policies of rmse_edge/layers/stack.py, whatever layers keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from rmse_edge.loop.contract import Tensors, TensorSpec

KvPolicy = Literal["propagate", "repeat", "all"]


def carried(policy: KvPolicy, chunk: int, width: int, held: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
    """What is carried beside h (1, C, width) and active; `held` are the tensors that stopped positions hold on to."""
    if policy == "repeat":
        return tuple(held)
    if policy == "all":
        return (TensorSpec("running", (1, chunk, width)), TensorSpec("settled", (1, chunk), torch.bool))
    return ()


def first_carry(policy: KvPolicy, h: Tensor, valid: Tensor, held: Mapping[str, Tensor]) -> Tensors:
    """The first carry: h (B, C, d), active, and what is `carried`.

    Args:
        valid: (B, C) bool, rows that are not padding.
    """
    first = {"h": h, "active": valid}
    if policy == "repeat":
        return first | dict(held)
    if policy == "all":
        return first | {"running": h, "settled": torch.zeros_like(valid)}
    return first


def nothing(like: Tensor, heads: int, width: int) -> Tensor:
    """Rows that no position has held yet, (B, heads, C, width), for states (B, C, d).

    Zeros that are computed: a target would store those of a constant shape.
    """
    zero = (like[..., :1] * 0).unsqueeze(1)  # (B, 1, C, 1)
    return zero.repeat(1, heads, 1, width)


def entering(policy: KvPolicy, carry: Tensors) -> tuple[Tensor, Tensor]:
    """What an iteration begins with, (B, C, d), and which positions have not stopped, (B, C) bool."""
    if policy == "all":
        return carry["running"], carry["active"] & ~carry["settled"]
    return carry["h"], carry["active"]


def next_carry(
    policy: KvPolicy,
    carry: Tensors,
    h: Tensor,
    after: Tensor,
    runs: Tensor,
    stop: Tensor,
    held: Mapping[str, Tensor],
) -> Tensors:
    """The carry after an iteration.

    Args:
        h: of every position the state that it has, or stopped with.
        after: what the iteration gave, also of positions that had stopped.
        runs: from `entering`.
        stop: which of them stop now.
        held: what the iteration gave of what is `carried`.
    """
    if policy == "all":  # the loop goes on to its end for what later positions read; what the head reads is settled
        return {
            "h": h,
            "active": carry["active"].clone(),
            "running": after,
            "settled": carry["settled"] | stop,
            "depth": carry["depth"] + runs.to(torch.int64),
        }
    new = {"h": h, "active": runs & ~stop}
    return new | dict(held) if policy == "repeat" else new


def of_all_loops(stacked: Tensor, iterations: Tensor, max_loops: int) -> Tensor:
    """Emits (K, ...) in which loops that did not run have what the last one gave."""
    loops = torch.arange(max_loops, device=stacked.device)
    return stacked.index_select(0, torch.minimum(loops, iterations - 1))
