"""Mamba-3 (arXiv 2603.15569): a matrix per head, whose steps are trapezoids and whose keys and queries turn.

Of each position, with B and C normed, a learned vector added to them for every head, and turned by theta:

    theta <- theta + pi tanh(angle) dt        dt = softplus(dt + dt_bias);  lam = sigmoid(trap);  alpha = e^(A dt)
    S <- alpha S + (1 - lam) dt alpha v' k'^T + lam dt v k^T        v', k': of the position before
    y = S q + D v
    out = W (y * silu(z))

A = -max(act(A), 1e-4) depends on the position, with act(x) = softplus(x) as first published, or heavy-tailed: 1 + x from 0 on,
1 / (1 - x) below. Of rank R ("MIMO") a position has R keys, queries and values: v_r = v * mimo_x_r, and R results, which are
gated by silu(z * mimo_z_r) and added up by mimo_o_r.

Over the positions of a call, with c the running sum of A dt and s_i = lam_i dt_i + (1 - lam_(i+1)) dt_(i+1), this is one decayed
attention with a diagonal of its own, and the position before the call stands in front of it:

    y_t = sum_(i<t) e^(c_t - c_i) s_i (q_t . k_i) v_i + lam_t dt_t (q_t . k_t) v_t + e^(c_t) S q_t + D v_t

Channels that turn together lie n apart: the first n with the next n. Published ones lie otherwise, see `published_order`.
"""

from __future__ import annotations

from math import log, pi
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmse_edge.layers.attention import rotate
from rmse_edge.layers.masks import MASKED
from rmse_edge.layers.norm import RMSNorm
from rmse_edge.layers.rows import Kept
from rmse_edge.loop.contract import Tensors

from .base import Call, Carried, Mixer, Past, Rows, StateKind, by_blocks
from .operators import linear_attention

Activation = Literal["softplus", "heavy_tail"]
LEAST_DECAY = 1e-4
CARRIED = ("memory", "theta", "last_keys", "last_values")


def heavy_tail(x: Tensor) -> Tensor:
    """1 + x from 0 on, 1 / (1 - x) below: positive, and it falls slowly on the left."""
    return F.relu(x) + 1 / (1 + F.relu(-x))


