"""ATLAS as a layer (Behrouz et al. 2025, arXiv 2505.23735): a small network per head, learned at test time, segment by segment.

    q, k, v = conv(Wq x), conv(Wk x), conv(Wv x);  q and k of length 1, v of root mean square 1
    M(k) = k + down^T gelu(up^T [phi(k), 1])               the memory: two layers around a residual
    phi(k): all products of up to p channels of k, those of i channels times a_i (learned, first 1 / i!)
    y = W (M(q) / sqrt(1 + mean M(q)^2) * sigmoid(G x))

When `segment` positions are complete, the memory learns them together, at their start's weights, in `steps` steps:

    G = sum over the segment of gamma_i * d mean (M(k_i) - v_i)^2 / d(up, down)
    S <- theta S + G;  W <- alpha W - eta rule(S)           alpha in the first step only

`rule` is five Newton-Schulz iterations ("muon") or nothing ("sgd"); gamma is of a position, theta, eta and alpha are means over
the segment of what its positions ask for. Positions read the memory of the segments before theirs. All of it is free of autograd, in
closed form as rmse_edge/layers/memory has it. Other than there the memory is no state that a method of its own writes, so a layer may
stand anywhere, in a loop too; the price is that every call, of one position too, computes what its segment would teach, but in graphs
that may branch.

No call crosses a multiple of `segment` positions, but for those of whole texts, which begin at one.
"""

from __future__ import annotations

from itertools import combinations_with_replacement
from math import factorial, prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmse_edge.layers.memory.atlas import newton_schulz
from rmse_edge.layers.memory.base import gradient
from rmse_edge.layers.norm import rms, unit
from rmse_edge.layers.rows import Kept
from rmse_edge.loop.contract import Tensors

from .base import Call, Mixer, Past, Rows, StateKind
from .operators import convolved

Rule = Literal["muon", "sgd"]
MATRICES = ("up", "down")
RATES = 4  # gamma, theta, eta, alpha


def multisets(dims: int, degree: int) -> list[tuple[int, ...]]:
    """Of `degree` of `dims` channels, with repetition, each once."""
    return list(combinations_with_replacement(range(dims), degree))


def features(dims: int, degree: int) -> int:
    """Products of 1 to `degree` of `dims` channels."""
    return sum(len(multisets(dims, d)) for d in range(1, degree + 1))


