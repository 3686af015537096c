"""What the weights of a loop see: Hessians of their inputs over every iteration, weighted by the exit distribution.

A looped weight meets different inputs in every loop, and an error it makes in loop k is seen by every exit from k on. So
by the exit distribution a row of loop k counts with the probability that its position is still running there,
prod_{j<k} (1 - lambda_j); since full depth is to work as well, `FLOOR` of a row always counts. Rows of a routed expert
also count by the square of their routing weight, as its error does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..exit import add_log_survival, exit_distribution
from ..experts import Routing, swiglu
from ..model import RMSE

FLOOR = 0.25  # weight of a row whose position has certainly stopped
PRIOR_ROWS = 32  # of an expert's Hessian come from what it would see if it were routed like the average one
BATCH = 32  # sequences run at once
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


class _Gatherer:
    """Listens to one model while it runs."""

    def __init__(self, model: RMSE, names: Iterable[str], loops: str) -> None:
        self.model, self.loops = model, loops
        self.names = set(names)
        self.found = Hessians({})
        if self.names & {UP, DOWN}:
            count, device = model.config.n_experts, model.embed.weight.device
            self.found.rows = torch.zeros(count, device=device)
            self.found.weight = torch.zeros(count, device=device)
            for name in self.names & {UP, DOWN}:
                inputs = model.get_parameter(name).shape[-1]
                self.found.sums[name] = torch.zeros(count, inputs, inputs, device=device)
        self.k = -1  # the loop that is running; -1 around the loops

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
                on(experts, self._expert_inputs)
                experts.observer = self._routed
                hooks.callback(setattr, experts, "observer", None)
            yield

    def _begin(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.k = -1
        self.log_survival = torch.zeros(args[0].shape[:-1], device=args[0].device)
        self.row_weight = torch.ones_like(self.log_survival)

    def _iteration(self, module: nn.Module, args: tuple) -> None:
        self.k = int(args[1])
        if self.loops == "exits":
            self.row_weight = FLOOR + (1 - FLOOR) * self.log_survival.exp()
        elif self.loops == "first":
            self.row_weight = torch.full_like(self.log_survival, float(self.k == 0))

    def _gate(self, module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        everywhere = torch.ones_like(self.log_survival, dtype=torch.bool)
        self.log_survival = add_log_survival(self.log_survival, logits.squeeze(-1), everywhere)

    def _add(self, name: str, x: Tensor, weight: Tensor | None = None) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        weight = (self.row_weight if weight is None else weight).reshape(-1, 1)
        if bool((weight == 0).all()):
            return
        found = (rows * weight).T @ rows
        self.found.sums[name] = self.found.sums[name] + found if name in self.found.sums else found

    def _expert_inputs(self, module: nn.Module, args: tuple) -> None:
        self.x = args[0].reshape(-1, args[0].shape[-1]).float()

    def _routed(self, k: int, routing: Routing) -> None:
        top_k = routing.experts.shape[1]
        chosen = routing.experts.reshape(-1)
        weight = self.row_weight.reshape(-1, 1) * routing.weights.square()  # (N, top_k)
        if bool((weight == 0).all()):
            return
        weight = weight.reshape(-1)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self.found.rows))
        self.found.rows += counts
        self.found.weight.index_add_(0, chosen, weight)
        experts, sums = self.model.block.experts, self.found.sums
        for e, pairs in enumerate(order.split(counts.tolist())):
            if not len(pairs):
                continue
            x, w = self.x[pairs // top_k], weight[pairs, None]
            if UP in sums:
                sums[UP][e].addmm_((x * w).T, x)
            if DOWN in sums:
                hidden = swiglu(x @ experts.gate_up_proj[e].T)
                sums[DOWN][e].addmm_((hidden * w).T, hidden)

    def head(self, states: list[Tensor], gates: Tensor) -> None:
        """Add what the head reads: the state of every exit, by its probability; with "first", of the first loop."""
        if self.loops == "first":
            return self._add(HEAD, states[0], torch.ones_like(gates[0]))
        p = exit_distribution(gates) if self.loops == "exits" else torch.full_like(gates, 1 / len(gates))
        p = FLOOR / len(p) + (1 - FLOOR) * p
        for h, weight in zip(states, p):
            self._add(HEAD, h, weight)


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
        progress: called with the number of tokens done since the last call.
    """
    gatherer = _Gatherer(model, names, loops)
    depth = 1 if gatherer.names == {INJECT} else None  # what is read once in front of the loops needs none of them
    for part in blocks.split(BATCH):
        with gatherer.listening():
            states, gates, _ = model.trajectory(part, depth)
        if HEAD in gatherer.names:
            gatherer.head(states, gates)
        progress(part.numel())
    return gatherer.found
