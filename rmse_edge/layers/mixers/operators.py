"""Parts of recurrences as one operator each, for targets that have one: as products they are dozens of nodes in a graph.

A target that has them sets `Mixer.operators`. Eager code computes the parallel forms and comes here in traces alone, where shapes
are all that is asked; what stands here is the definition, position by position, which tests hold both forms against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmse_edge.layers.convolution import depthwise


@torch.library.custom_op("rmse_edge::linear_attention", mutates_args=())
def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, memory: Tensor, decay: Tensor, beta: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """A matrix per head that decays and takes in an outer product of every position:

        S <- e^g S;  S <- S + k v^T, with a beta S + beta k (v - S^T k)^T;  y = scale * S^T q

    Args:
        query, key: (B, H, C, dk).
        value: (B, H, C, dv).
        memory: S before the call, (B, H, dk, dv).
        decay: g, of a head (B, H, C, 1) or of every row of its matrix (B, H, C, dk).
        beta: (B, H, C, 1).
    Returns:
        (y (B, H, C, dv); S after the call).
    """
    found = []
    for t in range(query.shape[2]):
        k, v = key[:, :, t].unsqueeze(-1), value[:, :, t].unsqueeze(-2)
        memory = decay[:, :, t].unsqueeze(-1).exp() * memory
        if beta is not None:
            v = (v - k.transpose(-1, -2) @ memory) * beta[:, :, t].unsqueeze(-1)
        memory = memory + k * v
        found.append(query[:, :, t].unsqueeze(-2) @ memory * scale)
    return torch.cat(found, 2), memory


@linear_attention.register_fake
def _(query, key, value, memory, decay, beta, scale):
    return torch.empty_like(value), torch.empty_like(memory)


@torch.library.custom_op("rmse_edge::short_convolution", mutates_args=())
def short_convolution(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """`depthwise` of (B, C, n), and silu behind it; the k - 1 positions before, in their order, are `past` (B, k - 1, n)."""
    found = depthwise(x.unsqueeze(1), past.unsqueeze(1), weight, bias).squeeze(1)
    return F.silu(found) if silu else found.clone()


@short_convolution.register_fake
def _(x, past, weight, bias, silu):
    return torch.empty_like(x)


def convolved(x: Tensor, past: Tensor, conv: nn.Conv1d, silu: bool, operator: bool) -> Tensor:
    """A short convolution of (B, 1, C, n), and silu behind it, (B, C, n).

    Args:
        past: the k - 1 positions before, in their order, (B, 1, k - 1, n).
        operator: in a graph, as one.
    """
    if operator and torch.compiler.is_exporting():
        return short_convolution(x.squeeze(1), past.squeeze(1), conv.weight, conv.bias, silu)
    found = depthwise(x, past, conv.weight, conv.bias).squeeze(1)
    return F.silu(found) if silu else found
