"""The objectives of the three stages (Ouro/LoopLM, arXiv 2510.25741, sections 3.2 and 3.3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rmse_edge.arch.rmse.model import Hits
from rmse_edge.loop.stop import exit_distribution
from rmse_edge.losses import token_loss

from .gpt import GPT


def cross_entropies(model: Any, states: list[Tensor], targets: Tensor) -> Tensor:
    """Loss of the targets after every iteration: (loops, ...), nats. One head call per loop, so logits are not kept.

    Args:
        states: of a trajectory, (..., d) each; targets: (...).
    """
    return torch.stack([token_loss(model.read_out(h), targets) for h in states])


def losses_by_depth(
    model: Any, tokens: Tensor, targets: Tensor, asked: Tensor | None = None, hits: Hits | None = None
) -> Tensor:
    """Loss of the targets at every fixed depth 1..max_loops, (K, B, T) nats; a GPT has one depth.

    Args:
        asked: (B, T) bool, positions that have a target; with it the result is (K, n) for those. None: all.
        hits: what was retrieved, for RMS-E; None: nothing.
    """
    if isinstance(model, GPT):
        return token_loss(model(tokens), targets)[None]
    states, gates, _ = model.trajectory(tokens, **({} if hits is None else {"hits": hits}))
    states, _, targets = chosen(states, gates, targets, asked)
    return cross_entropies(model, states, targets)


def chosen(
    states: list[Tensor], gates: Tensor, targets: Tensor, asked: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """States (B, T, d), gate logits (loops, B, T) and targets (B, T) of the positions that are asked, all if None."""
    if asked is None:
        return states, gates, targets
    return [h[asked] for h in states], gates[:, asked], targets[asked]


def expected_loss(losses: Tensor, gate_logits: Tensor, entropy_weight: float) -> tuple[Tensor, Tensor]:
    """sum_k p_k CE_k - beta H(p), averaged over positions; p is the exit distribution.

    Args:
        losses, gate_logits: (loops, ...), such as (loops, B, T).
    Returns:
        (loss, mean depth under p), scalars.
    """
    p = exit_distribution(gate_logits)
    entropy = -(p * p.clamp_min(1e-9).log()).sum(0)
    depth = depths_like(p)
    return ((p * losses).sum(0) - entropy_weight * entropy).mean(), (p * depth).sum(0).mean().detach()


def depths_like(p: Tensor) -> Tensor:
    """1..K along the first axis of p (K, ...), to be multiplied with it."""
    return torch.arange(1, len(p) + 1, device=p.device).view(-1, *[1] * (p.dim() - 1))


def gate_loss(losses: Tensor, gate_logits: Tensor, cost: float) -> Tensor:
    """Teach the gate what another loop is worth: sum_k p_k CE_k + cost * sum_k p_k k, averaged over positions.

    The improvement of every further loop is weighed against `cost` nats, and no gradient reaches the losses. (Ouro labels
    each loop by the improvement just made, with a binary cross-entropy; at the shipped size its exits gained less over a
    fixed depth and varied less: docs/training-notes.md has the numbers and the command.)
    """
    p = exit_distribution(gate_logits)
    depth = depths_like(p)
    return (p * (losses.detach() + cost * depth)).sum(0).mean()
