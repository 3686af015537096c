"""Optimisers by the names that recipes have for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import AdamW, Optimizer


class AdamAtan2(Optimizer):
    """AdamW without an epsilon: p -= lr * atan2(m, sqrt(v)), m and v corrected for their start (Everett et al. 2024, arXiv
    2407.05872, section 4). An update is never larger than pi / 2 * lr, whatever the scale of the gradient.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": torch.zeros(()), "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                state["step"] += 1
                count = float(state["step"])
                state["m"].lerp_(p.grad, 1 - first)
                state["v"].lerp_(p.grad.square(), 1 - second)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                root = (state["v"] / (1 - second**count)).sqrt_()
                p.add_(torch.atan2(state["m"] / (1 - first**count), root), alpha=-group["lr"])
        return loss


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": AdamW, "adam_atan2": AdamAtan2}
