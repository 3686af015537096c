"""What the weights of a loop see: Hessians of their inputs over every iteration, weighted by the exit distribution.

A looped weight meets different inputs in every loop, and an error it makes in loop k is seen by every exit from k on. So
by the exit distribution a row of loop k counts with the probability that its position is still running there,
prod_{j<k} (1 - lambda_j). Since full depth is to work as well, a `FLOOR` of the text is run to the end, and there every row
counts; in the rest positions stop as they will when the model is used, and loops that nobody runs cost nothing. Rows of a
routed expert also count by the square of their routing weight, as its error does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor, nn

from rmse_edge.arch.rmse.model import RMSE, Stop
from rmse_edge.errors import UserError
from rmse_edge.layers.experts import Routing, swiglu
from rmse_edge.loop.stop import add_log_survival, exit_distribution

from .compare import deployed_exit
from .parallel import Cores, cores, split_evenly

# Share of the text that runs to the end; where a model has no exits, the weight of a row that would certainly have stopped.
FLOOR = 0.25
PRIOR_ROWS = 32  # of an expert's Hessian come from what it would see if it were routed like the average one
BATCH = 64  # sequences run at once
LOOPS = ("exits", "even", "first")

INJECT, HEAD = "inject.weight", "head_proj.weight"
UP, DOWN = "block.experts.gate_up_proj", "block.experts.down_proj"


@dataclass
class Hessians:
    """Sums of weight * x x^T by tensor: (K, K), of the routed experts (E, K, K)."""

    sums: dict[str, Tensor]
    rows: Tensor = field(default_factory=lambda: torch.zeros(0))  # (E,) rows each expert was given
    weight: Tensor = field(default_factory=lambda: torch.zeros(0))  # (E,) their weights added up

    def of(self, name: str) -> Tensor:
        """The Hessian to quantise a tensor with; experts that were rarely routed borrow from the average.

        Raises:
            UserError: the tensor's inputs were not numbers.
        """
        hessian = self.sums[name]
        if not bool(torch.isfinite(hessian).all()):
            raise UserError(
                f"{name}: its inputs hold NaN or Inf on the calibration text; the model diverges there, "
                "check the checkpoint with rmse-eval"
            )
        if hessian.dim() == 2:
            return hessian
        mean = self.weight.sum() / self.rows.sum().clamp_min(1)  # weight of a row
        typical = hessian.sum(0) / self.weight.sum().clamp_min(1e-12)  # E[x x^T]
        if name == DOWN:  # inputs of different experts have nothing in common but their size
            typical = typical.diagonal().mean() * torch.eye(len(typical), device=typical.device)
        return hessian + PRIOR_ROWS * mean * typical

    def rare(self) -> int:
        """Experts that were given fewer rows than they have inputs."""
        return int((self.rows < self.sums[UP].shape[-1]).sum()) if UP in self.sums else 0


class _Listener:
    """Listens to one model while it runs over a part of the text."""

    def __init__(self, model: RMSE, names: set[str], loops: str, stop: Stop | None) -> None:
        self.model, self.names, self.loops, self.stop = model, names, loops, stop
        self.soft = loops == "exits" and stop is None and deployed_exit(model) is None
        self.sums: dict[str, Tensor] = {}
        self.routed: list[tuple[Tensor, Tensor, Tensor]] = []  # rows (n, d), their experts and weights (n, top_k)
        self.latest: tuple[Tensor, Tensor | None] | None = (
            None  # an input, and its Hessian: several weights may read it
        )
        self.progress: Callable[[int], object] = lambda _: None

    @contextmanager
    def listening(self):
        block, experts = self.model.block, self.model.block.experts
        with ExitStack() as hooks:

            def on(module: nn.Module, hook: Callable, result: bool = False) -> None:
                handle = module.register_forward_hook(hook) if result else module.register_forward_pre_hook(hook)
                hooks.callback(handle.remove)

            on(self.model.inject, self._begin)
            on(block, self._iteration)
            on(self.model.gate, self._gate, result=True)
            for name in self.names - {UP, DOWN, HEAD}:
                module = self.model.get_submodule(name.removesuffix(".weight"))
                on(module, lambda _, args, name=name: self._add(name, args[0]))
            if self.names & {UP, DOWN}:
                experts.listener = self._routed
                hooks.callback(setattr, experts, "listener", None)
            yield
        self.latest = None

    def _begin(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.log_survival = torch.zeros(args[0].shape[:-1], device=args[0].device)
        self.active = torch.ones_like(self.log_survival, dtype=torch.bool)
        self.row_weight = torch.ones_like(self.log_survival)
        self.progress(self.row_weight.numel())

    def _iteration(self, module: nn.Module, args: tuple) -> None:
        if self.stop is not None:
            self.active = args[6]
            self.row_weight = self.log_survival.exp() * self.active
        elif self.soft:
            self.row_weight = FLOOR + (1 - FLOOR) * self.log_survival.exp()
        elif self.loops == "first":
            self.row_weight = torch.full_like(self.log_survival, float(int(args[1]) == 0))

    def _gate(self, module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        self.log_survival = add_log_survival(self.log_survival, logits.squeeze(-1), self.active)

    def _weights(self, count: int) -> Tensor:
        """Weights (count,) of an input's rows: of all positions, of those that the block computes, or of the active ones
        among these (see `Block.computed`)."""
        weight, active = self.row_weight, self.active
        if count < weight.numel() and (index := self.model.block.computed(active)) is not None:
            weight, active = weight.gather(1, index), active.gather(1, index)
        return weight.reshape(-1) if count == weight.numel() else weight[active]

    def _add(self, name: str, x: Tensor, weight: Tensor | None = None) -> None:
        if self.latest is None or self.latest[0] is not x:
            rows = x.reshape(-1, x.shape[-1]).float()
            weight = self._weights(len(rows)) if weight is None else weight.reshape(-1)
            self.latest = x, (rows * weight[:, None]).T @ rows if bool((weight != 0).any()) else None
        found = self.latest[1]
        if found is not None:
            self.sums[name] = self.sums[name] + found if name in self.sums else found

    def _routed(self, rows: Tensor, routing: Routing) -> None:
        weight = self._weights(len(rows))
        if bool((weight != 0).any()):
            self.routed.append((rows, routing.experts, weight[:, None] * routing.weights.square()))

    def head(self, states: list[Tensor], gates: Tensor) -> None:
        """Add what the head reads: the state of every exit, by its probability; with "first", of the first loop."""
        if self.loops == "first":
            return self._add(HEAD, states[0], torch.ones_like(gates[0]))
        if self.stop is not None:
            return self._add(HEAD, states[-1], torch.ones_like(gates[0]))
        p = torch.full_like(gates, 1 / len(gates))
        if self.soft:
            p = FLOOR * p + (1 - FLOOR) * exit_distribution(gates)
        for h, weight in zip(states, p):
            self._add(HEAD, h, weight)


def _add_experts(found: Hessians, model: RMSE, parts: list[tuple[Tensor, Tensor, Tensor]], workers: Cores) -> None:
    """Add up what routed experts read, expert by expert: of many iterations at once, so that each has enough rows.

    Args:
        parts: rows (n, d), their experts and weights (n, top_k).
    """
    if not parts:
        return
    rows, experts, weights = (torch.cat(tensors) for tensors in zip(*parts))
    parts.clear()
    top_k, sums, gate_up = experts.shape[1], found.sums, model.block.experts.gate_up_proj
    experts, weights, rows = experts.reshape(-1), weights.reshape(-1), rows.float()
    counts = torch.bincount(experts, minlength=len(found.rows))
    found.rows += counts
    found.weight.index_add_(0, experts, weights)
    order = experts.argsort(stable=True)
    pieces = zip(range(len(counts)), (order // top_k).split(counts.tolist()), weights[order].split(counts.tolist()))

    def add(some: list[tuple[int, Tensor, Tensor]]) -> None:
        for e, row, weight in some:
            x, weight = rows.index_select(0, row), weight[:, None]
            if UP in sums:
                sums[UP][e].addmm_((x * weight).T, x)
            if DOWN in sums:
                hidden = swiglu(x @ gate_up[e].T)
                sums[DOWN][e].addmm_((hidden * weight).T, hidden)

    every = [piece for piece in pieces if len(piece[1])]
    for _ in workers.each(add, [every[i :: 4 * workers.count] for i in range(4 * workers.count)]):
        pass


@torch.no_grad()
def gather(
    model: RMSE,
    blocks: Tensor,
    names: Iterable[str],
    loops: str = "exits",
    progress: Callable[[int], object] = lambda _: None,
) -> Hessians:
    """Run `model` over the calibration text and collect the Hessians of the inputs of some of its weights.

    Args:
        blocks: (n, T) int64 tokens, each row from an empty past.
        names: of the tensors.
        loops: "exits": every iteration, weighted as the module says; "even": every iteration alike; "first": the first
            iteration only, what a quantiser sees that takes the block for a layer.
        progress: called with the number of tokens begun since the last call, from several threads.
    """
    wanted = set(names)
    depth = 1 if wanted == {INJECT} else None  # what is read once in front of the loops needs none of them
    stop = deployed_exit(model) if loops == "exits" and depth is None else None
    found = Hessians({})
    if wanted & {UP, DOWN}:
        count, device = model.config.n_experts, model.embed.weight.device
        found.rows, found.weight = torch.zeros(count, device=device), torch.zeros(count, device=device)
        for name in wanted & {UP, DOWN}:
            inputs = model.get_parameter(name).shape[-1]
            found.sums[name] = torch.zeros(count, inputs, inputs, device=device)

    def listen(piece: tuple[Tensor, Stop | None]) -> _Listener:
        own = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})  # hooks of its own
        listener = _Listener(own, wanted, loops, piece[1])
        listener.progress = progress
        with listener.listening():
            states, gates, _ = own.trajectory(piece[0], depth, piece[1], every=HEAD in wanted and piece[1] is None)
        if HEAD in wanted:
            listener.head(states, gates)
        return listener

    with cores() as workers:
        pieces = _pieces(blocks, stop, workers.count)
        for start in range(0, len(pieces), workers.count):
            for listener in list(workers.each(listen, pieces[start : start + workers.count])):
                for name, sums in listener.sums.items():
                    found.sums[name] = found.sums[name] + sums if name in found.sums else sums
                _add_experts(found, model, listener.routed, workers)
    return found


def _pieces(blocks: Tensor, stop: Stop | None, workers: int) -> list[tuple[Tensor, Stop | None]]:
    """The text in pieces of about the same cost, each with the rule by which its positions stop."""
    if stop is None:
        return [(part, None) for part in blocks.split(split_evenly(len(blocks), workers, 4, BATCH // 2))]
    whole = max(1, round(FLOOR * len(blocks)))
    kinds = [(blocks[:whole], None), (blocks[whole:], stop)]
    # A text that is run to the end costs about as much as three of which positions stop: each kind for half of them.
    split = [
        [(part, ends) for part in some.split(split_evenly(len(some), max(1, workers // 2), 4, BATCH))]
        for some, ends in kinds
        if len(some)
    ]
    return [piece for pieces in zip_longest(*split) for piece in pieces if piece is not None]
