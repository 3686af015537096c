"""Retrieval: passages become vectors with the model's own states, and hits enter x0 by cross-attention.

A passage of at most 64 tokens is run through the model from an empty past. From the normed states its positions stop
with, learned queries pool 2 x `slots` vectors. The first half together become its **key**, each of the others
a vector of its **value**: what a passage is found by is not what it says. What searches is embedded alike, through a
projection of its own (a question does not look like its answer):

    pooled_s = sum_t softmax_t(a_s . Wa n_t) n_t                s = 1..2 slots
    key, query = unit(Wk pooled_1..slots), unit(Wq pooled_1..slots)   matched by cosine
    value_s = rms(Wv pooled_(slots + s))                        s = 1..slots

The values of the hits are read by every following token's embedding, once per call, beside a null that holds nothing
and always scores 0; with no hits x0 is what it would be without retrieval. A token's embedding alone does not know what
the text was looking for, so how well a hit matched, its cosine s, counts too:

    x0 = e + Wo softmax([0, q(norm e) . k(value) / sqrt(head_dim) + b s]) [0, v(value)]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .masks import MASKED
from .norm import RMSNorm, rms, unit


class Retrieval(nn.Module):
    """The retrieval head and the cross-attention of the prelude."""

    def __init__(
        self, d_model: int, *, slots: int, key_dims: int, n_heads: int, head_dim: int, norm_eps: float = 1e-6
    ) -> None:
        """
        Args:
            slots: vectors of a passage's value.
            key_dims: channels of the keys that are searched.
            n_heads, head_dim: of the cross-attention.
        """
        super().__init__()
        self.n_heads, self.head_dim = n_heads, head_dim
        d, wide = d_model, n_heads * head_dim
        self.pool_queries = nn.Parameter(torch.zeros(2 * slots, d))
        self.pool_proj = nn.Linear(d, d, bias=False)
        self.key_proj = nn.Linear(slots * d, key_dims, bias=False)
        self.search_proj = nn.Linear(slots * d, key_dims, bias=False)
        self.value_proj = nn.Linear(d, d, bias=False)
        self.norm = RMSNorm(d, norm_eps)
        self.q_proj = nn.Linear(d, wide, bias=False)
        self.kv_proj = nn.Linear(d, 2 * wide, bias=False)
        self.o_proj = nn.Linear(wide, d, bias=False)
        self.match = nn.Parameter(torch.tensor([8.0]))  # b

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Projections are drawn by the model; see `RMSE.reset_parameters`. Like finds like, and comes out as it went in."""
        d = len(self.o_proj.weight)
        self.pool_queries.normal_(std=1.0)
        self.search_proj.weight.copy_(self.key_proj.weight)
        self.value_proj.weight.copy_(torch.eye(d))
        keys, values = self.kv_proj.weight.chunk(2)
        self.q_proj.weight.copy_(keys)
        self.o_proj.weight.copy_(values.T * (d / len(values)))
        self.match.fill_(8.0)
        self.pool_proj.weight.mul_(d**-0.5)

    def embed(self, n: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors of a segment.

        Args:
            n: (B, C, d) normed exit states; count: (B,) rows that are there.
        Returns:
            (key (B, key_dims), query (B, key_dims), both unit vectors; value (B, slots, d)), float32.
        """
        with torch.autocast(n.device.type, enabled=False):
            n = n.float()
            there = torch.arange(n.shape[1], device=n.device) < count[:, None]  # (B, C)
            zero = torch.zeros((), device=n.device)
            scores = self.pool_queries @ self.pool_proj(n).transpose(1, 2)  # (B, 2 slots, C)
            weights = torch.softmax(scores + torch.where(there, zero, zero + MASKED).unsqueeze(1), -1)
            pooled = weights @ torch.where(there.unsqueeze(-1), n, zero)  # (B, 2 slots, d)
            found_by, said = pooled.chunk(2, 1)
            found_by = found_by.flatten(1)
            return unit(self.key_proj(found_by)), unit(self.search_proj(found_by)), rms(self.value_proj(said))

    def inject(self, x: Tensor, retrieved: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        """What x (B, C, d) takes from the hits, (B, C, d); zero where there are none.

        Args:
            retrieved: (B, R, d) values of the hits.
            scores: (B, R) cosine of each hit's key and the query that found it.
            valid: (B, R) or (B, C, R) bool, which of them are there.
        """
        heads, hd = self.n_heads, self.head_dim
        batch, count, _ = x.shape
        query = self.q_proj(self.norm(x)).view(batch, count, heads, hd).transpose(1, 2)  # (B, H, C, hd)
        kv = self.kv_proj(retrieved).view(batch, -1, 2, heads, hd).permute(2, 0, 3, 1, 4)
        keys, values = kv.unbind(0)  # (B, H, R, hd)
        seen = valid if valid.dim() == 3 else valid.unsqueeze(1)  # (B, C or 1, R)
        zero = torch.zeros((), device=x.device)
        logits = query @ keys.transpose(2, 3) * hd**-0.5 + (self.match * scores)[:, None, None, :]
        logits = logits + torch.where(seen, zero, zero + MASKED).unsqueeze(1)
        null = torch.zeros_like(logits[..., :1])
        weights = torch.softmax(torch.cat([null, logits], -1), -1)[..., 1:]
        # A masked hit has weight exp(-1e4) = 0, but what stands there might be anything.
        values = values * (valid.any(1) if valid.dim() == 3 else valid)[:, None, :, None]
        return self.o_proj((weights @ values).transpose(1, 2).reshape(batch, count, -1))
