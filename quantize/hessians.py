"""What the weights of a loop see: Hessians of their inputs over every iteration, weighted by the exit distribution.

A looped weight meets different inputs in every loop, and an error it makes in loop k is seen by every exit from k on. So
by the exit distribution a row of loop k counts with the probability that its position is still running there,
prod_{j<k} (1 - lambda_j). Since full depth is to work as well, a `FLOOR` of the text is run to the end, and there every row
counts; in the rest positions stop as they will when the model is used, and loops that nobody runs cost nothing. Rows of a
routed expert also count by the square of their routing weight, as its error does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from rmse_edge.errors import UserError
from rmse_edge.layers.experts import Routing, SparseExperts, swiglu
from rmse_edge.loop.course import Course, Reader
from rmse_edge.loop.stop import exit_distribution

from .parallel import Cores, cores, shared_copy, split_evenly
from .reader import reader_of
from .scheme import table_of

# Share of the text that runs to the end; where a model has no exits, the weight of a row that would certainly have stopped.
FLOOR = 0.25
PRIOR_ROWS = 32  # of an expert's Hessian come from what it would see if it were routed like the average one
BATCH = 64  # sequences run at once
LOOPS = ("exits", "even", "first")
UP, DOWN = "gate_up_proj", "down_proj"  # of a `SparseExperts`


@dataclass
class Hessians:
    """Sums of weight * x x^T by tensor: (K, K), of routed experts (E, K, K)."""

    sums: dict[str, Tensor]
    # By module of routed experts, (E,): the rows that each was given, and their weights added up.
    rows: dict[str, Tensor] = field(default_factory=dict)
    weight: dict[str, Tensor] = field(default_factory=dict)

    def of(self, name: str) -> Tensor:
        """The Hessian to quantise a tensor with; experts that were rarely routed borrow from the average.

        Raises:
            UserError: the tensor's inputs were not numbers, or nothing was multiplied with it.
        """
        if name not in self.sums:
            raise UserError(
                f"{name}: nothing is multiplied with it; say in its architecture's table that it stays float"
            )
        hessian = self.sums[name]
        if not bool(torch.isfinite(hessian).all()):
            raise UserError(
                f"{name}: its inputs hold NaN or Inf on the calibration text; the model diverges there, "
                "check the checkpoint with rmse-eval"
            )
        if hessian.dim() == 2:
            return hessian
        path, _, which = name.rpartition(".")
        mean = self.weight[path].sum() / self.rows[path].sum().clamp_min(1)  # weight of a row
        typical = hessian.sum(0) / self.weight[path].sum().clamp_min(1e-12)  # E[x x^T]
        if which == DOWN:  # inputs of different experts have nothing in common but their size
            typical = typical.diagonal().mean() * torch.eye(len(typical), device=typical.device)
        return hessian + PRIOR_ROWS * mean * typical

    def rare(self) -> int:
        """Experts that were given fewer rows than they have inputs."""
        inputs = {path: self.sums[f"{path}.{UP}"].shape[-1] for path in self.rows if f"{path}.{UP}" in self.sums}
        return sum(int((self.rows[path] < n).sum()) for path, n in inputs.items())


class _Listener:
    """Listens to one model while it reads a part of the text: a `Watcher` whose hooks hear the inputs of weights."""

    def __init__(self, model: nn.Module, reader: Reader, names: set[str], loops: str, stop: bool) -> None:
        self.model, self.reader, self.names, self.loops, self.stop = model, reader, names, loops, stop
        self.soft = loops == "exits" and not stop and not reader.exits
        self.head_name = table_of(model).head
        self.sums: dict[str, Tensor] = {}
        # By module of experts: rows (n, d), their experts and weights (n, top_k).
        self.routed: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.latest: tuple[Tensor, Tensor | None] | None = (
            None  # an input, and its Hessian: several weights may read it
        )
        self.progress: Callable[[int], object] = lambda _: None

    @contextmanager
    def listening(self):
        with ExitStack() as hooks:
            for name in sorted(self.names - {self.head_name}):
                path = name.rpartition(".")[0]
                module = self.model.get_submodule(path)
                if isinstance(module, SparseExperts):
                    module.listener = partial(self._routed, path)
                    hooks.callback(setattr, module, "listener", None)
                elif isinstance(module, nn.Linear):
                    hook = module.register_forward_pre_hook(lambda _, args, name=name: self._add(name, args[0]))
                    hooks.callback(hook.remove)
                else:
                    raise UserError(
                        f"{name}: is a weight of {type(module).__name__}, whose inputs gptq does not hear; quantise with "
                        "method=rtn"
                    )
            yield
        self.latest = None

    def begins(self, valid: Tensor) -> None:
        self.valid = valid
        self.ends()
        self.progress(valid.numel())

    def ends(self) -> None:
        self.active, self.row_weight = self.valid, self.valid.float()
        self.computed: Tensor | None = None

    def iterates(self, active: Tensor, log_survival: Tensor | None, computed: Tensor | None, k: int) -> None:
        self.active, self.computed = active, computed
        self.row_weight = active.float()
        if self.stop and log_survival is not None:
            self.row_weight = log_survival.exp() * active
        elif self.soft and log_survival is not None:
            self.row_weight = FLOOR + (1 - FLOOR) * log_survival.exp()
        elif self.loops == "first" and k > 0:
            self.row_weight = torch.zeros_like(self.row_weight)

    def _weights(self, name: str, rows: torch.Size) -> Tensor:
        """Weights (n,) of an input's rows: of all positions (and heads), of those that are computed, or of the active
        ones among these.

        Raises:
            UserError: there is another number of rows.
        """
        weight, active, count = self.row_weight, self.active, rows.numel()
        if weight.shape == (rows[0], 1):  # one for everything that is computed of a board
            weight = weight.expand(rows[:2])
        if rows[:2] == weight.shape:
            return weight.reshape(*weight.shape, *[1] * (len(rows) - 2)).expand(rows).reshape(-1)
        if count < weight.numel() and self.computed is not None:
            weight, active = weight.gather(1, self.computed), active.gather(1, self.computed)
        if count == weight.numel():
            return weight.reshape(-1)
        if count != int(active.sum()):
            raise UserError(
                f"{name}: is given {count} rows for {weight.numel()} positions, and nobody says which is whose; quantise "
                "with method=rtn, or give the architecture a reader"
            )
        return weight[active]

    def _add(self, name: str, x: Tensor, weight: Tensor | None = None) -> None:
        if self.latest is None or self.latest[0] is not x:
            rows = x.reshape(-1, x.shape[-1]).float()
            weight = self._weights(name, x.shape[:-1]) if weight is None else weight.reshape(-1)
            self.latest = x, (rows * weight[:, None]).T @ rows if bool((weight != 0).any()) else None
        found = self.latest[1]
        if found is not None:
            self.sums[name] = self.sums[name] + found if name in self.sums else found

    def _routed(self, path: str, rows: Tensor, routing: Routing) -> None:
        weight = self._weights(path, rows.shape[:-1])
        if bool((weight != 0).any()):
            heard = rows, routing.experts, weight[:, None] * routing.weights.square()
            self.routed.setdefault(path, []).append(heard)

    def head(self, course: Course) -> None:
        """Add what the head reads: the state of every exit, by its probability; with "first", of the first loop."""
        states, gates, ones = course.states, course.gates, torch.ones_like(course.depth, dtype=torch.float32)
        if self.loops == "first":
            states, p = states[:1], ones[None]
        elif self.stop:
            states, p = states[-1:], ones[None]
        else:
            p = torch.stack([ones / len(states)] * len(states))
            if self.soft and gates is not None:
                p = FLOOR * p + (1 - FLOOR) * exit_distribution(gates)
        assert self.head_name is not None
        for h, weight in zip(states, p):
            self._add(self.head_name, self.reader.read_by_head(h), weight)


def _add_experts(
    found: Hessians, experts: SparseExperts, path: str, parts: list[tuple[Tensor, Tensor, Tensor]], workers: Cores
) -> None:
    """Add up what routed experts read, expert by expert: of many iterations at once, so that each has enough rows.

    Args:
        path: the name of their module.
        parts: rows (n, d), their experts and weights (n, top_k).
    """
    rows, chosen, weights = (torch.cat(tensors) for tensors in zip(*parts))
    parts.clear()
    top_k, gate_up = chosen.shape[1], experts.gate_up_proj
    up, down = (found.sums.get(f"{path}.{which}") for which in (UP, DOWN))
    chosen, weights, rows = chosen.reshape(-1), weights.reshape(-1), rows.float()
    counts = torch.bincount(chosen, minlength=len(found.rows[path]))
    found.rows[path] += counts
    found.weight[path].index_add_(0, chosen, weights)
    order = chosen.argsort(stable=True)
    pieces = zip(range(len(counts)), (order // top_k).split(counts.tolist()), weights[order].split(counts.tolist()))

    def add(some: list[tuple[int, Tensor, Tensor]]) -> None:
        for e, row, weight in some:
            x, weight = rows.index_select(0, row), weight[:, None]
            if up is not None:
                up[e].addmm_((x * weight).T, x)
            if down is not None:
                hidden = swiglu(x @ gate_up[e].T, experts.caps)
                down[e].addmm_((hidden * weight).T, hidden)

    every = [piece for piece in pieces if len(piece[1])]
    for _ in workers.each(add, [every[i :: 4 * workers.count] for i in range(4 * workers.count)]):
        pass


@torch.no_grad()
def gather(
    model: Any,
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
    Raises:
        UserError: it cannot be heard what a weight is multiplied with.
    """
    wanted, table = set(names), table_of(model)
    depth = 1 if all(table.is_once(name) for name in wanted) else None  # what is read once needs none of the loops
    stop = reader_of(model).exits and loops == "exits" and depth is None
    found = Hessians({})
    for name in wanted:
        if table.use(name) == "experts":
            path, weight = name.rpartition(".")[0], model.get_parameter(name)
            count, _, inputs = weight.shape
            found.rows[path], found.weight[path] = (torch.zeros(count, device=weight.device) for _ in range(2))
            found.sums[name] = torch.zeros(count, inputs, inputs, device=weight.device)

    def listen(piece: tuple[Tensor, bool]) -> _Listener:
        own = shared_copy(model)  # with hooks of its own
        reader = reader_of(own)
        listener = _Listener(own, reader, wanted, loops, piece[1])
        listener.progress = progress
        with listener.listening():
            every = table.head in wanted and not piece[1]
            course = reader.read(piece[0], piece[1], depth, every, listener)
        if table.head in wanted:
            listener.head(course)
        return listener

    with cores() as workers:
        pieces = _pieces(blocks, stop, workers.count)
        for start in range(0, len(pieces), workers.count):
            for listener in list(workers.each(listen, pieces[start : start + workers.count])):
                for name, sums in listener.sums.items():
                    found.sums[name] = found.sums[name] + sums if name in found.sums else sums
                for path, parts in listener.routed.items():
                    _add_experts(found, model.get_submodule(path), path, parts, workers)
    return found


def _pieces(blocks: Tensor, stop: bool, workers: int) -> list[tuple[Tensor, bool]]:
    """The text in pieces of about the same cost, each with whether its positions stop."""
    if not stop:
        return [(part, False) for part in blocks.split(split_evenly(len(blocks), workers, 4, BATCH // 2))]
    whole = max(1, round(FLOOR * len(blocks)))
    kinds = [(blocks[:whole], False), (blocks[whole:], True)]
    # A text that is run to the end costs about as much as three of which positions stop: each kind for half of them.
    split = [
        [(part, ends) for part in some.split(split_evenly(len(some), max(1, workers // 2), 4, BATCH))]
        for some, ends in kinds
        if len(some)
    ]
    return [piece for pieces in zip_longest(*split) for piece in pieces if piece is not None]
