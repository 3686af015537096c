"""Heads for multi-token prediction (MTP): each guesses one token further ahead, from what a model has computed already.

With h the state that a position stopped with, behind token x_1, and e the model's own embedding:

    s_0 = h
    s_k = norm(block(proj [norm(e(x_k+1)) ; norm(s_k-1)]))        k = 1, 2, ..., n: one head each
    logits of x_k+2 = the model's own head of s_k

Source: DeepSeek-AI 2024, DeepSeek-V3 Technical Report, arXiv 2412.19437, section 2.2, equations 21 to 23; names and the order
[embedding ; state] as `transformers` has them (`MtpLayer`), where the normed s_k goes on to the next head, too. There the block is
a layer with attention. Here it is a gated MLP, x + mlp(norm(x)): it keeps nothing between calls, so no text has to be read by the heads before
they draft, and nothing of theirs has to be taken back when a draft is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from rmse_edge.loop.contract import LoopSpec, Tensors, TensorSpec
from rmse_edge.numbers import Count, Positive
from rmse_edge.schema import Digest, Name

from .dense import GatedMLP
from .norm import RMSNorm

MOST_HEADS = 16
DRAFTED = "drafted"  # what a head gives: the state that the next one, and the model's own head, read


@dataclass(frozen=True)
class HeadsConfig:
    """What mtp.json says."""

    heads: Annotated[int, Field(ge=1, le=MOST_HEADS)]
    hidden_size: Count  # channels of the model's state, and of its embedding
    intermediate_size: Count
    norm_eps: Positive
    embedding: Name  # the model's layer that looks up the rows of tokens, "model.embed_tokens"
    model: Digest  # fingerprint of the model whose states the heads were trained on


class MtpHead(nn.Module):
    """(..., d) embedding of the newest token, (..., d) state before it -> (..., d) state."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.norm_eps
        self.enorm, self.hnorm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.norm = RMSNorm(width, eps)
        self.mlp = GatedMLP(width, config.intermediate_size)
        self.post_norm = RMSNorm(width, eps)

    def forward(self, embedded: Tensor, state: Tensor) -> Tensor:
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(state)], -1))
        return self.post_norm(x + self.mlp(self.norm(x)))


class MtpHeads(nn.Module):
    """The heads of a model, whose embedding and head they read and do not own."""

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(MtpHead(config) for _ in range(config.heads))

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Fan-in scaled normal weights; blocks begin small beside what goes past them."""
        draw = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5, generator=draw)
        for layer in self.layers:
            assert isinstance(layer, MtpHead)
            layer.mlp.down_proj.weight.mul_(0.5)

    @property
    def methods(self) -> tuple[str, ...]:
        return draft_methods(self.config.heads)

    def draft(self, method: str, model: Any, tensors: Tensors) -> Tensors:
        """One of `methods`: the state h before a token and the token, (1, 1) -> `DRAFTED`."""
        embedded = model.get_submodule(self.config.embedding)(tensors["tokens"])
        return {DRAFTED: self.layers[self.methods.index(method)](embedded, tensors["h"])}

    def added_to(self, spec: LoopSpec) -> LoopSpec:
        """A model's spec with the heads' methods, which there are for calls of one row."""
        if spec.chunk != 1:
            return spec
        takes = (spec.h, TensorSpec("tokens", (1, 1), torch.int64))
        gives = (TensorSpec(DRAFTED, spec.h.shape),)
        return replace(spec, extra=dict(spec.extra) | dict.fromkeys(self.methods, (takes, gives)))


def draft_methods(heads: int) -> tuple[str, ...]:
    """The methods of so many heads, in the order of the tokens that they guess."""
    return tuple(f"draft{index}" for index in range(heads))
