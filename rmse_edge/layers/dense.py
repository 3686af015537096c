"""The layers that dense looped models are made of: attention over everything so far, and a gated MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import rotary, rotate

Pair = tuple[Tensor, Tensor]  # keys and values, or the two masks: of the slots, of the call


class FullAttention(nn.Module):
    """Grouped-query attention with rotary positions. Keys and values are returned so that the caller owns the cache."""

    q_bias: Tensor  # (H, hd), with qk_bias
    k_bias: Tensor  # (G, hd)

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int, head_dim: int, qk_bias: bool = False, gated: bool = False
    ) -> None:
        """
        Args:
            n_kv_heads: G, a divisor of n_heads.
            qk_bias: learnt biases of queries and keys, added before they are turned.
            gated: what was found is scaled before `o_proj`, channel by channel, with sigmoid(gate_proj(x)) (Qiu et al. 2025,
                Gated Attention for LLMs).
        """
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim, self.qk_bias = n_heads, n_kv_heads, head_dim, qk_bias
        self.rotary_operator = True  # in graphs; a target that has none of its own sets it to False
        self.q_proj = nn.Linear(d_model, n_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * head_dim, d_model, bias=False)
        self.gate_proj = nn.Linear(d_model, n_heads * head_dim, bias=False) if gated else None
        if qk_bias:
            self.q_bias = nn.Parameter(torch.zeros(n_heads, head_dim))
            self.k_bias = nn.Parameter(torch.zeros(n_kv_heads, head_dim))

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        """Of normed states x (B, C, d), with angles (B, C, hd/2): two of (B, G, C, hd)."""
        keys, values = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.k_proj, self.v_proj))  # (B, C, G, hd)
        if self.qk_bias:
            keys = keys + self.k_bias
        return self._turned(keys.transpose(1, 2), cos, sin), values.transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, own: Pair, past: Pair | None, masks: Pair) -> Tensor:
        """Attend from normed states x (B, C, d) to what was before the call, and to the call.

        Args:
            own: this call's keys and values, (B, G, C, hd) each.
            past: those in slots, (B, G, S, hd) each; None: there is nothing before.
            masks: of the slots, (B or 1, 1, C, S), and of the call, (B or 1, 1, C, C): 0 where seen.
        """
        query = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        if self.qk_bias:
            query = query + self.q_bias
        seen = attend(self._turned(query.transpose(1, 2), cos, sin), own, past, masks)  # (B, H, C, hd)
        found = seen.transpose(1, 2).flatten(2)  # (B, C, H * hd)
        return self.o_proj(found if self.gate_proj is None else found * torch.sigmoid(self.gate_proj(x)))

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, H, C, hd) by angles (B, C, hd/2); in a graph as one operator."""
        turn = rotary if torch.compiler.is_exporting() and self.rotary_operator else rotate
        return turn(x, cos.unsqueeze(1), sin.unsqueeze(1))


def attend(
    query: Tensor,
    own: Pair,
    past: Pair | None,
    masks: Pair,
    biases: Pair | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of queries (B, H, C, hd); keys, values and masks as in `FullAttention.forward`.

    Args:
        biases: added to the scores, of the slots (B, H, C, S) and of the call (B, H, C, C).
        sinks: (B, H, C, 1), a score of each query with nothing behind it: it takes its share of the softmax.
    """
    if not torch.compiler.is_exporting() and biases is None and sinks is None:
        keys, values = own if past is None else (torch.cat(both, 2) for both in zip(past, own))
        mask = masks[1] if past is None else torch.cat(masks, -1)
        grouped = query.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask.to(query.dtype), enable_gqa=grouped)
    # Heads of a group share their keys: they are folded into the rows of one product instead of repeating keys and values.
    # And the past is not joined with the call, which would copy all of it: only the scores are.
    groups, count = own[0].shape[1], query.shape[2]
    rows = query.reshape(query.shape[0], groups, -1, query.shape[3])  # (B, G, H/G * C, hd)
    sides = (own,) if past is None else (past, own)
    shared = query.shape[1] // groups

    def folded(x: Tensor) -> Tensor:
        """(B, H, C, n) -> (B, G, H/G * C, n)."""
        return x.reshape(x.shape[0], groups, -1, x.shape[3])

    seen = [
        mask if shared == 1 else mask.repeat(1, 1, shared, 1) for mask in (masks if past is not None else masks[1:])
    ]
    scores = [
        torch.matmul(rows, keys.transpose(2, 3)) * query.shape[3] ** -0.5 + mask for (keys, _), mask in zip(sides, seen)
    ]  # (B, G, H/G * C, S) and (B, G, H/G * C, C)
    if biases is not None:
        scores = [score + folded(bias) for score, bias in zip(scores, biases if past is not None else biases[1:])]
    if sinks is not None:  # in front: what is cut off behind it are the columns of the call
        scores.insert(0, folded(sinks))
    weights = torch.softmax(torch.cat(scores, -1), -1)
    own_weights = weights[..., -count:]
    out = torch.matmul(own_weights, own[1])
    if past is not None:
        first = 0 if sinks is None else 1
        out = out + torch.matmul(weights[..., first:-count], past[1])
    return out.reshape(query.shape)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, GLU Variants Improve Transformer, eq. 6), (..., d) -> (..., d)."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, width, bias=False)
        self.up_proj = nn.Linear(d_model, width, bias=False)
        self.down_proj = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@torch.no_grad()
def normal_by_fan_in(model: nn.Module) -> None:
    """Give every linear layer of the model normal weights of variance 1 / inputs."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)
