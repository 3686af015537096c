"""Gated attention as in Qwen3-Next: normed queries and keys, of which a share of the channels turns, and a sigmoid gate of every
channel of what was found (Qiu et al. 2025, Gated Attention for LLMs).

Published checkpoints have query and gate of a head in one matrix, and norms as 1 + w; they are read into these layers by
reordering rows and adding 1 (rmse_edge/arch/qwen3_next/stored.py). Held against `Qwen3NextAttention` of transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rmse_edge.layers.attend import attend
from rmse_edge.layers.dense import FullAttention
from rmse_edge.layers.norm import RMSNorm
from rmse_edge.layers.rows import Kept
from rmse_edge.layers.stack import FULL, Kind
from rmse_edge.loop.contract import Tensors

from .base import Call, Mixer, Rows


def kind_of(window: int | None) -> Kind:
    """What masks of layers are called that see so many positions, the own one included; None: all."""
    return FULL if window is None else Kind(str(window), window)


class GatedAttention(FullAttention, Mixer):
    """Attention over all positions or a window of them."""

    kind: Kind

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        rotary_dims: int,
        window: int | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        """
        Args:
            n_kv_heads: G, a divisor of n_heads.
            rotary_dims: channels of a head that turn, even: the first ones.
            window: positions that are seen, the own one included; None: all.
        """
        super().__init__(d_model, n_heads, n_kv_heads, head_dim, gated=True)
        self.rotary_dims, self.kind = rotary_dims, kind_of(window)
        self.q_norm = RMSNorm(head_dim, norm_eps)
        self.k_norm = RMSNorm(head_dim, norm_eps)

    @property
    def kept(self) -> tuple[Kept, ...]:
        return tuple(
            Kept(name, self.n_kv_heads, self.head_dim, self.kind.window, cache="cache", which=which)
            for which, name in enumerate(("keys", "values"))
        )

    def forward(  # type: ignore[override]
        self, x: Tensor, rows: Rows, state: Tensors, call: Call
    ) -> tuple[Tensor, Tensors]:
        query, keys, values = (
            p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, C, heads, hd)
        own_keys, past_keys = rows.add("keys", self._placed(self.k_norm(keys), call))
        own_values, past_values = rows.add("values", values.transpose(1, 2))
        before = None if past_keys is None or past_values is None else (past_keys, past_values)
        own_mask = call.fixed[self.kind("causal_mask")]
        masks = own_mask if before is None else call.fixed[self.kind("slots_mask")], own_mask
        asked = self._placed(self.q_norm(query), call)
        seen = attend(asked, (own_keys, own_values), before, masks, operator=self.attention_operator)  # (B, H, C, hd)
        assert self.gate_proj is not None
        return self.o_proj(seen.transpose(1, 2).flatten(2) * torch.sigmoid(self.gate_proj(x))), {}

    def _placed(self, x: Tensor, call: Call) -> Tensor:
        """(B, C, H, hd) -> (B, H, C, hd), the first channels turned."""
        x, dims = x.transpose(1, 2), self.rotary_dims
        if not dims:
            return x
        cos, sin = call.fixed["cos"], call.fixed["sin"]
        if dims == self.head_dim:
            return self._turned(x, cos, sin)
        return torch.cat([self._turned(x[..., :dims], cos, sin), x[..., dims:]], -1)
