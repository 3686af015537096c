"""Self-braking: when a position stops.

Three rules, combined with "or", from the loop `min_loops` on:

- gate: the brake score 1 - prod_j (1 - lambda_j) reaches `exit_threshold` (Ouro/LoopLM, arXiv 2510.25741);
- delta: the state changes by less than `exit_epsilon`, relative (Huginn's latent-difference criterion);
- entropy: the entropy of the logits falls below `exit_entropy`, in nats; it evaluates the head inside the loop.

The survival product is kept as a float32 sum of logarithms: in bfloat16 the score rounds to 1 and every position exits
at once, and even in float32 a product loses a threshold close to 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Dials(NamedTuple):
    """The quality dial, given at run time. Scalars: int64 loops, float32 thresholds."""

    max_loops: Tensor
    min_loops: Tensor
    exit_threshold: Tensor  # >= 1 disables the gate
    exit_epsilon: Tensor  # 0 disables the delta rule
    exit_entropy: Tensor  # 0 disables the entropy rule


def gate_stops(log_survival: Tensor, threshold: Tensor) -> Tensor:
    """True where 1 - survival >= threshold, compared as logarithms."""
    return (threshold < 1) & (log_survival <= torch.log1p(-threshold.clamp(max=1 - 1e-6)))


def delta_stops(before: Tensor, after: Tensor, epsilon: Tensor) -> Tensor:
    """True where |after - before| < epsilon * |after|, over the last axis; squares, so no root is taken."""
    change = (after - before).float().square().sum(-1)
    return change < epsilon.square() * after.float().square().sum(-1)


def entropy_stops(logits: Tensor, target: Tensor) -> Tensor:
    """True where the entropy of softmax(logits) is below `target` nats."""
    log_p = F.log_softmax(logits.float(), -1)
    return -(log_p.exp() * log_p).sum(-1) < target


def add_log_survival(log_survival: Tensor, gate_logit: Tensor, active: Tensor) -> Tensor:
    """Multiply the survival of active positions by 1 - sigmoid(gate_logit)."""
    return torch.where(active, log_survival - F.softplus(gate_logit.float()), log_survival)


def exit_distribution(gate_logits: Tensor) -> Tensor:
    """p_k = lambda_k prod_{j<k} (1 - lambda_j), with the last loop taking what remains: (K, ...) -> (K, ...), float32."""
    log_stay = -F.softplus(gate_logits.float())
    before = torch.cat([torch.zeros_like(log_stay[:1]), log_stay[:-1].cumsum(0)])  # log prod_{j<k} (1 - lambda_j)
    log_stop = F.logsigmoid(gate_logits.float())
    return torch.cat([(before[:-1] + log_stop[:-1]).exp(), before[-1:].exp()])
