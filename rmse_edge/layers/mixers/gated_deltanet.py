"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464): a matrix per head that every key corrects.

Of each position, with q, k and v behind a short convolution and silu, q and k of length 1:

    S <- e^g S                       g = -exp(A_log) softplus(a + dt_bias), the decay of a head
    S <- S + beta k (v - S^T k)^T    what k finds is moved towards v, by the share beta
    y = S^T q / sqrt(dk)
    out = W (rms(y) * silu(z))

H_v value heads share H_k heads of queries and keys, neighbouring ones the same. Over the positions of a call, with c the
running sum of g and D_ij = e^(c_i - c_j) (ibid., section 3.3):

    N = -(beta K K^T * D) strictly below the diagonal;  T = (I - N)^-1
    V' = T beta V - (T beta e^c K) S
    Y = e^c Q S + (Q K^T * D) V';  S <- e^c_C S + (e^(c_C - c) K)^T V'

Held against `Qwen3NextGatedDeltaNet` of transformers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmse_edge.layers.norm import RMSNorm, unit
from rmse_edge.layers.rows import Kept
from rmse_edge.loop.contract import Tensors

from .base import Call, Carried, Mixer, Past, Rows, StateKind, by_blocks
from .chunks import behind, decays, inverse_of_unit_lower
from .operators import convolved, linear_attention


class GatedDeltaNet(Mixer):
    def __init__(
        self,
        d_model: int,
        *,
        key_heads: int,
        value_heads: int,
        key_dim: int,
        value_dim: int,
        taps: int = 4,
        norm_eps: float = 1e-6,
    ) -> None:
        """
        Args:
            key_heads: H_k, a divisor of value_heads.
            key_dim, value_dim: dk and dv, of a head.
            taps: positions that the convolution reads, the own one included.
        """
        super().__init__()
        self.key_heads, self.value_heads, self.key_dim, self.value_dim = key_heads, value_heads, key_dim, value_dim
        self.taps = taps
        channels = 2 * key_heads * key_dim + value_heads * value_dim
        self.qkv_proj = nn.Linear(d_model, channels, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, taps, groups=channels, bias=False)
        self.gates_proj = nn.Linear(d_model, 2 * value_heads, bias=False)  # of beta, then of the decay
        self.A_log = nn.Parameter(torch.zeros(value_heads))
        self.dt_bias = nn.Parameter(torch.ones(value_heads))
        self.z_proj = nn.Linear(d_model, value_heads * value_dim, bias=False)
        self.norm = RMSNorm(value_dim, norm_eps)
        self.out_proj = nn.Linear(value_heads * value_dim, d_model, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.A_log.uniform_(1e-3, 16.0).log_()
        self.dt_bias.fill_(1.0)
        self.conv1d.weight.normal_(std=self.taps**-0.5)

    @property
    def kept(self) -> tuple[Kept, ...]:
        return (
            Kept("inputs", 1, self.qkv_proj.out_features, self.taps - 1, ordered=True),
            Kept("keys", self.key_heads, self.key_dim, 0, absorbed=True),
            Kept("values", self.value_heads, self.value_dim, 0, absorbed=True),
            Kept("gates", self.value_heads, 2, 0, absorbed=True),
        )

    @property
    def states(self) -> tuple[StateKind, ...]:
        return (StateKind("memory", (self.value_heads, self.key_dim, self.value_dim)),)

    def forward(self, x: Tensor, rows: Rows, state: Tensors, call: Call) -> tuple[Tensor, Tensors]:
        inputs, tail = rows.add("inputs", self.qkv_proj(x).unsqueeze(1))
        assert tail is not None
        wide = self.key_heads * self.key_dim
        mixed = convolved(inputs, tail, self.conv1d, True, self.operators)  # (B, C, n)
        q, k, v = (
            t.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, C, dk or dv)
            for t, heads in zip(
                mixed.split([wide, wide, self.value_heads * self.value_dim], -1),
                (self.key_heads, self.key_heads, self.value_heads),
            )
        )
        b, a = self.gates_proj(x).float().chunk(2, -1)
        decay = -self.A_log.float().exp() * F.softplus(a + self.dt_bias)
        gates = torch.stack([torch.sigmoid(b), decay], -1).transpose(1, 2)  # beta and g, (B, H_v, C, 2)
        own = {name: rows.add(name, t)[0] for name, t in (("keys", unit(k)), ("values", v), ("gates", gates))}
        query = self._of_value_heads(unit(q)) * self.key_dim**-0.5
        y, (memory,) = self._run((*self._parts(own, call), query), state)
        gate = F.silu(self.z_proj(x).unflatten(-1, (-1, self.value_dim)))  # (B, C, H, dv)
        return self.out_proj((self.norm(y.transpose(1, 2)) * gate).flatten(2)), {"memory": memory}

    def absorb(self, rows: Tensors, past: Past, state: Tensors, call: Call) -> Tensors:
        return {"memory": self._run(self._parts(rows, call), state)[1][0]}

    def _run(self, parts: Carried, state: Tensors) -> tuple[Tensor, Carried]:
        """`_block` over all positions of a call."""
        if not self.as_operators:
            return by_blocks(self._block, parts, (state["memory"],))
        k, v, beta, g = parts[:4]
        y, memory = linear_attention(parts[-1] if len(parts) > 4 else k, k, v, state["memory"], g, beta, 1.0)
        return y, (memory,)

    def _parts(self, rows: Tensors, call: Call) -> Carried:
        """k (B, H, C, dk), v (B, H, C, dv), beta and g (B, H, C, 1), of padding such that nothing changes."""
        beta, g = (rows["gates"] * call.there(rows["gates"].shape[2])).chunk(2, -1)
        return self._of_value_heads(rows["keys"]), rows["values"], beta, g

    def _of_value_heads(self, x: Tensor) -> Tensor:
        """(B, H_k, C, dk) -> (B, H_v, C, dk)."""
        shared = self.value_heads // self.key_heads
        return x if shared == 1 else x.unsqueeze(2).expand(-1, -1, shared, -1, -1).flatten(1, 2)

    @staticmethod
    def _block(parts: Carried, carried: Carried) -> tuple[Tensor, Carried]:
        k, v, beta, g = parts[:4]
        (memory,) = carried
        total = g.cumsum(2)  # c
        decay = decays(total.squeeze(-1))
        own = k * beta
        strict = (behind(k.shape[2], k.device) > 0).to(k.dtype)
        inverse = inverse_of_unit_lower(-(own @ k.transpose(2, 3)) * decay * strict)
        grown, last = total.exp(), total[:, :, -1:]
        new = inverse @ (v * beta) - (inverse @ (own * grown)) @ memory  # V'
        after = last.exp() * memory + (k * (last - total).exp()).transpose(2, 3) @ new
        if len(parts) == 4:  # nobody reads
            return new, (after,)
        q = parts[4]
        return (q * grown) @ memory + ((q @ k.transpose(2, 3)) * decay) @ new, (after,)