class AtlasLayer(Mixer):
    def __init__(
        self,
        d_model: int,
        *,
        heads: int,
        head_dim: int,
        hidden: int,
        degree: int = 2,
        steps: int = 1,
        rule: Rule = "muon",
        segment: int = 64,
        taps: int = 4,
    ) -> None:
        """
        Args:
            heads, head_dim: H and m, of keys and values.
            hidden: channels between the two layers of a memory.
            degree: p, 1 to 3.
            steps: that the memory takes for a segment.
            segment: positions that it learns together.
            taps: positions that the convolution reads, the own one included.
        """
        super().__init__()
        self.heads, self.head_dim, self.hidden = heads, head_dim, hidden
        self.degree, self.steps, self.rule, self.segment, self.taps = degree, steps, rule, segment, taps
        wide = heads * head_dim
        self.qkv_proj = nn.Linear(d_model, 3 * wide, bias=False)
        self.conv1d = nn.Conv1d(3 * wide, 3 * wide, taps, groups=3 * wide, bias=False)
        self.rates_proj = nn.Linear(d_model, RATES * heads)
        self.gate_proj = nn.Linear(d_model, wide, bias=False)
        self.out_proj = nn.Linear(wide, d_model, bias=False)
        self.coefficients = nn.Parameter(torch.tensor([1 / factorial(d) for d in range(1, degree + 1)]))
        # What the memory is before a text begins: random features and nothing known about them.
        self.up = nn.Parameter(torch.zeros(heads, features(head_dim, degree) + 1, hidden))
        self.down = nn.Parameter(torch.zeros(heads, hidden, head_dim))
        for name, table in self.tables().items():
            self.register_buffer(name, table, persistent=False)

    def tables(self) -> dict[str, Tensor]:
        """The buffers that follow from the numbers alone, and that no checkpoint holds: of the products of each degree from
        2 on, the channels, (degree, products), and how often each occurs, (products,).
        """
        found: dict[str, Tensor] = {}
        for degree in range(2, self.degree + 1):
            every = multisets(self.head_dim, degree)
            found[f"channels_{degree}"] = torch.tensor(every).T.contiguous()
            # With these, phi(a) . phi(b) is sum_i a_i^2 (a . b)^i.
            orders = [factorial(degree) / prod(factorial(s.count(c)) for c in set(s)) for s in every]
            found[f"weights_{degree}"] = torch.tensor(orders).sqrt()
        return found

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """gamma 0.5, theta 0.12, eta 0.12, alpha 0.98; nearly linear features at first."""
        self.conv1d.weight.normal_(std=self.taps**-0.5)
        self.rates_proj.bias.copy_(torch.tensor([0.0, -2.0, -2.0, 4.0]).repeat(self.heads))
        self.rates_proj.weight.mul_(0.1)
        self.up.normal_(std=0.3)

    @property
    def kept(self) -> tuple[Kept, ...]:
        wide = self.heads * self.head_dim
        before = max(self.segment - 1, 1)  # of a segment that a call completes
        return (
            Kept("inputs", 1, 3 * wide, self.taps - 1, ordered=True),
            Kept("keys", self.heads, self.head_dim, before, ordered=True, absorbed=True),
            Kept("values", self.heads, self.head_dim, before, ordered=True, absorbed=True),
            Kept("rates", self.heads, RATES, before, ordered=True, absorbed=True),
        )

    @property
    def states(self) -> tuple[StateKind, ...]:
        """What the memory has become beyond its first weights, so that zeros are where a text begins, and its momentum."""
        shapes = {name: (self.heads, *getattr(self, name).shape[1:]) for name in MATRICES}
        return tuple(StateKind(f"{part}_{name}", shapes[name]) for part in ("memory", "momentum") for name in MATRICES)

    def forward(self, x: Tensor, rows: Rows, state: Tensors, call: Call) -> tuple[Tensor, Tensors]:
        inputs, tail = rows.add("inputs", self.qkv_proj(x).unsqueeze(1))
        assert tail is not None
        mixed = convolved(inputs, tail, self.conv1d, False, self.operators)  # (B, C, 3 H m)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in mixed.chunk(3, -1))  # (B, H, C, m)
        rates = (
            torch.sigmoid(self.rates_proj(x).float()).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        )  # (B, H, C, 4)
        own, past = {}, {}
        for name, made in (("keys", unit(k)), ("values", rms(v)), ("rates", rates)):
            own[name], past[name] = rows.add(name, made)
        query, count = unit(q), x.shape[1]
        if torch.compiler.is_exporting() or count <= self.segment:
            y, new = self._read(query, state), self.absorb(own, past, state, call) if call.leaves else {}
        else:
            y, new = self._whole(query, own, past, state, call)
        y = y * torch.rsqrt(1 + y.square().mean(-1, keepdim=True))
        return self.out_proj(y.transpose(1, 2).flatten(2) * torch.sigmoid(self.gate_proj(x))), new

    def absorb(self, rows: Tensors, past: Past, state: Tensors, call: Call) -> Tensors:
        """What the segment teaches that the call completes; otherwise the state as it was."""
        count = rows["keys"].shape[2]
        if not torch.compiler.is_exporting() and count > self.segment:
            return self._whole(None, rows, past, state, call)[1]
        latest = {name: self._of_segment(rows[name], past[name], call) for name in rows}
        ends = torch.remainder(call.position + call.n_valid, self.segment) == 0
        ends = (ends & (call.n_valid > 0))[:, None, None, None]

        def taught(*given: Tensor) -> tuple[Tensor, ...]:
            old = dict(zip(state, given[len(latest) :]))
            learned = self._learned(dict(zip(latest, given)), old)
            return tuple(torch.where(ends, learned[name], t) for name, t in old.items())

        given = (*latest.values(), *state.values())
        if not self.as_operators:
            return dict(zip(state, taught(*given)))
        # A graph that may branch: within a segment nothing is computed of what it will teach.
        new = torch.cond(ends.any(), taught, lambda *given: tuple(t.clone() for t in given[len(latest) :]), given)
        return dict(zip(state, new))

    def _whole(
        self, query: Tensor | None, rows: Tensors, past: Past, state: Tensors, call: Call
    ) -> tuple[Tensor, Tensors]:
        """A call of several segments, one after the other."""
        found = []
        for start in range(0, rows["keys"].shape[2], self.segment):
            some = {name: t[:, :, start : start + self.segment] for name, t in rows.items()}
            if query is not None:
                found.append(self._read(query[:, :, start : start + self.segment], state))
            there = (call.n_valid - start).clamp(0, self.segment)
            # Segments are whole here: what stands before them is not looked at.
            state = self.absorb(some, past, state, Call(call.position + start, there, {}))
        return (rows["keys"] if query is None else torch.cat(found, 2)), state

    def _of_segment(self, rows: Tensor, past: Tensor | None, call: Call) -> Tensor:
        """The `segment` positions up to the last one of the call, (B, H, segment, n)."""
        if past is None:
            past = rows.new_zeros(*rows.shape[:2], max(self.segment - 1, 1), rows.shape[3])
        joined = torch.cat([past, rows], 2)
        slots = past.shape[2]
        at = torch.arange(self.segment, device=rows.device) + (call.n_valid + slots - self.segment)[:, None]
        place = torch.arange(joined.shape[2], device=rows.device)
        chosen = (at.unsqueeze(-1) == place).to(rows.dtype)  # (B, segment, slots + C)
        return chosen.unsqueeze(1) @ joined

    # ------------------------------------------------------------------------------------------ the memory

    def phi(self, x: Tensor) -> Tensor:
        """(..., C, m) -> (..., C, features + 1), of which the last is 1."""
        found = [x * self.coefficients[:1]]
        for degree in range(2, self.degree + 1):
            channels, weights = getattr(self, f"channels_{degree}"), getattr(self, f"weights_{degree}")
            product = x.index_select(-1, channels[0])
            for i in range(1, degree):
                product = product * x.index_select(-1, channels[i])
            found.append(product * weights * self.coefficients[degree - 1 : degree])
        return torch.cat([*found, torch.ones_like(x[..., :1])], -1)

    def _read(self, query: Tensor, state: Tensors) -> Tensor:
        """M(q) of (B, H, C, m)."""
        up, down = (self.get_parameter(name) + state[f"memory_{name}"] for name in MATRICES)
        return query + F.gelu(self.phi(query) @ up) @ down

    def _learned(self, rows: Tensors, state: Tensors) -> Tensors:
        """The state after a segment (B, H, segment, n)."""
        key, value, rates = (rows[name].flatten(0, 1) for name in ("keys", "values", "rates"))  # (B * H, segment, n)
        gamma, theta, eta, alpha = rates.unbind(-1)
        theta, eta, alpha = (rate.mean(1)[:, None, None] for rate in (theta, eta, alpha))
        first = {name: self.get_parameter(name) for name in MATRICES}
        memory = {name: (first[name] + state[f"memory_{name}"]).flatten(0, 1) for name in MATRICES}
        momentum = {name: state[f"momentum_{name}"].flatten(0, 1) for name in MATRICES}
        phi = self.phi(key)
        for step in range(self.steps):
            hidden = phi @ memory["up"]
            error = key + F.gelu(hidden) @ memory["down"] - value
            for name, slope in zip(MATRICES, gradient(phi, hidden, error, memory["down"], gamma)):
                momentum[name] = theta * momentum[name] + slope
                moved = newton_schulz(momentum[name]) if self.rule == "muon" else momentum[name]
                kept = alpha * memory[name] if step == 0 else memory[name]
                memory[name] = kept - eta * moved
        found = {f"memory_{name}": memory[name].unflatten(0, (-1, self.heads)) - first[name] for name in MATRICES}
        return found | {f"momentum_{name}": momentum[name].unflatten(0, (-1, self.heads)) for name in MATRICES}
