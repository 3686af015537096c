"""The layers of Huginn, and the model's parts by the names of published checkpoints."""

from __future__ import annotations

from torch import Tensor, nn

from rmse_edge.layers.dense import FullAttention, GatedMLP, Pair
from rmse_edge.layers.norm import RMSNorm
from rmse_edge.layers.stack import Stack

from .config import HuginnConfig


class HuginnLayer(nn.Module):
    """norm(x + attention(norm(x))), then norm(x + mlp(norm(x))): the second norm is of the sum."""

    def __init__(self, c: HuginnConfig) -> None:
        super().__init__()
        width, eps = c.n_embd, c.norm_eps
        self.attn = FullAttention(width, c.n_heads, c.n_heads, c.head_width, qk_bias=c.qk_bias)
        self.mlp = GatedMLP(width, c.intermediate_size)
        self.norm_1, self.norm_2 = RMSNorm(width, eps), RMSNorm(width, eps)
        self.norm_3, self.norm_4 = RMSNorm(width, eps), RMSNorm(width, eps)

    def enter(self, x: Tensor) -> Tensor:
        return self.norm_1(x)

    def keys_values(self, entered: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        return self.attn.keys_values(entered, cos, sin)

    def forward(
        self, x: Tensor, entered: Tensor, cos: Tensor, sin: Tensor, own: Pair, past: Pair | None, masks: Pair
    ) -> Tensor:
        x = self.norm_2(self.attn(entered, cos, sin, own, past, masks) + x)
        return self.norm_4(self.mlp(self.norm_3(x)) + x)


class HuginnModel(nn.Module):
    """All but the head."""

    def __init__(self, c: HuginnConfig) -> None:
        super().__init__()

        def stack(count: int, max_loops: int | None = None) -> Stack:
            layers = (HuginnLayer(c) for _ in range(count))
            return Stack(layers, c.n_heads, c.head_width, max_loops, c.kv_policy if max_loops else "all", c.kv_dtype)

        self.wte = nn.Embedding(c.vocab_size, c.n_embd)
        self.prelude = stack(c.n_layers_in_prelude)
        self.adapter = nn.Linear(2 * c.n_embd, c.n_embd, bias=False)  # reads [state ; embedding]
        self.core_block = stack(c.n_layers_in_recurrent_block, c.max_loops)
        self.coda = stack(c.n_layers_in_coda)
        self.ln_f = RMSNorm(c.n_embd, c.norm_eps)
