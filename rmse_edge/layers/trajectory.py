"""A loop over whole sequences, as training and calibration read them: every state, from an empty past."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from rmse_edge.loop.contract import Tensors
from rmse_edge.loop.course import Stop, Watcher
from rmse_edge.loop.stop import add_log_survival

from .masks import causal_mask
from .policy import KvPolicy
from .stack import FULL, Kinds, Stack

# The exit gate: of the states (B, T, d) on both sides of a loop, a logit for every position, (B, T).
Gate = Callable[[Tensor, Tensor], Tensor]

# One iteration over whole sequences: iterate(state, k, active, held) -> (the next state, the rows that it keeps, by name). `active`
# (B, T) bool are the positions that have not stopped, None: all; `held` are the rows of which the others keep theirs.
Iterate = Callable[[Tensor, int, "Tensor | None", "Tensors | None"], tuple[Tensor, Tensors]]


def trajectory(
    stack: Stack,
    first: Tensor,
    fixed: Tensors,
    loops: int,
    enter: Callable[[Tensor], Tensor],
    leave: Callable[[Tensor], Tensor],
    gate: Gate | None,
    stop: Stop | None = None,
    every: bool = True,
    watcher: Watcher | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`HasTrajectory.trajectory` (rmse_edge/loop/reading.py) of a model whose loop is one stack.

    Args:
        first: (B, T, d) the state that the loop begins with.
        fixed: angles and masks, as `Stack.forward` takes them.
        enter: a state -> what the stack reads.
        leave: what the stack gives -> the next state.
        gate: None: there is none, and positions never stop by one.
    """
    names = ("held_keys", "held_values")

    def iterate(state: Tensor, k: int, active: Tensor | None, held: Tensors | None) -> tuple[Tensor, Tensors]:
        x, pair = stack(enter(state), k, fixed, None, active, held)
        return leave(x), dict(zip(names, pair))

    nothing = dict.fromkeys(names, stack.nothing_held(first)) if stack.policy == "repeat" else {}
    return trajectory_of(iterate, stack.policy, first, nothing, loops, gate, stop, every, watcher)


def trajectory_of(
    iterate: Iterate,
    policy: KvPolicy,
    first: Tensor,
    nothing: Tensors,
    loops: int,
    gate: Gate | None,
    stop: Stop | None = None,
    every: bool = True,
    watcher: Watcher | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """`trajectory` of a loop of any kind.

    Args:
        policy: of what deeper loops find of positions that stopped.
        nothing: the rows of positions that have kept none yet.
    """
    h = running = first
    active = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
    depth, log_survival = active.long() * 0, torch.zeros(first.shape[:2], device=first.device)
    held = nothing if policy == "repeat" else None
    all_run = stop is None or policy == "all"
    states: list[Tensor] = []
    gates = []
    if watcher is not None:
        watcher.begins(active)
    for k in range(loops):
        if watcher is not None:
            watcher.iterates(torch.ones_like(active) if all_run else active, log_survival, None, k)
        after, rows = iterate(running, k, *((None, None) if all_run else (active, held)))
        held = None if held is None else rows
        before, h = h, torch.where(active.unsqueeze(-1), after, h)
        logit = torch.full_like(log_survival, -torch.inf) if gate is None else gate(before, h).float()
        log_survival = add_log_survival(log_survival, logit, active)
        running = after if all_run else h
        states = [*states, h] if every else [h]
        gates.append(logit)
        depth = depth + active
        if stop is not None:
            active = active & ~stop(k, before, h, log_survival)
    if watcher is not None:
        watcher.ends()
    return states, torch.stack(gates), depth


def whole_masks(count: int, device: torch.device, kinds: Kinds = (FULL,)) -> Tensors:
    """The masks of a call of whole sequences of `count` positions with an empty past, for `Stack.forward`."""
    n_valid = torch.tensor([count], device=device)
    found: Tensors = {}
    for kind in kinds:  # without a past the mask of the slots is read by none
        mask = causal_mask(n_valid, count, kind.window)
        found |= {kind("slots_mask"): mask, kind("causal_mask"): mask}
    return found


def of_one_text(given: Mapping[str, np.ndarray]) -> Tensors:
    """What a host tells of the positions of a text, such as angles: (T, n) each -> (1, T, n)."""
    return {name: torch.from_numpy(a)[None] for name, a in given.items()}
