"""Residual streams that are read by attention over depth, and messages from one pass of a loop to the next.

Layers add up to blocks. What a layer reads is not the sum of all blocks but a mixture of them, by a learned query q:

    n_i = rms(block i);   weights = softmax_i(q . n_i / sqrt(d));   sum_i weights_i n_i

A message is such a mixture of the blocks that the pass before gave. A gate of low rank, z = W [rms(h), rms(m)], takes it in:

    h <- (1 - tanh(F z)) h + tanh(G z) m

Source of the equations: Inkling 2, as `modeling_inkling2_loop.py` of transformers 5.24.0 computes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .norm import rms


class BlockAttention(nn.Module):
    """Mixtures of blocks, one for each of its queries."""

    def __init__(self, *shape: int) -> None:
        """
        Args:
            shape: of the queries, (d,), (queries, d) or (layers, queries, d).
        """
        super().__init__()
        self.query = nn.Parameter(torch.zeros(shape))

    def forward(self, blocks: Sequence[Tensor], layer: int | None = None) -> list[Tensor]:
        """
        Args:
            blocks: normed, (B, C, d) each.
            layer: whose queries, where there are some for every layer.
        Returns:
            (B, C, d) for each query.
        """
        query = self.query if layer is None else self.query[layer]
        query = query.reshape(-1, query.shape[-1])  # (n, d)
        stacked = torch.stack(list(blocks), 2)  # (B, C, blocks, d)
        weights = torch.softmax(stacked @ query.T * query.shape[-1] ** -0.5, 2)  # (B, C, blocks, n)
        return list((weights.transpose(2, 3) @ stacked).unbind(2))


class MessageGate(nn.Module):
    """How much of a state is forgotten for a message."""

    def __init__(self, width: int, rank: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.down_proj = nn.Linear(2 * width, rank, bias=False)
        self.forget_gate_proj = nn.Linear(rank, width, bias=False)
        self.message_gate_proj = nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor, message: Tensor, there: Tensor) -> Tensor:
        """
        Args:
            x, message: (B, C, d).
            there: scalar, 1 where there is a message; 0: x is left as it is.
        """
        z = self.down_proj(torch.cat([rms(x, self.eps), rms(message, self.eps)], -1))
        forget = torch.tanh(self.forget_gate_proj(z)) * there
        return (1 - forget) * x + torch.tanh(self.message_gate_proj(z)) * there * message
