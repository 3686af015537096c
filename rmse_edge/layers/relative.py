"""Attention's bias by distance, which every query mixes from learned profiles.

    r = clipped(scale * W x)                                 of every head, d_rel numbers
    bias(query, distance) = r . P[:, distance]               0 at distances of `extent` and more

Source of the equations: Inkling 2, as `modeling_inkling2_loop.py` of transformers 5.24.0 computes it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm import clipped


class ScaledClip(nn.Module):
    """Heads (B, C, H, n) times a learned scale, no longer than `longest`; then by `log_scale`, where there is one."""

    def __init__(self, n_heads: int, dims: int, longest: float) -> None:
        super().__init__()
        self.longest = longest
        self.scale = nn.Parameter(torch.ones(n_heads, dims))

    def forward(self, x: Tensor, log_scale: Tensor | None = None) -> Tensor:
        """`log_scale` (B, C), see the function of this name."""
        x = clipped(x * self.scale, self.longest)
        return x if log_scale is None else x * log_scale[..., None, None]


def log_scale(position: Tensor, count: int, floor: int, alpha: float) -> Tensor:
    """1 + alpha * log(max((p + 1) / floor, 1)) of the positions p of a call, (B, C): queries grow with the text behind them."""
    here = position[:, None] + torch.arange(count, device=position.device)
    return 1.0 + alpha * torch.log(((here + 1).to(torch.float32) / floor).clamp(min=1.0))


def bias_index(distance: Tensor, extent: int) -> Tensor:
    """Where `RelativeBias` finds what it gives at a distance (B, C, n) int64 of each row; negative ones are to be masked."""
    batch, count, _ = distance.shape
    rows = torch.arange(batch * count, device=distance.device).view(batch, count, 1)
    return rows * (extent + 1) + distance.clamp(0, extent)


class RelativeBias(nn.Module):
    """The bias of queries against keys in slots and in the call."""

    def __init__(self, d_model: int, n_heads: int, dims: int, extent: int, longest: float) -> None:
        """
        Args:
            dims: profiles that are mixed, d_rel.
            extent: distances that have a bias: 0 to extent - 1.
            longest: L2 norm of what a head mixes them with.
        """
        super().__init__()
        self.n_heads, self.dims, self.extent = n_heads, dims, extent
        self.linear = nn.Linear(d_model, n_heads * dims, bias=False)
        self.norm = ScaledClip(n_heads, dims, longest)
        self.proj = nn.Parameter(torch.zeros(dims, extent))

    def forward(self, x: Tensor, indices: tuple[Tensor, ...], log_scale: Tensor | None = None) -> list[Tensor]:
        """Of states (B, C, d), for each index (B, C, n) of `bias_index`: (B, H, C, n)."""
        mixed = self.norm(self.linear(x).unflatten(-1, (self.n_heads, self.dims)), log_scale)  # (B, C, H, d_rel)
        profiles = F.pad(self.proj, (0, 1))  # the last one is of all distances beyond: none
        # Rows of all heads beside each other: one index serves all heads, and nothing is as large as heads times slots twice.
        found = (mixed.flatten(0, 1).transpose(0, 1) @ profiles).flatten(1)  # (H, B * C * (extent + 1))
        return [
            found.index_select(1, index.flatten()).view(self.n_heads, *index.shape).transpose(0, 1) for index in indices
        ]
