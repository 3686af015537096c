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


def times(found: Any) -> int:
    """How often a layer is run by its chances, three numbers of any kind."""
    given = [float(x) for x in found]
    return given.index(max(given))
