"""Sparse SwiGLU experts: of many, a few compute a position; in RMS-E 10 of 512 tiny ones, and a shared one.

Its routing reads the loop step twice: through the state, which carries the step encoding, and through a learned logit per
(loop, expert), so that one block can act like a different layer in every loop. Expert weights are stacked with the
expert as the first axis, contiguous, so that a runtime can keep, quantise or page each one by itself.

A router chooses by the scores of all experts and weighs those that it has chosen:

| scoring | chooses by | weighs by |
|---|---|---|
| softmax | logit + bias | the softmax of the chosen logits |
| sigmoid | sigmoid(logit) + bias | sigmoid(logit), over the sum of the chosen ones (DeepSeek-V3, arXiv 2412.19437, section 2.1.2) |

The second weighing is the softmax of log sigmoid(logit): so every runtime weighs by a softmax, and is given scores besides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import packed
from .cache import table_row
from .fixed import is_fixed, rows_of
from .held import Rounded, Stored

# Up to this many rows the weights of the chosen experts are gathered instead of sorting rows by expert.
GATHER_ROWS = 4
ALIGNMENT = 16  # bytes of a row that `grouped_mm` asks for
GROUPED_MM = True  # on a GPU, of many rows in bfloat16; False: our own kernel. Not measured


Scoring = Literal["softmax", "sigmoid"]
Caps = tuple[float, float]  # of gate and up, see `swiglu`; 0: none
NO_CAPS: Caps = (0.0, 0.0)


class Routing(NamedTuple):
    """What the router decided for N rows."""

    logits: Tensor  # (N, E) float32 whose softmax weighs, balancing bias not included
    experts: Tensor  # (N, top_k) int64
    weights: Tensor  # (N, top_k) float32, positive, sum 1


def select(logits: Tensor, bias: Tensor, top_k: int) -> Routing:
    """Pick experts and weigh them.

    The balancing bias takes part in the selection only (Wang et al. 2024, auxiliary-loss-free load balancing). The
    weights are the float32 softmax over all experts, renormalised over the chosen ones; since both steps divide by a
    common factor, that equals the softmax over the chosen logits.
    """
    return chosen_by(logits, logits + bias, top_k)


def chosen_by(logits: Tensor, scores: Tensor, top_k: int) -> Routing:
    """Pick the experts of the largest `scores` (N, E), and weigh them by the softmax of their `logits` (N, E)."""
    chosen = best(scores, top_k)
    return Routing(logits, chosen, torch.softmax(logits.gather(-1, chosen), -1))


def best(scores: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest scores; of equal ones, those with the lower index.

    Every runtime selects by this rule. `torch.topk` leaves open which of several equal scores it returns, so it is given
    integers that are all different: a float's bits, made to order as the float does, followed by the index.

    Args:
        scores: (N, E) float32.
    Returns:
        (N, count) int64, the best first; in a traced graph in the order of `best_portable`.
    """
    if torch.compiler.is_exporting():
        return best_portable(scores, count)
    looks = scores.device.type == "cpu" and not is_fixed()
    if looks and len(scores) <= GATHER_ROWS and count < scores.shape[-1]:
        values, found = scores.topk(count + 1, -1)  # a few rows: sooner looked at than made unique
        if all(a > b for row in values.tolist() for a, b in pairwise(row)):
            return found[:, :count]
    elif looks and (chosen := best_partitioned(scores, count)) is not None:
        return chosen
    bits = (scores.float() + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: the two are equal scores
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    size = scores.shape[-1]
    ranks = torch.arange(size - 1, -1, -1, device=scores.device)
    return torch.add(ranks, ordered, alpha=size).topk(count, -1).indices


def best_partitioned(scores: Tensor, count: int) -> Tensor | None:
    """The indices that `best` returns, by NumPy's partition: three times as fast as a topk on many rows.

    Returns:
        None where it does not say which they are: scores that are not float32 on the CPU, a NaN, or in some row a score
        that equals the last one that is selected.
    """
    size = scores.shape[-1]
    if scores.device.type != "cpu" or scores.dtype != torch.float32 or not 0 < count < size or not len(scores):
        return None
    values = scores.detach().numpy()
    top = np.partition(values, size - count, axis=1)[:, size - count :]  # NaN counts as larger than any number
    rows, found = np.nonzero(values >= top[:, :1])
    if np.isnan(top).any() or not np.array_equal(rows, np.repeat(np.arange(len(values)), count)):
        return None
    chosen = torch.from_numpy(found).view(-1, count)
    # By falling score; of equal ones those that come first, which are those with the lower index, stay first.
    order = scores.detach().gather(1, chosen).argsort(dim=1, descending=True, stable=True)
    return chosen.gather(1, order)


def best_portable(scores: Tensor, count: int) -> Tensor:
    """The indices that `best` returns, by rising index within those above the last score that is selected and those equal
    to it, in operators that every engine has.

    Engines differ in the order of equal values in their own topk, and some have no integers of 64 bits. The values that a
    topk returns are the same everywhere; the second one compares whole numbers, no two of which it selects are equal.
    """
    size = scores.shape[-1]
    least = scores.topk(count, -1).values[..., -1:]
    ranks = torch.arange(size, 0, -1, device=scores.device).to(scores.dtype)
    above, selectable = (scores > least).to(scores.dtype), (scores >= least).to(scores.dtype)
    return (selectable * ranks + above * size).topk(count, -1).indices


def swiglu(gate_up: Tensor, caps: Caps = NO_CAPS) -> Tensor:
    """silu(gate) * up over interleaved channels [gate_0, up_0, gate_1, ...]: (..., 2f) -> (..., f).

    Args:
        caps: of gate and up: c * tanh(x / c) takes the place of x, but not within the sigmoid of silu; 0: of neither.
    """
    gate, up = gate_up.unflatten(-1, (-1, 2)).unbind(-1)
    if caps == NO_CAPS:
        return F.silu(gate) * up
    return soft_capped(gate, caps[0]) * torch.sigmoid(gate) * soft_capped(up, caps[1])


def soft_capped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap): x where it is small, never beyond the cap."""
    return torch.tanh(x / cap) * cap


def gathered_experts(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor, caps: Caps = NO_CAPS) -> Tensor:
    """For a few rows: fetch the chosen experts' weights and multiply. (N, d) -> (N, d)."""
    hidden = swiglu(torch.einsum("nd,nkfd->nkf", x, gate_up[routing.experts]), caps)
    return torch.einsum("nkf,nkdf->nd", hidden * routing.weights[..., None].to(x.dtype), down[routing.experts])


