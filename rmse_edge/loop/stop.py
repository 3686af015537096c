"""Self-braking: when a position stops.

Rules, combined with "or", from the loop `min_loops` on. A model has some of them:

- gate: the brake score 1 - prod_j (1 - lambda_j) reaches `exit_threshold` (Ouro/LoopLM, arXiv 2510.25741);
- delta: the state changes by less than `exit_epsilon`, relative (Huginn's latent-difference criterion);
- cosine: 1 minus the cosine of the states on both sides of the loop falls below `exit_cosine`;
- entropy: the entropy of the logits falls below `exit_entropy`, in nats; it evaluates the head inside the loop.

Those that compare a loop's prediction with the one before are in rmse_edge/loop/predictions.py.

The survival product is kept as a float32 sum of logarithms: in bfloat16 the score rounds to 1 and every position exits
at once, and even in float32 a product loses a threshold close to 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .dials import DIALS


def stops(
    k: int | Tensor,
    before: Tensor,
    after: Tensor,
    log_survival: Tensor,
    dials: Mapping[str, Tensor],
    logits: Tensor | None = None,
) -> Tensor:
    """Which positions stop after iteration k (from 0), (B, C) bool: all rules of a model together.

    Args:
        before, after: states (B, C, d) on both sides of the iteration.
        log_survival: (B, C), the iteration included.
        dials: the scalars min_loops, exit_threshold, exit_epsilon and, with `logits`, exit_entropy.
        logits: (B, C, V) of `after`, for models with the entropy rule.
    """
    found = gate_stops(log_survival, dials["exit_threshold"]) | delta_stops(before, after, dials["exit_epsilon"])
    if logits is not None:
        found = found | entropy_stops(logits, dials["exit_entropy"])
    return found & (k + 1 >= dials["min_loops"])


def scores(before: Tensor, after: Tensor, log_survival: Tensor, logits: Tensor | None = None) -> dict[str, Tensor]:
    """What every rule compares with its dial, by the dial's name: (B, C) float64 each. Arguments as in `stops`.

    A model takes those of the rules that it has.
    """
    change = (after - before).norm(dim=-1) / after.norm(dim=-1).clamp_min(1e-30)
    found = {"exit_threshold": -torch.expm1(log_survival.double()), "exit_epsilon": change.double()}
    found["exit_cosine"] = cosine_change(before, after).double()
    return found if logits is None else found | {"exit_entropy": entropy(logits).double()}


def margins(scores: Mapping[str, Tensor], dials: Mapping[str, Tensor], leads: Tensor | None = None) -> Tensor:
    """How far positions are from another decision of an exit rule, (K, n) like each of the `scores`.

    Infinite where no rule is asked: before min_loops, at the last loop, and where all are off.

    Args:
        leads: (K, n) of the likeliest token over the second, in logits: what a count of loops hangs by, at any loop.
    """
    loops, count = next(iter(scores.values())).shape
    loop = torch.arange(1, loops + 1)[:, None]
    asked = (loop >= dials["min_loops"]) & (loop < dials["max_loops"])
    found = torch.full((loops, count), torch.inf, dtype=torch.float64)
    for name, score in scores.items():
        on = DIALS[name].enables(dials[name])
        if name == "exit_steady":
            assert leads is not None
            counted = (loop < dials["max_loops"]) & on
            found = torch.where(counted, torch.minimum(found, leads), found)
        else:
            found = torch.where(asked & on, torch.minimum(found, (score - dials[name]).abs()), found)
    return found


def gate_stops(log_survival: Tensor, threshold: Tensor) -> Tensor:
    """True where 1 - survival >= threshold, compared as logarithms."""
    return (threshold < 1) & (log_survival <= torch.log1p(-threshold.clamp(max=1 - 1e-6)))


def delta_stops(before: Tensor, after: Tensor, epsilon: Tensor) -> Tensor:
    """True where |after - before| < epsilon * |after|, over the last axis; squares, so no root is taken."""
    change = (after - before).float().square().sum(-1)
    return change < epsilon.square() * after.float().square().sum(-1)


def cosine_stops(before: Tensor, after: Tensor, target: Tensor) -> Tensor:
    """True where 1 - cosine of the two falls below `target`; nowhere at 0, although 1 - cosine may be rounded to less."""
    return (cosine_change(before, after) < target) & (target > 0)


def cosine_change(before: Tensor, after: Tensor) -> Tensor:
    """1 - cosine over the last axis, float32; 1 where either is zero."""
    a, b = before.float(), after.float()
    sizes = a.square().sum(-1) * b.square().sum(-1)
    return 1 - (a * b).sum(-1) * torch.rsqrt(sizes.clamp_min(1e-16))


def entropy_stops(logits: Tensor, target: Tensor) -> Tensor:
    """True where the entropy of softmax(logits) is below `target` nats."""
    return entropy(logits) < target


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) over the last axis, nats."""
    log_p = F.log_softmax(logits.float(), -1)
    return -(log_p.exp() * log_p).sum(-1)


def add_log_survival(log_survival: Tensor, gate_logit: Tensor, active: Tensor) -> Tensor:
    """Multiply the survival of active positions by 1 - sigmoid(gate_logit)."""
    return torch.where(active, log_survival - F.softplus(gate_logit.float()), log_survival)


def exit_distribution(gate_logits: Tensor) -> Tensor:
    """p_k = lambda_k prod_{j<k} (1 - lambda_j), with the last loop taking what remains: (K, ...) -> (K, ...), float32."""
    log_stay = -F.softplus(gate_logits.float())
    before = torch.cat([torch.zeros_like(log_stay[:1]), log_stay[:-1].cumsum(0)])  # log prod_{j<k} (1 - lambda_j)
    log_stop = F.logsigmoid(gate_logits.float())
    return torch.cat([(before[:-1] + log_stop[:-1]).exp(), before[-1:].exp()])
