"""Exit rules that compare what a loop predicts with what the loop before predicted; they evaluate the head inside the loop.

- kl: the divergence KL(before || after) of the two falls below `exit_kl`, in nats;
- entropy_change: the entropy changes by less than `exit_entropy_change`, in nats;
- steady: the likeliest token has been the same for `exit_steady` loops, not counting the one that brought it.

Source: Geiping et al. 2025, Scaling up Test-Time Compute with Latent Reasoning, arXiv 2502.05171, section 6, and the exit
evaluators of its published code, whose first comparisons are these: a divergence from the uniform distribution, an entropy
change from 100 nats, and no steady loop.

The last prediction is carried, (B, C, V): that is less than evaluating the head twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import Tensors, TensorSpec

RULES = ("exit_kl", "exit_entropy_change", "exit_steady")
FIRST_ENTROPY = 100.0  # nats, before the first loop


def compares(dials: Iterable[str]) -> bool:
    """Whether some of these dials are of rules of this file."""
    return any(name in RULES for name in dials)


def carried(dials: tuple[str, ...], chunk: int, vocab_size: int) -> tuple[TensorSpec, ...]:
    """What a loop carries for those rules whose dials are named."""
    if not compares(dials):
        return ()
    log_p = TensorSpec("log_p", (1, chunk, vocab_size))
    return (log_p, TensorSpec("steady", (1, chunk), torch.int64)) if "exit_steady" in dials else (log_p,)


def first_carry(dials: tuple[str, ...], positions: Tensor, vocab_size: int) -> Tensors:
    """The first of `carried`, for a call of `positions` (B, C, d)."""
    if not compares(dials):
        return {}
    count = positions.new_zeros(positions.shape[:2], dtype=torch.int64)
    # Computed, as in `Stack.first_carry`.
    log_p = (positions[..., :1] * 0).float().repeat(1, 1, vocab_size) - log(vocab_size)
    return {"log_p": log_p, "steady": count} if "exit_steady" in dials else {"log_p": log_p}


def carry_after(k: int | Tensor, before: Tensors, logits: Tensor) -> Tensors:
    """The carry after loop k (from 0), which predicts `logits` (B, C, V)."""
    found = {"log_p": F.log_softmax(logits.float(), -1)}
    if "steady" in before:
        same = before["log_p"].argmax(-1) == found["log_p"].argmax(-1)
        same = same & (torch.as_tensor(k) > 0)
        found["steady"] = torch.where(same, before["steady"] + 1, torch.zeros_like(before["steady"]))
    return found


def changes(k: int | Tensor, before: Tensors, after: Tensors, dials: Iterable[str]) -> dict[str, Tensor]:
    """What each rule compares with its dial, of the carries on both sides of loop k (from 0): (B, C) by dial."""
    found: dict[str, Tensor] = {}
    if "exit_kl" in dials:
        found["exit_kl"] = (before["log_p"].exp() * (before["log_p"] - after["log_p"])).sum(-1)
    if "exit_entropy_change" in dials:
        own, last = (-(t["log_p"].exp() * t["log_p"]).sum(-1) for t in (after, before))
        found["exit_entropy_change"] = (own - torch.where(torch.as_tensor(k) > 0, last, FIRST_ENTROPY)).abs()
    if "exit_steady" in dials:
        found["exit_steady"] = after["steady"]
    return found


def change_stops(k: int | Tensor, before: Tensors, after: Tensors, dials: Mapping[str, Tensor]) -> Tensor:
    """Which positions stop after loop k (from 0) by the rules of this file whose dials are there, (B, C) bool.

    A dial at 0 is off: it is asked for, since a divergence of next to nothing may be rounded to less.
    """
    found = [
        (score >= dials[name] if name == "exit_steady" else score < dials[name]) & (dials[name] > 0)
        for name, score in changes(k, before, after, dials).items()
    ]
    return torch.stack(found).any(0)


def leads(after: Tensors) -> Tensor:
    """By how much the likeliest token leads, in logits, (B, C)."""
    best = after["log_p"].topk(2, -1).values
    return best[..., 0] - best[..., 1]
