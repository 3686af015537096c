"""Softmax attention to what was before a call and to the call itself, without joining the two."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # keys and values, or the two masks: of the slots, of the call


@torch.library.custom_op("rmse_edge::attention", mutates_args=())
def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    past_keys: Tensor | None,
    past_values: Tensor | None,
    past_mask: Tensor | None,
    past_bias: Tensor | None,
    sinks: Tensor | None,
    active: Tensor | None,
    first: int,
) -> Tensor:
    """`attend` as one operator, for targets that have one: in a graph it is a dozen nodes otherwise, two of them large.

    Args:
        past_keys, past_values: (B, G', S, hd), of which the groups first .. first + G - 1 are read: a cache may hold
            those of all layers one behind the other, and to cut it apart would copy it.
        active: (C,) bool; what other queries find becomes zero, and costs nothing.
    """
    if past_keys is None or past_values is None or past_mask is None:
        biases = None if bias is None else (bias, bias)
        found = _composed(query, (keys, values), None, (mask, mask), biases, sinks).clone()
    else:
        biases = None if bias is None or past_bias is None else (past_bias, bias)
        past = past_keys.narrow(1, first, keys.shape[1]), past_values.narrow(1, first, keys.shape[1])
        found = _composed(query, (keys, values), past, (past_mask, mask), biases, sinks).clone()
    return found if active is None else torch.where(active[:, None], found, 0.0)


@attention.register_fake
def _(query, keys, values, mask, bias, past_keys, past_values, past_mask, past_bias, sinks, active, first):
    return torch.empty_like(query)


def attend(
    query: Tensor,
    own: Pair,
    past: Pair | None,
    masks: Pair,
    biases: Pair | None = None,
    sinks: Tensor | None = None,
    operator: bool = False,
) -> Tensor:
    """Softmax attention of queries (B, H, C, hd); keys, values and masks as in `FullAttention.forward`.

    Args:
        biases: added to the scores, of the slots (B, H, C, S) and of the call (B, H, C, C).
        sinks: (B, H, C, 1), a score of each query with nothing behind it: it takes its share of the softmax.
        operator: in a graph, as one.
    """
    exporting = torch.compiler.is_exporting()
    if not exporting and biases is None and sinks is None:
        keys, values = own if past is None else (torch.cat(both, 2) for both in zip(past, own))
        mask = masks[1] if past is None else torch.cat(masks, -1)
        grouped = query.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask.to(query.dtype), enable_gqa=grouped)
    if exporting and operator:
        of_past, of_own = biases or (None, None)
        before = (None, None, None, None) if past is None else (*past, masks[0], of_past)
        return attention(query, *own, masks[1], of_own, *before, sinks, None, 0)
    return _composed(query, own, past, masks, biases, sinks)


def _composed(
    query: Tensor, own: Pair, past: Pair | None, masks: Pair, biases: Pair | None, sinks: Tensor | None
) -> Tensor:
    """`attend` in products and a softmax."""
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