def published_order(state_dim: int, angles: int, rank: int) -> list[int]:
    """Which of the published channels of B and C stands at each place here.

    Published ones of rank 1 turn neighbours together, those of a higher rank channel i and i + N/2.
    """
    step, apart = (2, 1) if rank == 1 else (1, state_dim // 2)
    first = [step * i for i in range(angles)]
    turned = [*first, *(i + apart for i in first)]
    return [*turned, *(i for i in range(state_dim) if i not in turned)]


class Mamba3(Mixer):
    def __init__(
        self,
        d_model: int,
        *,
        heads: int,
        head_dim: int,
        state_dim: int,
        angles: int,
        rank: int = 1,
        a_activation: Activation = "heavy_tail",
        first_steps: tuple[float, float] = (1e-3, 0.1),
        norm_eps: float = 1e-5,
    ) -> None:
        """
        Args:
            heads, head_dim: H and P, of values.
            state_dim: N, channels of keys and queries.
            angles: n, pairs of these that turn, at most N / 2; 0: none do, which is the recurrence in real numbers.
            rank: R, keys of a position.
            first_steps: dt of a head before training, at least and at most.
        """
        super().__init__()
        self.heads, self.head_dim, self.state_dim, self.angles, self.rank = heads, head_dim, state_dim, angles, rank
        self.a_activation, self.first_steps = a_activation, first_steps
        inner = heads * head_dim
        self.x_proj = nn.Linear(d_model, inner, bias=False)
        self.b_proj = nn.Linear(d_model, rank * state_dim, bias=False)
        self.steps_proj = nn.Linear(d_model, 3 * heads + angles, bias=False)  # dt, A, trap, angles
        self.z_proj = nn.Linear(d_model, inner, bias=False)
        self.c_proj = nn.Linear(d_model, rank * state_dim, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.b_norm, self.c_norm = RMSNorm(state_dim, norm_eps), RMSNorm(state_dim, norm_eps)
        self.b_bias = nn.Parameter(torch.ones(heads, rank, state_dim))
        self.c_bias = nn.Parameter(torch.ones(heads, rank, state_dim))
        self.D = nn.Parameter(torch.ones(heads))
        if rank > 1:
            self.mimo_x = nn.Parameter(torch.full((heads, rank, head_dim), 1 / rank))
            self.mimo_z = nn.Parameter(torch.ones(heads, rank, head_dim))
            self.mimo_o = nn.Parameter(torch.full((heads, rank, head_dim), 1 / rank))
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Steps spread evenly over the logarithms of `first_steps`."""
        least, most = map(log, self.first_steps)
        step = torch.empty_like(self.dt_bias).uniform_(least, most).exp()
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))

    @property
    def kept(self) -> tuple[Kept, ...]:
        return (
            Kept("values", self.heads, self.head_dim, 0, absorbed=True),
            Kept("keys", self.rank, self.state_dim, 0, absorbed=True),
            Kept("steps", 1, 3 * self.heads + self.angles, 0, absorbed=True),
        )

    @property
    def states(self) -> tuple[StateKind, ...]:
        """The matrix, the angles it has come to, and keys and values of the position before."""
        theta = (StateKind("theta", (self.heads, 1, self.angles)),) if self.angles else ()
        return (
            StateKind("memory", (self.heads, self.head_dim, self.state_dim)),
            *theta,
            StateKind("last_keys", (self.heads, self.rank, self.state_dim)),
            StateKind("last_values", (self.heads, 1, self.head_dim)),
        )

    def forward(self, x: Tensor, rows: Rows, state: Tensors, call: Call) -> tuple[Tensor, Tensors]:
        keys = self.b_norm(self.b_proj(x).unflatten(-1, (self.rank, -1))).transpose(1, 2)  # (B, R, C, N)
        dt, a, trap, angles = self.steps_proj(x).float().split([self.heads] * 3 + [self.angles], -1)
        dt = F.softplus(dt + self.dt_bias)
        act = F.softplus(a) if self.a_activation == "softplus" else heavy_tail(a)
        decay = -dt * act.clamp_min(LEAST_DECAY)
        steps = torch.cat([dt, decay, torch.sigmoid(trap), pi * torch.tanh(angles)], -1).unsqueeze(1)
        values = self.x_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        own = {name: rows.add(name, t)[0] for name, t in (("values", values), ("keys", keys), ("steps", steps))}
        query = self.c_norm(self.c_proj(x).unflatten(-1, (self.rank, -1))).transpose(1, 2)
        y, new = self._run(own, query, state, call)
        y = y.transpose(1, 2)  # (B, C, H, R * P)
        z = self.z_proj(x).unflatten(-1, (self.heads, -1))  # (B, C, H, P)
        if self.rank == 1:
            return self.out_proj((y * F.silu(z)).flatten(2)), new
        gate = F.silu(z.unsqueeze(3) * self.mimo_z) * self.mimo_o  # (B, C, H, R, P)
        return self.out_proj((y.unflatten(-1, (self.rank, -1)) * gate).sum(3).flatten(2)), new

    def absorb(self, rows: Tensors, past: Past, state: Tensors, call: Call) -> Tensors:
        return self._run(rows, None, state, call)[1]

    def _run(self, rows: Tensors, query: Tensor | None, state: Tensors, call: Call) -> tuple[Tensor, Tensors]:
        """What is read, (B, H, C, R * P), and the state. Without queries (B, R, C, N) what is read means nothing."""
        steps = rows["steps"]  # (B, 1, C, n)
        there = call.there(steps.shape[2])
        *per_head, angles = steps.split([self.heads] * 3 + [self.angles], -1)
        dt, decay, lam = (t.transpose(1, 3) for t in per_head)  # (B, H, C, 1)
        dt, decay = dt * there, decay * there  # padding takes no step
        parts = [rows["values"], dt, decay, lam, dt * angles, self._of_heads(rows["keys"], self.b_bias), there]
        if query is not None:
            parts.append(self._of_heads(query, self.c_bias))
        nothing = {} if self.angles else {"theta": (dt * angles)[:, :, :1]}  # of no width
        y, new = by_blocks(self._block, tuple(parts), tuple((state | nothing)[name] for name in CARRIED))
        after = dict(zip(CARRIED, new))
        return y, {kind.name: after[kind.name] for kind in self.states}

    def _of_heads(self, x: Tensor, bias: Tensor) -> Tensor:
        """Keys or queries (B, R, C, N) -> with the vectors of each head, (B, H, C, R * N)."""
        return x.transpose(1, 2).flatten(2).unsqueeze(1) + bias.flatten(1).unsqueeze(1)

    def _turned(self, x: Tensor, theta: Tensor) -> Tensor:
        """Keys or queries (B, H, C, R * N), turned by theta (B, H, C, n): (B, H, C * R, N), positions outermost."""
        n = self.angles
        if n == 0:
            return x.unflatten(-1, (self.rank, -1)).flatten(2, 3)
        x = x.unflatten(-1, (self.rank, -1))  # (B, H, C, R, N)
        cos, sin = theta.cos().unsqueeze(3), theta.sin().unsqueeze(3)
        turned = rotate(x[..., : 2 * n], cos, sin)
        x = torch.cat([turned, x[..., 2 * n :]], -1) if 2 * n < self.state_dim else turned
        return x.flatten(2, 3)

    def _block(self, parts: Carried, carried: Carried) -> tuple[Tensor, Carried]:
        values, dt, decay, lam, turn, keys, there = parts[:7]
        memory, theta, last_keys, last_values = carried
        rank, count = self.rank, values.shape[2]
        theta = theta + turn.cumsum(2)  # (B, H, C, n)
        keys = self._turned(keys, theta)  # (B, H, C * R, N)
        total = decay.cumsum(2)  # c, (B, H, C, 1)
        own, next_one = lam * dt, (1 - lam) * dt
        nothing = total[:, :, :1] * 0
        share = torch.cat([next_one, nothing], 2) + torch.cat([nothing, own], 2)
        # Of the last position that is there; of a block of padding, what was kept before.
        latest = there - torch.cat([there, there[:, :, :1] * 0], 2)[:, :, 1:]  # (B, 1, C, 1)
        kept = 1 - latest.sum(2, keepdim=True)
        by_rank = (keys * self._rows(latest)).unflatten(2, (-1, rank)).sum(2)
        after = (
            _wrapped(theta[:, :, -1:]),
            kept * last_keys + by_rank,
            kept * last_values + (values * latest).sum(2, keepdim=True),
        )
        query = None if len(parts) == 7 else self._turned(parts[7], theta)  # None: nobody reads
        if self.as_operators and rank == 1:
            y, new = self._as_operator(query, keys, values, decay, own, share, carried)
            return y, (new, *after)
        # One row for each key: those of the position before, then those of the call.
        every_key = torch.cat([last_keys, keys], 2)
        every_value = torch.cat([self._ranked(last_values), self._ranked(values)], 2)  # (B, H, (1 + C) R, P)
        since = torch.cat([nothing, total], 2)  # c of each, (B, H, 1 + C, 1)
        whole = total[:, :, -1:]
        left = self._rows((whole - since).exp() * share)
        new = whole.exp() * memory + (every_value * left).transpose(2, 3) @ every_key
        if query is None:
            return values, (new, *after)
        row = torch.arange(count, device=values.device)
        distance = (row[:, None] + 1) - torch.arange(
            count + 1, device=values.device
        )  # of the position before: 1 and more
        earlier = torch.where(distance > 0, total - since.transpose(2, 3), MASKED).exp()
        weight = earlier * share.transpose(2, 3) + (distance == 0).to(own.dtype) * own
        scores = (query @ every_key.transpose(2, 3)) * self._rows(self._rows(weight).transpose(2, 3)).transpose(2, 3)
        y = scores @ every_value + (query * self._rows(total.exp())) @ memory.transpose(2, 3)
        y = y + self.D[:, None, None] * self._ranked(values)
        return y.unflatten(2, (-1, rank)).flatten(3), (new, *after)

    def _as_operator(
        self,
        query: Tensor | None,
        keys: Tensor,
        values: Tensor,
        decay: Tensor,
        own: Tensor,
        share: Tensor,
        carried: Carried,
    ) -> tuple[Tensor, Tensor]:
        """Of rank 1, what is read and the matrix after the call: as a recurrence in which every key has its whole share.

        The operator reads behind the row, when the share is in that only the next position adds: it is taken off again.
        """
        memory, _, last_keys, last_values = carried
        first = memory + share[:, :, :1] * last_values.transpose(2, 3) @ last_keys
        shares = share[:, :, 1:]
        found = linear_attention(
            keys if query is None else query, keys * shares, values, first.transpose(2, 3), decay, None, 1.0
        )
        y, new = found[0], found[1].transpose(2, 3)
        if query is None:
            return y, new
        early = self.D[:, None, None] - (shares - own) * (query * keys).sum(-1, keepdim=True)
        return y + early * values, new

    def _rows(self, x: Tensor) -> Tensor:
        """Each position's row R times, (B, H, C, n) -> (B, H, C * R, n)."""
        if self.rank == 1:
            return x
        return x.unsqueeze(3).expand(-1, -1, -1, self.rank, -1).flatten(2, 3)

    def _ranked(self, values: Tensor) -> Tensor:
        """Values (B, H, C, P) -> R for each position, (B, H, C * R, P)."""
        if self.rank == 1:
            return values
        return (values.unsqueeze(3) * self.mimo_x.unsqueeze(1)).flatten(2, 3)


def _wrapped(theta: Tensor) -> Tensor:
    """An angle less whole turns: in float32 large ones lose their fraction."""
    return theta - 2 * pi * torch.floor(theta * (0.5 / pi))
