"""Sliding-window attention of many values and one key (Rodimus+, arXiv 2410.06577, section 3.3): all heads ask the same key with
queries of their own, so a window keeps a head's key and all values, about half of what keys and values of all heads take.

The published `window_size` counts twice the positions before the own one; `window` here is what a query sees, the own one included.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rmse_edge.layers.attention import rotate
from rmse_edge.layers.rows import Kept
from rmse_edge.layers.stack import Kind
from rmse_edge.loop.contract import Tensors

from .base import Call, Mixer, Rows
from .gated_attention import kind_of


class SharedKeyAttention(Mixer):
    kind: Kind

    def __init__(self, d_model: int, *, n_heads: int, head_dim: int, rotary_dims: int, window: int) -> None:
        """
        Args:
            rotary_dims: channels of a head that turn, even: the first ones.
            window: positions that are seen, the own one included.
        """
        super().__init__()
        self.n_heads, self.head_dim, self.rotary_dims, self.kind = n_heads, head_dim, rotary_dims, kind_of(window)
        self.q_proj = nn.Linear(d_model, n_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, n_heads * head_dim, bias=False)
        self.out_proj = nn.Linear(n_heads * head_dim, d_model, bias=False)

    @property
    def kept(self) -> tuple[Kept, ...]:
        return (
            Kept("keys", 1, self.head_dim, self.kind.window, cache="key_cache", which=0),
            Kept("values", self.n_heads, self.head_dim, self.kind.window, cache="value_cache", which=1),
        )

    def forward(self, x: Tensor, rows: Rows, state: Tensors, call: Call) -> tuple[Tensor, Tensors]:
        query, key, value = (
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        keys, past_keys = rows.add("keys", self._placed(key, call))
        values, past_values = rows.add("values", value)
        sides = [(keys, call.fixed[self.kind("causal_mask")])]
        if past_keys is not None:
            sides.insert(0, (past_keys, call.fixed[self.kind("slots_mask")]))
        # The key is broadcast to all heads: (B, H, C, hd) @ (B, 1, hd, S).
        asked, count = self._placed(query, call), x.shape[1]
        scores = [asked @ side.transpose(2, 3) * self.head_dim**-0.5 + mask for side, mask in sides]
        weights = torch.softmax(torch.cat(scores, -1), -1)
        seen = weights[..., -count:] @ values
        if past_values is not None:
            seen = seen + weights[..., :-count] @ past_values
        return self.out_proj(seen.transpose(1, 2).flatten(2)), {}

    def _placed(self, x: Tensor, call: Call) -> Tensor:
        """(B, H, C, hd), the first channels turned."""
        dims = self.rotary_dims
        if not dims:
            return x
        cos, sin = (call.fixed[name].unsqueeze(1) for name in ("cos", "sin"))
        if dims == self.head_dim:
            return rotate(x, cos, sin)
        return torch.cat([rotate(x[..., :dims], cos, sin), x[..., dims:]], -1)
