"""The loop as a host owns it, around an exported `step`; on arrays of any kind, so it needs neither NumPy nor PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Array = TypeVar("Array", bound=Any)


def drive_steps(
    step: Callable[[dict[str, Array], int], Mapping[str, Array]],
    first: Mapping[str, Array],
    rows: Mapping[str, Array],
    stacks: Mapping[str, Array],
    max_loops: int,
) -> tuple[dict[str, Array], int]:
    """The loop as a host owns it: an exported `step`, on arrays, until nothing is active.

    Args:
        step: one iteration: the carry and row k of everything in `rows`, and k from 0 -> next_NAME of every carried
            tensor, what the iteration emits, and any_active.
        first: the first carry, `depth` included.
        rows: of which iteration k is given row k, (K, ...) each.
        stacks: (K, ...) each; row k becomes what iteration k emits.
        max_loops: the dial.
    Returns:
        The last carry, and the number of iterations.
    """
    carry, k = dict(first), 0
    running = bool(carry["active"].any())
    while running and k < max_loops:
        out = step(carry | {name: row[k] for name, row in rows.items()}, k)
        for name, stack in stacks.items():
            stack[k] = out[name]
        carry = {name: out[f"next_{name}"] for name in carry}
        running = bool(out["any_active"])
        k += 1
    return carry, k


def carried_and_emitted(gives: Iterable[str]) -> tuple[list[str], list[str]]:
    """What `step` gives, by name: the carried tensors, without their next_, and what it emits."""
    names = list(gives)
    carried = [name.removeprefix("next_") for name in names if name.startswith("next_")]
    return carried, [name for name in names if not name.startswith("next_") and name != "any_active"]
