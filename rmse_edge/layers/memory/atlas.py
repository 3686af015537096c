"""The memory of ATLAS (Behrouz et al. 2025, arXiv 2505.23735): omega rule, polynomial features, a Muon step.

Where Titans learns each position by itself, the omega rule learns the last `window` positions together:

    G  = sum over the window of gamma_i * d mean (M(phi(k_i)) - v_i)^2 / dW
    S' = theta S + G
    W' = alpha W - eta NS5(S')

one step per segment, with theta, alpha and eta the means of what the segment's positions ask for. phi adds all products
of two channels to the key; NS5 is five Newton-Schulz iterations that push the singular values of the momentum towards
1 (Jordan et al. 2024, Muon), so that rare directions are learned as fast as frequent ones.
"""

from __future__ import annotations

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from rmse_edge.loop.contract import Tensors, TensorSpec
from rmse_edge.numbers import SEGMENT

from .base import Memory, gradient

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Atlas(Memory):
    """M(k) = down^T gelu(up^T phi(k))."""

    first: Tensor  # (pairs,) channel pairs of the products
    second: Tensor
    scale: Tensor  # (pairs,)

    def __init__(self, d_model: int, *, dims: int, hidden: int, key_dims: int, window: int, max_loops: int) -> None:
        """
        Args:
            key_dims: channels of keys, before their products are added.
            window: positions that are learned together, a multiple of 64.
            others: as of `Memory`.
        """
        features = key_dims + key_dims * (key_dims + 1) // 2
        super().__init__(
            d_model, dims=dims, hidden=hidden, key_dims=key_dims, features=features, rates=4, max_loops=max_loops
        )
        self.window = window
        for name, table in self.tables().items():
            self.register_buffer(name, table, persistent=False)

    def tables(self) -> dict[str, Tensor]:
        """The buffers that follow from the numbers alone, and that no checkpoint holds: (pairs,) each."""
        dims = self.key_proj.out_features
        pairs = torch.triu_indices(dims, dims)
        # Off-diagonal products stand for two: with the factor, phi(a).phi(b) = (a.b + (a.b)^2) / 2.
        scale = torch.where(pairs[0] == pairs[1], 1.0, sqrt(2))
        # tensors of their own: the exporter minds
        return {"first": pairs[0].clone(), "second": pairs[1].clone(), "scale": scale}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        # gamma 0.5, theta 0.12, eta 0.5, alpha 0.98
        self.rates_proj.bias.copy_(torch.tensor([0.0, -2.0, 0.0, 4.0]))

    def window_specs(self) -> tuple[TensorSpec, ...]:
        """Features, values and gamma of the window's earlier segments, oldest first; gamma 0 where there was nothing."""
        past = self.window - SEGMENT
        if past == 0:
            return ()
        return (
            TensorSpec("window_keys", (1, past, self.up.shape[0])),
            TensorSpec("window_values", (1, past, self.down.shape[1])),
            TensorSpec("window_gates", (1, past)),
        )

    def features(self, x: Tensor) -> Tensor:
        products = x.index_select(-1, self.first) * x.index_select(-1, self.second) * self.scale
        return torch.cat([x, products], -1) * sqrt(0.5)

    def learn(
        self, key: Tensor, value: Tensor, hidden: Tensor, error: Tensor, rates: Tensor, state: Tensors
    ) -> Tensors:
        gamma, theta, eta, alpha = torch.sigmoid(rates).unbind(-1)  # (B, 64) each
        up, down = state["memory_up"], state["memory_down"]
        new: Tensors = {}
        if "window_keys" in state:
            past, known = state["window_keys"], state["window_values"]
            asked = past @ up
            hidden = torch.cat([asked, hidden], 1)
            error = torch.cat([F.gelu(asked) @ down - known, error], 1)
            key, value = torch.cat([past, key], 1), torch.cat([known, value], 1)
            gamma = torch.cat([state["window_gates"], gamma], 1)
            new = {
                "window_keys": key[:, SEGMENT:],
                "window_values": value[:, SEGMENT:],
                "window_gates": gamma[:, SEGMENT:],
            }
        slopes = gradient(key, hidden, error, down, gamma)
        theta, eta, alpha = (rate.mean(1)[:, None, None] for rate in (theta, eta, alpha))
        for name, old, slope in zip(("up", "down"), (up, down), slopes):
            momentum = theta * state[f"momentum_{name}"] + slope
            new[f"momentum_{name}"] = momentum
            new[f"memory_{name}"] = alpha * old - eta * newton_schulz(momentum)
        return new


def newton_schulz(x: Tensor) -> Tensor:
    """Five iterations towards the nearest orthogonal matrix, (B, n, m) -> (B, n, m); singular values end near 0.7 to 1.1.

    X <- a X + b (X X^T) X + c (X X^T)^2 X on X / |X|, on the shorter side. Zeros stay zeros.
    """
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    # Not + 1e-14: ONNX's exporter drops what it adds of less than 1e-8, and zeros would become 0 / 0.
    x = x * torch.rsqrt(x.square().sum((1, 2), keepdim=True).clamp_min(1e-14))
    for _ in range(ITERATIONS):
        square = x @ x.transpose(1, 2)
        x = a * x + (b * square + c * square @ square) @ x
    return x.transpose(1, 2) if tall else x
