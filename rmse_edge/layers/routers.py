"""What the router before a layer reads of a prompt, and what its dial makes of its answer (rmse_edge/loop/plan.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from rmse_edge.loop.plan import EACH_ONCE, ROUTERS


def windows(h: Tensor, prompt: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Means of equal windows of the first positions: what a router reads.

    As many windows as there are positions, `most` at most, of as many positions each; those that are left over, fewer than
    there are windows, are in none.

    Args:
        h: states (B, C, d).
        prompt: (B or 1,) int64, how many of the rows are read, at least 1.
    Returns:
        ((B, W, d) means, zeros where there is no such window; (B or 1, W) the share of each in their mean: 1 / windows or 0).
    """
    count = prompt.clamp_max(most)  # of windows
    size = torch.div(prompt, count, rounding_mode="floor")
    window = torch.arange(most, device=h.device)  # (W,)
    row = torch.arange(h.shape[1], device=h.device)  # (C,)
    start = (window * size[:, None]).unsqueeze(-1)  # (B, W, 1)
    there = (window < count[:, None]).unsqueeze(-1)
    inside = (row >= start) & (row < start + size[:, None, None]) & there  # (B, W, C)
    means = (inside.to(h.dtype) @ h) / size[:, None, None].to(h.dtype)
    return means, there.squeeze(-1).to(h.dtype) / count[:, None].to(h.dtype)


def chances(logits: Tensor, route: Tensor) -> Tensor:
    """What a router says, moved by the dial `route`: chances (B, 3) of skipping, running and repeating a layer.

    Between -1 and -0.5 they lie between skipping and the router's own, up to 0.5 between these and running once, from there
    between running once and repeating. The likeliest is done, the lowest where two are alike.

    Args:
        logits: (B, 3) of a router.
        route: scalar.
    """
    own = torch.softmax(logits, -1)
    ends = torch.eye(3, dtype=own.dtype, device=own.device)
    low, middle = (route + 1) / 0.5, route + 0.5
    towards_skip = (1 - low) * ends[0] + low * own
    towards_once = (1 - middle) * own + middle * ends[1]
    high = (route - 0.5) / 0.5
    towards_twice = (1 - high) * ends[1] + high * ends[2]
    found = torch.where(route <= EACH_ONCE, towards_once, towards_twice.expand_as(own))
    return torch.where(route <= ROUTERS, towards_skip, found)


def lead(found: Tensor) -> Tensor:
    """How far chances (B, 3) are from another decision: (B,)."""
    top = found.topk(2, -1).values
    return top[..., 0] - top[..., 1]
