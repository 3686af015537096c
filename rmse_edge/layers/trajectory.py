"""A looped stack over whole sequences, as training and calibration read them: every state, from an empty past."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from rmse_edge.loop.contract import Tensors
from rmse_edge.loop.course import Stop, Watcher
from rmse_edge.loop.stop import add_log_survival

from .masks import causal_mask
from .stack import FULL, Kinds, Stack

# The exit gate: of the states (B, T, d) on both sides of a loop, a logit for every position, (B, T).
Gate = Callable[[Tensor, Tensor], Tensor]


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
    h = running = first
    active = torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
    depth, log_survival = active.long() * 0, torch.zeros(first.shape[:2], device=first.device)
    held = dict.fromkeys(("held_keys", "held_values"), stack.nothing_held(h)) if stack.policy == "repeat" else {}
    states: list[Tensor] = []
    gates = []
    if watcher is not None:
        watcher.begins(active)
    for k in range(loops):
        all_run = stop is None or stack.policy == "all"
        if watcher is not None:
            watcher.iterates(torch.ones_like(active) if all_run else active, log_survival, None, k)
        kept = (None, None) if all_run else (active, held or None)
        x, (keys, values) = stack(enter(running), k, fixed, None, *kept)
        after = leave(x)
        held = {"held_keys": keys, "held_values": values} if held else held
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
