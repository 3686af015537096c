"""The layers that dense looped models are made of: attention over everything so far, and a gated MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attend import Pair, attend
from .attention import rotary, rotate


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
        self.attention_operator = False  # in graphs; a target that has one of its own sets it to True
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
        seen = attend(
            self._turned(query.transpose(1, 2), cos, sin), own, past, masks, operator=self.attention_operator
        )  # (B, H, C, hd)
        found = seen.transpose(1, 2).flatten(2)  # (B, C, H * hd)
        return self.o_proj(found if self.gate_proj is None else found * torch.sigmoid(self.gate_proj(x)))

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, H, C, hd) by angles (B, C, hd/2); in a graph as one operator."""
        turn = rotary if torch.compiler.is_exporting() and self.rotary_operator else rotate
        return turn(x, cos.unsqueeze(1), sin.unsqueeze(1))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, GLU Variants Improve Transformer, eq. 6), (..., d) -> (..., d)."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, width, bias=False)
        self.up_proj = nn.Linear(d_model, width, bias=False)
        self.down_proj = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def gelu(x: Tensor) -> Tensor:
    """By tanh (Hendrycks & Gimpel 2016, arXiv 1606.08415, section 2).

    In graphs in parts: ExecuTorch's XNNPACK takes the operator and computes the exact function in its place, up to 5e-4 off.
    """
    if not torch.compiler.is_exporting():
        return F.gelu(x, approximate="tanh")
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * (x * x * x))))


@torch.no_grad()
def normal_by_fan_in(model: nn.Module) -> None:
    """Give every linear layer of the model normal weights of variance 1 / inputs."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=module.in_features**-0.5)
