"""The memory of Titans (Behrouz et al. 2025, arXiv 2501.00663, equations 8 to 14), written a segment at a time.

Within a segment, with every gradient g_t taken at the weights the segment began with:

    S_t = eta_t S_{t-1} - theta_t g_t           momentum: surprise that lasts
    W_t = (1 - alpha_t) W_{t-1} + S_t           forgetting

theta, eta and alpha are read off each position. Both recurrences are linear in what they start from and in the g_t, so
after T positions

    S_T = E S_0 - sum_i e_i theta_i g_i         e_i = prod_{s>i} eta_s,                            E = e_0
    W_T = A W_0 + B S_0 - sum_i c_i theta_i g_i c_i = sum_{t>=i} prod_{s>t} (1 - alpha_s) prod_{i<s<=t} eta_s,  B = eta_1 c_1

and the sums are two matrix products each: no position waits for the one before.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rmse_edge.loop.contract import Tensors

from .base import Memory, clipped, gradient

MAX_RATE = 1.0  # of theta


class Titans(Memory):
    """M(k) = down^T gelu(up^T k)."""

    def __init__(self, d_model: int, *, dims: int, hidden: int, max_loops: int) -> None:
        """Arguments as of `Memory`; keys have as many channels as values."""
        super().__init__(d_model, dims=dims, hidden=hidden, key_dims=dims, features=dims, rates=3, max_loops=max_loops)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        # theta 0.27, eta 0.5, alpha 3e-4: little momentum, a memory that lasts thousands of positions.
        self.rates_proj.bias.copy_(torch.tensor([-1.0, 0.0, -8.0]))

    def learn(
        self, key: Tensor, value: Tensor, hidden: Tensor, error: Tensor, rates: Tensor, state: Tensors
    ) -> Tensors:
        theta, log_eta, log_keep = self.rates(rates)
        total, last, first, whole = coefficients(log_eta, log_keep)
        up, down = state["memory_up"], state["memory_down"]
        step = gradient(key, hidden, error, down, total * theta)
        push = gradient(key, hidden, error, down, last * theta)
        bound = clipped(step)
        new: Tensors = {}
        kept = log_keep.sum(1).exp()  # A
        for name, old, g, p in zip(("up", "down"), (up, down), step, push):
            momentum = state[f"momentum_{name}"]
            new[f"memory_{name}"] = _times(kept, old) + _times(first, momentum) - bound * g
            new[f"momentum_{name}"] = _times(whole, momentum) - bound * p
        return new

    @staticmethod
    def rates(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, 3) -> theta, log eta, log (1 - alpha), each (B, T)."""
        theta, eta, alpha = logits.unbind(-1)
        return MAX_RATE * torch.sigmoid(theta), F.logsigmoid(eta), -F.softplus(alpha)


def coefficients(log_eta: Tensor, log_keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c (B, T), e (B, T), B (B,) and E (B,) of the module's closed form, from log eta and log (1 - alpha), (B, T)."""
    count = log_eta.shape[1]
    eta, keep = log_eta.cumsum(1), log_keep.cumsum(1)
    position = torch.arange(count, device=eta.device)
    later = position >= position[:, None]  # [i, t]: t is i or after it
    between = torch.where(later, eta[:, None, :] - eta[:, :, None], -1e4)  # log prod_{i<s<=t} eta_s
    after = (keep[:, -1:] - keep).exp()  # prod_{s>t} (1 - alpha_s)
    c = (between.exp() @ after.unsqueeze(-1)).squeeze(-1)
    return c, (eta[:, -1:] - eta).exp(), log_eta[:, 0].exp() * c[:, 0], eta[:, -1].exp()


def _times(factor: Tensor, matrix: Tensor) -> Tensor:
    """(B,) x (B, n, m)."""
    return factor[:, None, None] * matrix
