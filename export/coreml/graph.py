"""Questions about the graph of a saved function, answered from the file: who is read, who decides, who is named twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

from rmse_edge.runtimes.mil.file import Function, Operation, operations

MOVES = {"identity", "cast", "reshape", "squeeze", "expand_dims", "transpose"}  # give what they are given
ROUTES = {"topk", "gather_along_axis"}


def operations_of(function: Function) -> list[Operation]:
    """Those at the top of a function."""
    return [Operation(function.name, str(i), op) for i, op in enumerate(function.block.operations)]


def named_twice(function: Function) -> str | None:
    """Where a name is given again, nested blocks and inputs included; None: nowhere.

    Readers of files know values by their names; of two, one may be taken for the other.
    """
    seen = {**dict.fromkeys(function.inputs, "an input"), **dict.fromkeys(function.states, "a state")}
    for op in operations(function):
        names = [*op.outputs, *(i.name for _, block in op.blocks() for i in block.inputs)]
        # The condition and the body of a loop have inputs of the same names: they are the same values.
        for name in dict.fromkeys(names):
            if name in seen:
                return f"{op.place}: {name} is also {seen[name]}"
            seen[name] = f"made by {op.place}"
    return None


def read_names(ops: Sequence[Operation], results: Collection[str]) -> set[str]:
    """Names that lead to `results` or to a state, those that come from outside of `ops` among them."""
    alive = set(results)
    for op in reversed(ops):
        made = list(op.outputs)
        if op.kind == "while_loop":
            alive |= _read_by_loop(op, [i for i, name in enumerate(made) if name in alive])
        elif op.kind == "write_state" or alive & set(made):
            alive |= {name for names in op.inputs.values() for name in names}
            for called, block in op.blocks():
                alive |= read_names(op.inside(called, block), block.outputs)
    return alive


def _read_by_loop(op: Operation, wanted: Sequence[int]) -> set[str]:
    """Names outside a `while_loop` that its results `wanted`, by place, or its condition depend on."""
    (_, condition), (called, body) = op.blocks()
    carried = [i.name for i in body.inputs]
    read = read_names(op.inside("condition", condition), condition.outputs)
    needed = {*wanted, *(i for i, each in enumerate(condition.inputs) if each.name in read)}
    while True:
        read_in_body = read_names(op.inside(called, body), [body.outputs[i] for i in sorted(needed)])
        more = needed | {i for i, name in enumerate(carried) if name in read_in_body}
        if more == needed:
            break
        needed = more
    start = op.inputs["loop_vars"]
    inside = {*carried, *(i.name for i in condition.inputs)}
    return {start[i] for i in needed} | ((read | read_in_body) - inside)


def moved_from(ops: Sequence[Operation], name: str) -> set[str]:
    """`name` and everything it is but another form of."""
    maker = {made: op for op in ops for made in op.outputs}
    found = {name}
    while name in maker and maker[name].kind in MOVES:
        name = maker[name].inputs["x"][0]
        found.add(name)
    return found


def deciding(ops: Sequence[Operation], results: Sequence[str], decisions: Collection[str]) -> list[Operation]:
    """Operators whose results pick experts, weigh them, or lead to `decisions` and to no other result.

    Wide products that do not route are none: see export/coreml/precision.py.
    """
    uses: dict[str, list[int]] = defaultdict(list)
    for i, op in enumerate(ops):
        for names in op.inputs.values():
            for name in names:
                uses[name].append(i)
    others = {name for name in results if name not in decisions}
    kinds = [op.kind for op in ops]
    found: set[int] = set()
    routing: set[int] = set()
    for i in reversed(range(len(ops))):
        op = ops[i]
        if op.kind == "const" or others & set(op.outputs):
            continue
        users = [user for name in op.outputs for user in uses[name]]
        picked = op.kind == "softmax" and _kind_of_input(ops, kinds, op) == "gather_along_axis"
        if op.kind in ROUTES or picked or (users and all(user in routing for user in users)):
            routing.add(i)
            found.add(i)
        elif (users or set(decisions) & set(op.outputs)) and all(user in found for user in users) and not wide(op):
            found.add(i)
    return [ops[i] for i in sorted(found)]


def _kind_of_input(ops: Sequence[Operation], kinds: Sequence[str], op: Operation) -> str | None:
    name: Any = op.inputs["x"][0]
    return next((kinds[i] for i, other in enumerate(ops) if name in other.outputs), None)


def wide(op: Operation) -> bool:
    """Whether an operator is a product with more than one result per row."""
    return op.kind in ("linear", "matmul") and next(iter(op.outputs.values())).shape[-1] != 1
