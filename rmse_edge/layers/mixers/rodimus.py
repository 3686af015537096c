"""Rodimus (He et al. 2024, arXiv 2410.06577): one matrix for all channels, with a decay for each row of it that selects by temperature.

Of each position, x and g from the state, c = silu(conv(x)) behind a short convolution:

    r, k = W c;  s, tau = softplus and sigmoid of W c
    u = sigmoid(W2 W1 x) * x                    the value, of what was not convolved
    S <- e^(-s tau) S + (k / |k| * s^tau) u^T   S is (m, channels); decays and the input gate s^tau are of a row
    y = S^T r / sqrt(m) + w * c
    out = W rms(y * silu(g))                    gated before it is normed

Over the positions of a call, with a the running sum of -s tau: y_t = sum_(i<=t) (sum_m r_t k_i e^(a_t - a_i)) u_i. The sum over m is
made for every pair of positions: (C, C, m) numbers. Split into r e^a and k e^-a it would be a product, and overflow: sums of
logarithms reach -32 after 64 positions of random weights, and e^88 is beyond float32.

The published code computes the same (`modeling_rodimus.py` of codefuse-ai/rodimus).
"""

from __future__ import annotations

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmse_edge.layers.masks import MASKED
from rmse_edge.layers.norm import RMSNorm
from rmse_edge.layers.rows import Kept
from rmse_edge.loop.contract import Tensors

from .base import Call, Carried, Mixer, Past, Rows, StateKind, by_blocks
from .chunks import behind
from .operators import convolved, linear_attention


class Rodimus(Mixer):
    def __init__(
        self, d_model: int, *, channels: int, state_dim: int, gate_rank: int, taps: int = 4, norm_eps: float = 1e-5
    ) -> None:
        """
        Args:
            channels: of x, twice d_model as published.
            state_dim: m, rows of the matrix.
            gate_rank: of the gate of values.
            taps: positions that the convolution reads, the own one included.
        """
        super().__init__()
        self.channels, self.state_dim, self.taps = channels, state_dim, taps
        self.x_proj = nn.Linear(d_model, channels, bias=False)
        self.g_proj = nn.Linear(d_model, channels, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, taps, groups=channels)
        self.rk_proj = nn.Linear(channels, 2 * state_dim, bias=False)
        self.selection_proj = nn.Linear(channels, 2 * state_dim)  # of s, then of tau
        self.value_down_proj = nn.Linear(channels, gate_rank, bias=False)
        self.value_up_proj = nn.Linear(gate_rank, channels)
        self.residual_weight = nn.Parameter(torch.ones(channels))
        self.norm = RMSNorm(channels, norm_eps)
        self.out_proj = nn.Linear(channels, d_model, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """s of 1e-3 to 0.1 and tau of 1/16 to 0.9 (ibid., appendix)."""
        s, tau = self.selection_proj.bias.chunk(2)
        step = torch.empty_like(s).uniform_(log(1e-3), log(0.1)).exp()
        share = torch.empty_like(tau).uniform_(1 / 16, 0.9)
        self.selection_proj.bias.copy_(torch.cat([step + torch.log(-torch.expm1(-step)), torch.logit(share)]))
        self.conv1d.weight.normal_(std=self.taps**-0.5)
        for bias in (self.conv1d.bias, self.value_up_proj.bias):
            assert bias is not None
            bias.zero_()

    @property
    def kept(self) -> tuple[Kept, ...]:
        return (
            Kept("inputs", 1, self.channels, self.taps - 1, ordered=True),
            Kept("keys", 1, self.state_dim, 0, absorbed=True),
            Kept("values", 1, self.channels, 0, absorbed=True),
            Kept("decays", 1, self.state_dim, 0, absorbed=True),
        )

    @property
    def states(self) -> tuple[StateKind, ...]:
        return (StateKind("memory", (1, self.state_dim, self.channels)),)

    def forward(self, x: Tensor, rows: Rows, state: Tensors, call: Call) -> tuple[Tensor, Tensors]:
        given = self.x_proj(x)
        inputs, tail = rows.add("inputs", given.unsqueeze(1))
        assert tail is not None
        c = convolved(inputs, tail, self.conv1d, True, self.operators)  # (B, C, channels)
        r, k = self.rk_proj(c).chunk(2, -1)
        s, tau = self.selection_proj(c).float().chunk(2, -1)
        s, tau = F.softplus(s), torch.sigmoid(tau)
        length = torch.rsqrt(k.float().square().sum(-1, keepdim=True).clamp_min(1e-24))
        key = k * length * (tau * torch.log(s.clamp_min(1e-30))).exp()
        value = torch.sigmoid(self.value_up_proj(self.value_down_proj(given))) * given
        made = (("keys", key), ("values", value), ("decays", -s * tau))
        own = {name: rows.add(name, t.unsqueeze(1))[0] for name, t in made}
        y, (memory,) = self._run((*self._parts(own, call), r.unsqueeze(1)), state)
        y = y.squeeze(1) * self.state_dim**-0.5 + self.residual_weight * c
        return self.out_proj(self.norm(y * F.silu(self.g_proj(x)))), {"memory": memory}

    def absorb(self, rows: Tensors, past: Past, state: Tensors, call: Call) -> Tensors:
        return {"memory": self._run(self._parts(rows, call), state)[1][0]}

    def _run(self, parts: Carried, state: Tensors) -> tuple[Tensor, Carried]:
        """`_block` over all positions of a call."""
        if not self.as_operators:
            return by_blocks(self._block, parts, (state["memory"],))
        key, value, decay = parts[:3]
        y, memory = linear_attention(
            parts[-1] if len(parts) > 3 else key, key, value, state["memory"], decay, None, 1.0
        )
        return y, (memory,)

    @staticmethod
    def _parts(rows: Tensors, call: Call) -> Carried:
        """Keys (B, 1, C, m), values (B, 1, C, channels) and logarithms of decays (B, 1, C, m); of padding nothing."""
        there = call.there(rows["keys"].shape[2])
        return rows["keys"] * there, rows["values"], rows["decays"] * there

    @staticmethod
    def _block(parts: Carried, carried: Carried) -> tuple[Tensor, Carried]:
        key, value, decay = parts[:3]
        (memory,) = carried
        total = decay.cumsum(2)  # a, (B, 1, C, m)
        last = total[:, :, -1:]
        new = last.exp().transpose(2, 3) * memory + (key * (last - total).exp()).transpose(2, 3) @ value
        if len(parts) == 3:  # nobody reads
            return value, (new,)
        r, a, k = parts[3].squeeze(1), total.squeeze(1), key.squeeze(1)
        seen = behind(k.shape[1], k.device).unsqueeze(-1) >= 0
        between = torch.where(seen, a.unsqueeze(2) - a.unsqueeze(1), MASKED).exp()  # (B, C, C, m)
        scores = (r.unsqueeze(2) * k.unsqueeze(1) * between).sum(-1).unsqueeze(1)
        return scores @ value + (parts[3] * total.exp()) @ memory, (new,)
