"""Denoising steps: which masked positions of a block are filled in after an iteration.

- Evenly: as many as it takes for all to be filled within `max_loops`, the likeliest first; at least one. With as many
  iterations as positions that is one per iteration.
- Confidence: every position whose likeliest token has at least the probability `exit_threshold` (Fast-dLLM, Wu et al. 2025,
  arXiv 2505.22618). The best one is filled in any case, so that every iteration makes progress.
- Gap: once the likeliest token leads the second by `exit_gap` logits in the mean of the masked positions, all of them are
  filled in at once (Prophet, Li et al. 2025, arXiv 2508.19982). Early iterations ask for more: three times as much in the first
  third, twice in the second. The published thresholds 7.5, 5.0 and 2.5 are those of `exit_gap` = 2.5. They are of raw
  logits, whose scale is every model's own: calibrate it.

The last two are asked from the loop `min_loops` on. No rule ever writes the mask: its logit is left out before
(`without_mask`). Published code of Fast-dLLM does not leave it out, so that its loop can write masks again.

Published Prophet takes the mean over five positions of an answer whose place must be known, filled ones among them, and fills
all masks of the text. Here a block is all there is to be filled, and its masked positions are those that the mean is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

NEVER = -1e6  # the logit of what must not be written; finite, and so far below that its probability is 0


class Guess(NamedTuple):
    """What a model would write at each position."""

    tokens: Tensor  # (B, C) int64, the likeliest
    probability: Tensor  # (B, C) float32, of these
    lead: Tensor  # (B, C) float32, of their logits over those of the second


def without_mask(logits: Tensor, mask_token_id: int) -> Tensor:
    """Logits (..., V) in which the mask has no chance ("subs" parameterisation, Sahoo et al. 2024, arXiv 2406.07524)."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(ids == mask_token_id, NEVER, logits)


def guess(logits: Tensor) -> Guess:
    """Of logits (B, C, V) in which the mask has no chance; V at least 2."""
    logits = logits.float()
    top = logits.topk(2, -1).values
    best, second = top[..., 0], top[..., 1]
    probability = 1 / torch.exp(logits - best.unsqueeze(-1)).sum(-1)
    return Guess(logits.argmax(-1), probability, best - second)


def fills(guess: Guess, masked: Tensor, k: Tensor, dials: Mapping[str, Tensor]) -> Tensor:
    """Which positions are filled in after iteration k (0-based), (B, C) bool: all rules together.

    Args:
        masked: (B, C) bool, positions that are not filled yet.
        dials: the scalars max_loops, min_loops, exit_threshold and exit_gap.
    """
    asked = k + 1 >= dials["min_loops"]
    # rank < ceil(masked / iterations left), without a division.
    evenly = ranks(guess.probability, masked) * (dials["max_loops"] - k) < masked.sum(-1, keepdim=True)
    sure = asked & confident(guess.probability, dials["exit_threshold"])
    decided = asked & gap_reached(mean_lead(guess.lead, masked), k, dials["max_loops"], dials["exit_gap"])
    return masked & (evenly | sure | decided.unsqueeze(-1))


def ranks(score: Tensor, among: Tensor) -> Tensor:
    """How many of `among` (B, C) have a higher score (B, C), or the same and come first: (B, C) int64."""
    place = torch.arange(score.shape[-1], device=score.device)
    own, other = score.unsqueeze(-1), score.unsqueeze(-2)  # (B, C, 1), (B, 1, C)
    better = (other > own) | ((other == own) & (place < place[:, None]))
    return (better & among.unsqueeze(-2)).sum(-1)


def confident(probability: Tensor, threshold: Tensor) -> Tensor:
    """True where a probability reaches the threshold; nowhere at 1 or more."""
    return (probability >= threshold) & (threshold < 1)


def mean_lead(lead: Tensor, rows: Tensor) -> Tensor:
    """The mean of leads (B, C) over some rows, (B, C) bool: (B,). 0 where there is none."""
    return torch.where(rows, lead, 0.0).sum(-1) / rows.sum(-1).clamp_min(1)


def gap_reached(lead: Tensor, k: Tensor, max_loops: Tensor, gap: Tensor) -> Tensor:
    """Whether mean leads (B,) after iteration k (0-based) are enough to fill in all that is left, (B,) bool."""
    percent = (k + 1) * 100
    times = 1 + (percent < 67 * max_loops).to(lead.dtype) + (percent < 33 * max_loops).to(lead.dtype)
    return (lead >= gap * times) & (gap > 0)
