"""Planned loops: an iteration is one execution of one of several layers, and a plan says of which.

Where all iterations of a loop are alike, `step` is one graph. Where they are those of layers with weights of their own, a model
has a `layer` for each (`LoopSpec.layers`), and a text has a plan: the layers that it runs, in order. Iteration k is the k-th
execution: it reads row k of everything that is kept per loop, so that every execution has slots of its own, and a layer
that is skipped has none. The host executes the plan, on every engine by `drive_plan`.

A plan is made when a text begins. Before each layer `decide` says of the state there how often it is run, from what the first
positions of the text have become by then, `PROMPT` of them; a state of the model (`PLAN`) holds the plan from then on.

Source: Dr.LLM, arXiv 2510.12773, and `models/modeling_llama.py` of parameterlab/dr-llm 14e8837, whose routers decide so. There a
model decides again for every token that it writes, from that token alone, a batch runs what its first row decides, and both
executions of a repeated layer share one cache, which holds two rows of each position then. A text would depend on how it
is cut into calls; here it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Array = TypeVar("Array", bound=Any)

MOST_EXECUTIONS = 2  # of a layer: it is skipped, run, or repeated
PLAN = "past_plan"  # the state, (K,) int64: 1 + the layer of every execution, 0 behind the last
ROUTERS = -0.5  # of the dial `route`: what routers say
EACH_ONCE = 0.5  # no router is asked: every layer is run once
EACH_TWICE = 1.0


def drive_plan(
    layer: Callable[[int, dict[str, Array], int], Mapping[str, Array]],
    decide: Callable[[int, Array], int],
    first: Mapping[str, Array],
    rows: Mapping[str, Array],
    stacks: Mapping[str, Array],
    layers: int,
    most: int,
    plan: Sequence[int] | None,
) -> tuple[dict[str, Array], int]:
    """A planned loop as its host owns it, on arrays of any kind.

    Args:
        layer: one execution: (which layer, the carry and row k of everything in `rows`, k from 0) -> next_NAME of every
            carried tensor, and what the iteration emits. Its arrays must stay what they are when it is called again.
        decide: (which layer, the state before it) -> how often it is run.
        first: the first carry, `depth` included.
        rows: of which iteration k is given row k, (K, ...) each.
        stacks: (K, ...) each; row k becomes what iteration k emits.
        layers: how many there are.
        most: executions of a text that begins.
        plan: the layers of a text that has begun, in order; None: it begins here.
    Returns:
        The last carry, and the number of executions.
    """
    carry, k = dict(first), 0

    def run(index: int) -> None:
        nonlocal carry, k
        out = layer(index, carry | {name: row[k] for name, row in rows.items()}, k)
        for name, stack in stacks.items():
            stack[k] = out[name]
        carry = {name: out[f"next_{name}"] for name in carry}
        k += 1

    if plan is not None:
        for index in plan:
            run(index)
        return carry, k
    for index in range(layers):
        for _ in range(min(decide(index, carry["h"]) if k < most else 0, most - k)):
            run(index)
    return carry, k


def plan_of(kept: Iterable[Any]) -> list[int]:
    """The layers of a plan as the state `PLAN` holds it."""
    return [int(entry) - 1 for entry in kept if int(entry) > 0]


def windows(h: Tensor, prompt: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Means of equal windows of the first positions: what a router reads.

    As many windows as there are positions, `most` at most, of as many positions each; those that are left over, fewer than
    there are windows, are in none.

    Args:
        h: states (B, C, d).
        prompt: (B or 1,) int64, how many of the rows are read, at least 1.
    Returns:
        ((B, W, d) means, zeros where there is no such window; (B or 1, W) the share of each in their mean: 1 / windows or 0).
    """
    count = prompt.clamp_max(most)  # of windows
    size = torch.div(prompt, count, rounding_mode="floor")
    window = torch.arange(most, device=h.device)  # (W,)
    row = torch.arange(h.shape[1], device=h.device)  # (C,)
    start = (window * size[:, None]).unsqueeze(-1)  # (B, W, 1)
    there = (window < count[:, None]).unsqueeze(-1)
    inside = (row >= start) & (row < start + size[:, None, None]) & there  # (B, W, C)
    means = (inside.to(h.dtype) @ h) / size[:, None, None].to(h.dtype)
    return means, there.squeeze(-1).to(h.dtype) / count[:, None].to(h.dtype)


def chances(logits: Tensor, route: Tensor) -> Tensor:
    """What a router says, moved by the dial `route`: chances (B, 3) of skipping, running and repeating a layer.

    Between -1 and -0.5 they lie between skipping and the router's own, up to 0.5 between these and running once, from there
    between running once and repeating. The likeliest is done, the lowest where two are alike.

    Args:
        logits: (B, 3) of a router.
        route: scalar.
    """
    own = torch.softmax(logits, -1)
    ends = torch.eye(3, dtype=own.dtype, device=own.device)
    low, middle = (route + 1) / 0.5, route + 0.5
    towards_skip = (1 - low) * ends[0] + low * own
    towards_once = (1 - middle) * own + middle * ends[1]
    high = (route - 0.5) / 0.5
    towards_twice = (1 - high) * ends[1] + high * ends[2]
    found = torch.where(route <= EACH_ONCE, towards_once, towards_twice.expand_as(own))
    return torch.where(route <= ROUTERS, towards_skip, found)


def times(found: Any) -> int:
    """How often a layer is run by its chances, three numbers of any kind."""
    given = [float(x) for x in found]
    return given.index(max(given))


def lead(found: Tensor) -> Tensor:
    """How far chances (B, 3) are from another decision: (B,)."""
    top = found.topk(2, -1).values
    return top[..., 0] - top[..., 1]