def grouped_experts(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor, caps: Caps = NO_CAPS) -> Tensor:
    """For many rows: sort (row, expert) pairs by expert, then one grouped matmul per projection. (N, d) -> (N, d)."""
    rows, top_k = routing.experts.shape
    flat = routing.experts.reshape(-1)
    order = flat.argsort(stable=True)
    ends = rows_of(flat, gate_up.shape[0]).cumsum(0).to(torch.int32)
    # Zeros that fill up a row of another width than 4 float32 numbers change no product; they cost a copy of the weights.
    gate_up, down = aligned(gate_up), aligned(down.transpose(1, 2))
    hidden = F.grouped_mm(aligned(x).index_select(0, order // top_k), gate_up.transpose(1, 2), offs=ends)
    hidden = swiglu(hidden, caps)
    # The routing weight goes on the narrow hidden channels; on the output it would cost d / f times as much.
    hidden = hidden * routing.weights.reshape(-1, 1).index_select(0, order).to(x.dtype)
    out = F.grouped_mm(hidden, down, offs=ends)
    position = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    if out.shape[1] != x.shape[1]:
        out = out[:, : x.shape[1]].contiguous()
    if out.dtype == torch.float32 and not torch.is_grad_enabled():
        # the same sum, without a copy of `out` in rows' order
        return F.embedding_bag(position.view(rows, top_k), out, mode="sum")
    return out.index_select(0, position).view(rows, top_k, -1).sum(1)


def held_experts(x: Tensor, routing: Routing, gate_up: Stored, down: Stored, caps: Caps = NO_CAPS) -> Tensor:
    """For weights held as integers: one of the chosen experts after the other, so that one is decoded at a time, and those that
    nobody has chosen never. (N, d) -> (N, d).
    """
    out = torch.zeros_like(x)
    for expert in routing.experts.unique().tolist():
        rows, places = (routing.experts == expert).nonzero(as_tuple=True)
        hidden = swiglu(F.linear(x[rows], gate_up.at(expert)), caps)
        hidden = hidden * routing.weights[rows, places].unsqueeze(-1).to(x.dtype)
        out.index_add_(0, rows, F.linear(hidden, down.at(expert)))
    return out


def device_experts(
    x: Tensor, routing: Routing, gate_up: Stored | Tensor, down: Stored | Tensor, caps: Caps = NO_CAPS
) -> Tensor:
    """On a GPU, with nothing looked at: each of the chosen experts' weights as they lie in memory. (N, d) -> (N, d)."""
    rows, top_k = routing.experts.shape
    if GROUPED_MM and rows > packed.FEW_ROWS and _suits_grouped_mm(gate_up, down):
        assert isinstance(gate_up, Rounded) and isinstance(down, Rounded)
        return grouped_experts(x.to(torch.bfloat16), routing, gate_up.codes, down.codes, caps).to(x.dtype)
    flat = routing.experts.reshape(-1)
    hidden = swiglu(_product(x, gate_up, flat, top_k), caps) * routing.weights.reshape(-1, 1).to(x.dtype)
    return _product(hidden, down, flat, 1).view(rows, top_k, -1).sum(1)


def _suits_grouped_mm(*weights: Stored | Tensor) -> bool:
    """Whether weights are what `grouped_mm` takes on a GPU without a copy: bfloat16, rows of whole 16 bytes both ways."""
    return all(
        isinstance(w, Rounded) and w.codes.dtype == torch.bfloat16 and not any(n % 8 for n in w.shape[1:])
        for w in weights
    )


def _product(x: Tensor, weights: Stored | Tensor, experts: Tensor, per_row: int) -> Tensor:
    if isinstance(weights, Stored):
        return weights.product(x, experts, per_row)
    return packed.packed_product(x, weights, None, None, 32, experts, per_row)


def aligned(x: Tensor) -> Tensor:
    """`x` (..., n) as it is, or with zeros behind its last axis where `grouped_mm` would refuse its width."""
    missing = -x.shape[-1] % (ALIGNMENT // x.element_size())
    return F.pad(x, (0, missing)) if missing else x


@torch.library.custom_op("rmse_edge::sparse_experts", mutates_args=())
def sparse_experts(
    x: Tensor,
    logits: Tensor,
    scores: Tensor,
    active: Tensor,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    gate_cap: float,
    up_cap: float,
) -> Tensor:
    """The routed experts as one operator, which every target lowers in its own way.

    Args:
        x: (N, d) normed rows.
        logits: (N, E) float32, whose softmax weighs those that are selected.
        scores: (N, E) float32, by which they are selected.
        active: (N,) bool; rows that have stopped may be skipped, and whatever is returned for them is ignored.
        gate_up: (E, 2f, d) with gate and up interleaved; down: (E, d, f).
        gate_cap, up_cap: as in `swiglu`.
    Returns:
        (N, d).
    """
    routing = chosen_by(logits, scores, top_k)
    compute = gathered_experts if x.shape[0] <= GATHER_ROWS else grouped_experts
    return compute(x, routing, gate_up, down, (gate_cap, up_cap))


@sparse_experts.register_fake
def _(x, logits, scores, active, gate_up, down, top_k, gate_cap, up_cap):
    return torch.empty_like(x)


def members(picks: Tensor, n_experts: int) -> Tensor:
    """Which experts were chosen: (N, K, top_k) int64 -> (N, K, E), 1 or 0. Its product with its own transpose says how many two
    loops have in common.
    """
    return torch.zeros(*picks.shape[:2], n_experts).scatter_(2, picks, 1.0)


class SparseExperts(nn.Module):
    """Router, routed experts and shared experts."""

    balance_bias: Tensor  # (E,) added for selection only
    load: Tensor  # (E,) rows received since the last balance()

    def __init__(
        self,
        d_model: int,
        *,
        n_experts: int,
        top_k: int,
        expert_width: int,
        shared_width: int | None = None,
        max_loops: int | None = None,
        scoring: Scoring = "softmax",
        scale: float = 1.0,
        caps: Caps = NO_CAPS,
        shared_gate: bool = False,
    ) -> None:
        """
        Args:
            top_k: experts that compute a position, at most n_experts.
            expert_width: hidden channels of each routed expert.
            shared_width: hidden channels of all shared experts together; None: the model has no tensors for any.
            max_loops: K, the trained depth, of a router with a logit per loop and expert; None: it does not tell loops apart.
            scoring: what the router makes of its logits.
            scale: by which what the routed experts give is multiplied.
            caps: as in `swiglu`.
            shared_gate: what the shared experts give is multiplied by a sigmoid of each position (Qwen2-MoE).
        """
        super().__init__()
        self.n_experts, self.top_k, self.scoring, self.scale, self.caps = n_experts, top_k, scoring, scale, caps
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.tells_loops = max_loops is not None
        if max_loops is not None:
            self.step_logits = nn.Parameter(torch.zeros(max_loops, n_experts))
        self.register_buffer("balance_bias", torch.zeros(n_experts))
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * expert_width, d_model))
        self.down_proj = nn.Parameter(torch.empty(n_experts, d_model, expert_width))
        self.shares = bool(shared_width)
        if shared_width is not None:
            self.shared_gate_up_proj = nn.Linear(d_model, 2 * shared_width, bias=False)
            self.shared_down_proj = nn.Linear(shared_width, d_model, bias=False)
        self.shared_gate_proj = nn.Linear(d_model, 1, bias=False) if shared_gate else None
        # Rows each expert received since the last balance() call; kept out of checkpoints.
        self.register_buffer("load", torch.zeros(n_experts), persistent=False)
        # Called as observer(k, routing) by every eager forward pass, rows of the whole batch in order, zeros for those
        # that have stopped and are not computed; never exported.
        self.observer: Callable[[int, Routing], None] | None = None
        # Called as listener(rows, routing) with the rows (n, d) that are computed, stopped ones left out; never exported.
        self.listener: Callable[[Tensor, Routing], None] | None = None

    def router_logits(self, x: Tensor, k: int | Tensor) -> Tensor:
        """(N, d) -> (N, E), always float32: a rounding of 1e-3 here flips which experts run."""
        # Where there are only shapes, PyTorch knows no autocast.
        with nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.router.weight.float())
            return logits + table_row(self.step_logits, k).float() if self.tells_loops else logits

    def weighed(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What the router makes of its logits (N, E): those whose softmax weighs, and the scores that select, (N, E) each."""
        if self.scoring == "sigmoid":
            return F.logsigmoid(logits), torch.sigmoid(logits) + self.balance_bias
        return logits, logits + self.balance_bias

    def forward(self, x: Tensor, k: int | Tensor, active: Tensor | None = None) -> Tensor:
        """(B, C, d) normed states of loop k -> (B, C, d); rows where `active` (B, C) is False may be skipped."""
        rows = x.reshape(-1, x.shape[-1])
        if not torch.compiler.is_exporting():
            return self._computed(rows, k, active).view(x.shape)
        logits = self.router_logits(rows, k)
        live = torch.ones_like(rows[:, 0], dtype=torch.bool) if active is None else active.reshape(-1)
        routed = self._scaled(self.exported(rows, *self.weighed(logits), live))
        if not self.shares:
            return routed.view(x.shape)  # zero wide: ONNX cannot reshape what is empty to an unknown number of rows
        return (routed + self._shared(rows)).view(x.shape)

    def _scaled(self, routed: Tensor) -> Tensor:
        return routed if self.scale == 1 else routed * self.scale

    def _computed(self, rows: Tensor, k: int | Tensor, active: Tensor | None) -> Tensor:
        """The eager pass over rows (N, d) -> (N, d). Outside of training, stopped rows are not computed: they get zeros."""
        skip = active is not None and not self.training and not is_fixed() and not bool(active.all())
        live = active.reshape(-1).nonzero().squeeze(1) if skip else None  # type: ignore[union-attr]
        some = rows if live is None else rows.index_select(0, live)
        routing = self.route(some, k)
        if self.observer is not None:
            every = routing
            if live is not None:
                every = Routing(*(t.new_zeros(len(rows), t.shape[1]).index_copy_(0, live, t) for t in routing))
            self.observer(int(k), every)
        if self.training:
            self.load += torch.bincount(routing.experts.reshape(-1), minlength=self.n_experts)
        if self.listener is not None:
            self.listener(some, routing)
        found = self._scaled(self._routed(some, routing))
        if self.shares:
            found = found + self._shared(some)
        return found if live is None else torch.zeros_like(rows).index_copy_(0, live, found)

    def _routed(self, rows: Tensor, routing: Routing) -> Tensor:
        """What the chosen experts make of rows (N, d)."""
        held = [self._modules.get(f"stored_{name}") for name in ("gate_up_proj", "down_proj")]
        if packed.on_gpu(rows) and not torch.is_grad_enabled():
            return device_experts(rows, routing, held[0] or self.gate_up_proj, held[1] or self.down_proj, self.caps)  # type: ignore[arg-type]
        if isinstance(held[0], Stored) and isinstance(held[1], Stored) and not torch.is_grad_enabled():
            return held_experts(rows, routing, held[0], held[1], self.caps)
        compute = gathered_experts if rows.shape[0] <= GATHER_ROWS else grouped_experts
        gate_up, down = (w.to(rows.dtype) for w in (self.gate_up_proj, self.down_proj))  # another one under autocast
        return compute(rows, routing, gate_up, down, self.caps)

    def route(self, rows: Tensor, k: int | Tensor) -> Routing:
        """Which experts compute rows (N, d) in loop k."""
        return chosen_by(*self.weighed(self.router_logits(rows, k)), self.top_k)

    def _shared(self, rows: Tensor) -> Tensor:
        found = self.shared_mlp(rows)
        return found if self.shared_gate_proj is None else found * torch.sigmoid(self.shared_gate_proj(rows))

    def shared_mlp(self, rows: Tensor) -> Tensor:
        """The shared experts, (N, d) -> (N, d)."""
        return self.shared_down_proj(swiglu(self.shared_gate_up_proj(rows)))

    def exported(self, rows: Tensor, logits: Tensor, scores: Tensor, active: Tensor) -> Tensor:
        """The routed experts in a graph: rows (N, d), logits and scores (N, E), active (N,) bool -> (N, d)."""
        weights = (self.gate_up_proj, self.down_proj)
        return sparse_experts(rows, logits, scores, active, *weights, self.top_k, *self.caps)

    def margin(self, routing: Routing) -> Tensor:
        """By how much the last expert that was selected leads the next one, (N,); infinite where all are selected."""
        top_k = self.top_k
        if top_k == self.n_experts:
            return torch.full_like(routing.logits[:, 0], torch.inf)
        scores = routing.logits.exp() if self.scoring == "sigmoid" else routing.logits
        last, following = (scores + self.balance_bias).topk(top_k + 1).values[:, -2:].unbind(-1)
        return last - following

    @torch.no_grad()
    def balance(self, rate: float) -> float:
        """Raise the selection bias of experts that got less than their share, lower it for the others.

        Called once per optimiser step, after the loads of all processes were summed into `load`.

        Returns:
            The share of experts that received no row since the last call.
        """
        idle = (self.load == 0).float().mean().item()
        self.balance_bias += rate * torch.sign(self.load.mean() - self.load)
        self.load.zero_()
        return idle


class StoredExperts(SparseExperts):
    """Base of experts whose stacked weights, `gate_up_proj` and `down_proj`, are stored in a form of a target's own.

    All else, whatever it may be, is that of the experts they are made from.
    """

    def __init__(self, experts: SparseExperts) -> None:
        nn.Module.__init__(self)
        for name, value in vars(experts).items():  # numbers, and the dictionaries of parameters, buffers and modules
            self.__dict__[name] = copy.copy(value)
        self.gate_up_proj = self.down_proj = None  # type: ignore[assignment]
