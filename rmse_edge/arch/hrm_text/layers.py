"""The layers of HRM-Text, and the model's parts by the names of published checkpoints.

A layer norms what its attention and its MLP read, and a stack what it gives; no norm has a weight:

    x = x + attention(rms(x)); x = x + mlp(rms(x))             attention scales what it has found with sigmoid(gate(rms(x)))
    stack(x) = rms(all layers)

Source of the equations: `modeling_hrm_text.py` of transformers 5.24.0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rmse_edge.layers.dense import FullAttention, GatedMLP, Pair
from rmse_edge.layers.norm import rms
from rmse_edge.layers.stack import Stack

from .config import HrmTextConfig


class HrmTextLayer(nn.Module):
    """x + attention(rms(x)), then x + mlp(rms(x)), by the names of published checkpoints."""

    def __init__(self, c: HrmTextConfig) -> None:
        super().__init__()
        self.eps = c.rms_norm_eps
        self.self_attn = FullAttention(
            c.hidden_size, c.num_attention_heads, c.num_attention_heads, c.head_dim, gated=True
        )
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size)

    def forward(
        self, x: Tensor, entered: Tensor, cos: Tensor, sin: Tensor, own: Pair, past: Pair | None, masks: Pair
    ) -> Tensor:
        x = x + self.self_attn(entered, cos, sin, own, past, masks)
        return x + self.mlp(rms(x, self.eps))


class CallOfLayer(nn.Module):
    """One call of a layer within an iteration, as a layer of a `Stack`. The stream that goes through it is [z_H; z_L].

    The half of the stack whose call this is holds the sum while its layers are called: the first one makes it of both
    halves, the last one norms it. The other half waits.
    """

    def __init__(self, layer: HrmTextLayer, high: bool, first: bool, last: bool) -> None:
        """
        Args:
            layer: which has its name elsewhere, and further calls.
            high: the stack is H.
            first, last: the layer is in its stack.
        """
        super().__init__()
        self.layer, self.high, self.first, self.last = layer, high, first, last

    def own(self, x: Tensor) -> Tensor:
        """The stream (B, C, 2 d) -> what the layer adds to, (B, C, d)."""
        high, low = x.chunk(2, -1)
        return high + low if self.first else high if self.high else low

    def enter(self, x: Tensor) -> Tensor:
        return rms(self.own(x), self.layer.eps)

    def keys_values(self, entered: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        return self.layer.self_attn.keys_values(entered, cos, sin)

    def forward(
        self, x: Tensor, entered: Tensor, cos: Tensor, sin: Tensor, own: Pair, past: Pair | None, masks: Pair
    ) -> Tensor:
        high, low = x.chunk(2, -1)
        found = self.layer(self.own(x), entered, cos, sin, own, past, masks)
        found = rms(found, self.layer.eps) if self.last else found
        return torch.cat([found, low] if self.high else [high, found], -1)


class LayersOfStack(nn.Module):
    """The layers of L or of H, by the names of published checkpoints."""

    def __init__(self, c: HrmTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HrmTextLayer(c) for _ in range(c.layers))

    def call(self, high: bool) -> list[CallOfLayer]:
        """One call of all of them."""
        last = len(self.layers) - 1
        return [CallOfLayer(layer, high, i == 0, i == last) for i, layer in enumerate(self.layers)]  # type: ignore[arg-type]


class HrmTextModel(nn.Module):
    """All but the head."""

    z_L_init: Tensor  # (d,) what z_L begins from at every position; saved, and never trained

    def __init__(self, c: HrmTextConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.L_module, self.H_module = LayersOfStack(c), LayersOfStack(c)
        self.register_buffer("z_L_init", torch.zeros(c.hidden_size))
        calls = [call for _ in range(c.L_cycles) for call in self.L_module.call(high=False)]
        calls += self.H_module.call(high=True)
        core = Stack(calls, c.num_attention_heads, c.head_dim, c.max_loops, c.kv_policy, c.kv_dtype)
        self.cache = core.cache
        self._core = (core,)  # a tuple is not registered: the layers have one name each, however often they are called

    @property
    def core(self) -> Stack:
        """What one iteration runs: L_cycles calls of L, then one of H."""
        return self._core[0]
