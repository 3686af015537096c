"""The layers of Dory, and the model's parts by the names of published checkpoints.

States are kept at norm 1, and a layer moves one towards what it has found, at a learned rate per channel (nGPT, Loshchilov
et al. 2024, arXiv 2410.01131):

    x = unit(x);  x = x + |a| (unit(attention(x)) - x)
    x = unit(x);  x = x + |b| (unit(mlp(x)) - x)

Every learned scale is stored as a number s and used as s * (its intended first value) / initializer_range (ibid.,
section 2.5). The products are made when they are used, so a checkpoint is written as it was read.

Source of the equations: `modeling_dory.py` of transformers 5.24.0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmse_edge.arch.common.recurrent_model import Stacks
from rmse_edge.layers.attend import attend
from rmse_edge.layers.dense import FullAttention, GatedMLP, Pair
from rmse_edge.layers.norm import unit
from rmse_edge.layers.stack import FULL, Kind, Stack

from .config import DoryConfig


class UnitAttention(FullAttention):
    """Attention of queries and keys of norm 1, with learned scales of queries, and of a gate for every channel."""

    def __init__(self, c: DoryConfig) -> None:
        super().__init__(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        wide = c.num_attention_heads * c.head_dim
        self.g_proj = nn.Linear(c.hidden_size, wide, bias=False)
        self.sqk = nn.Parameter(torch.full((wide,), c.initializer_range))
        self.s_gate = nn.Parameter(torch.full((wide,), c.initializer_range))
        self.query_scale = c.head_dim**0.5 / c.initializer_range
        self.gate_scale = c.hidden_size**0.25 / c.initializer_range

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        keys, values = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.k_proj, self.v_proj))  # (B, C, G, hd)
        return self._turned(unit(keys).transpose(1, 2), cos, sin), values.transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, own: Pair, past: Pair | None, masks: Pair) -> Tensor:
        query = unit(self.q_proj(x).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)  # (B, H, C, hd)
        scale = (self.sqk * self.query_scale).square().view(-1, 1, self.head_dim)
        query = self._turned(query, cos, sin) * scale
        seen = attend(query, own, past, masks, operator=self.attention_operator).transpose(1, 2).flatten(2)
        gate = torch.sigmoid(self.g_proj(x) * (self.s_gate * self.gate_scale).square())
        return self.o_proj(unit(seen * gate))


class UnitMLP(GatedMLP):
    """down(unit(silu(gate(x)) * up(x))), with learned scales of both factors."""

    def __init__(self, c: DoryConfig) -> None:
        super().__init__(c.hidden_size, c.intermediate_size)
        self.suv_gate = nn.Parameter(torch.ones(c.intermediate_size))
        self.suv_up = nn.Parameter(torch.ones(c.intermediate_size))
        self.scale = c.hidden_size**0.5

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x) * (self.suv_gate * self.scale)
        up = self.up_proj(x) * (self.suv_up * self.scale)
        return self.down_proj(unit(F.silu(gate) * up))


class AttentionBlock(nn.Module):
    """A layer's attention and how far it moves the state, as published checkpoints have it."""

    def __init__(self, c: DoryConfig) -> None:
        super().__init__()
        self.mixer = UnitAttention(c)
        self.attn_alpha = nn.Parameter(torch.full((c.hidden_size,), c.initializer_range))


class MLPBlock(nn.Module):
    """A layer's MLP and how far it moves the state, as published checkpoints have it."""

    def __init__(self, c: DoryConfig) -> None:
        super().__init__()
        self.mixer = UnitMLP(c)
        self.mlp_alpha = nn.Parameter(torch.full((c.hidden_size,), c.initializer_range))


class DoryLayer(nn.Module):
    """Two blocks as one layer of a `Stack`. They are registered where checkpoints have them, in `Backbone.layers`."""

    def __init__(self, attention: AttentionBlock, mlp: MLPBlock, alpha_scale: float) -> None:
        super().__init__()
        self.attention, self.mlp, self.alpha_scale = attention, mlp, alpha_scale

    def enter(self, x: Tensor) -> Tensor:
        return unit(x)

    def keys_values(self, entered: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        return self.attention.mixer.keys_values(entered, cos, sin)

    def forward(
        self, x: Tensor, entered: Tensor, cos: Tensor, sin: Tensor, own: Pair, past: Pair | None, masks: Pair
    ) -> Tensor:
        seen = unit(self.attention.mixer(entered, cos, sin, own, past, masks))
        x = unit(entered + self._rate(self.attention.attn_alpha) * (seen - entered))
        return x + self._rate(self.mlp.mlp_alpha) * (unit(self.mlp.mixer(x)) - x)

    def _rate(self, alpha: Tensor) -> Tensor:
        return (alpha * self.alpha_scale).abs()


class Backbone(nn.Module):
    """All but the head. `layers` has the blocks in their order, attention and MLP by turns; `stacks` has them as they run."""

    def __init__(self, c: DoryConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        pairs = [(AttentionBlock(c), MLPBlock(c)) for _ in c.attention]
        self.layers = nn.ModuleList(block for pair in pairs for block in pair)
        both = len(c.thetas) > 1
        sliding = Kind("sliding" if both else "", c.sliding_window)
        kinds = tuple(FULL if kind == "full_attention" else sliding for kind in c.attention)
        layers = [DoryLayer(*pair, c.alpha_scale) for pair in pairs]
        first, core, _ = c.sections

        def stack(part: slice, max_loops: int | None = None) -> Stack:
            policy = c.kv_policy if max_loops else "all"
            shared = bool(max_loops) and c.shares_slots
            sizes = (c.num_key_value_heads, c.head_dim)
            return Stack(layers[part], *sizes, max_loops, policy, c.kv_dtype, kinds[part], shared)

        # A tuple is not registered, so the blocks have one name each.
        self.stacks = Stacks(
            stack(slice(0, first)), stack(slice(first, first + core), c.max_loops), stack(slice(first + core, None))
        )
        self.input_cache, self.recurrent_cache, self.output_cache = (stack.cache for stack in self.stacks)
