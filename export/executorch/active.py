"""Rows that are computed for nothing: found in a method's graph, and left out.

A position that stopped goes on through the graph until `where(active, new, old)` drops what was computed of it. In calls of
many rows that is most of the time where few of them are left; the same holds of `commit`, which keeps what loops gave that
ran. Here every value is followed to those who read it. Where all of them drop the same rows, the operators that know
what is active are told so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from executorch.exir.dialects._ops import ops
from executorch.exir.pass_base import ExportPass, PassResult
from torch.fx import GraphModule, Node

from . import operators  # noqa: F401  (its operators are known from then on)

ATEN, OWN = ops.edge.aten, ops.edge.rmse_edge
VIEW, NOT = ATEN.view_copy.default, ATEN.logical_not.default
WHERE = (ATEN.where.self, OWN.where_rows.default)
AND = (ATEN.bitwise_and.Tensor, ATEN.logical_and.default)
EXPERTS = (OWN.quantized_experts.default, OWN.sparse_experts.default)
# Every element of the result is made of those of the arguments that lie where it does.
ELEMENTWISE: set[Any] = {
    getattr(getattr(ATEN, name), overload)
    for name, overload in [
        *(
            (name, "Tensor")
            for name in ("add", "sub", "mul", "div", "le", "lt", "ge", "gt", "bitwise_and", "bitwise_or")
        ),
        *((name, "Scalar") for name in ("add", "sub", "mul", "div", "le", "lt", "ge", "gt")),
        *(
            (name, "default")
            for name in ("sigmoid", "exp", "log1p", "neg", "abs", "rsqrt", "sqrt", "tanh", "relu", "silu")
        ),
        *((name, "default") for name in ("clamp", "bitwise_not", "logical_not", "logical_and", "maximum", "minimum")),
        ("pow", "Tensor_Scalar"),
    ]
    if hasattr(getattr(ATEN, name, None), overload)
} | {
    ops.edge.dim_order_ops._clone_dim_order.default,
    ops.edge.dim_order_ops._to_dim_order_copy.default,
    OWN.gated.default,
}
# A row (n,) of the result is made of the same row of the first argument.
BY_ROWS = {OWN.rms_norm.default, OWN.quantized_linear.default, OWN.float_linear.default, OWN.swiglu.default}
REDUCTIONS = {ATEN.sum.dim_IntList, ATEN.mean.dim, ATEN.amax.default}
TOLD: dict[Any, int] = {
    OWN.rms_norm.default: 3,
    OWN.quantized_linear.default: 4,
    OWN.float_linear.default: 3,
    OWN.attention.default: 10,
}


@dataclass(frozen=True)
class Rows:
    """Which of a value's rows are read: those where a flag is `wanted`. Rows lie along `axis`, of which there are as many."""

    flags: Node
    wanted: bool
    axis: int


Reads = Rows | None  # None: all of it, or nothing that is known here


class LeaveOutRows(ExportPass):
    """
    Given:   y = where(active (1, C, 1), rms_norm(linear(x, ...), ...), z)
    Result:  the same, with `active` given to both operators
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        graph = graph_module.graph
        found = rows_read(list(graph.nodes))
        told = [(node, found[node]) for node in graph.nodes if node.target in TOLD and _fits(node, found.get(node))]
        early = {node for _, rows in told if rows is not None for node in _behind(rows.flags)}
        told = [(node, rows) for node, rows in told if node not in early]
        first = next((node for node in graph.nodes if node.op == "call_function" and node not in early), None)
        if not told or first is None:
            return PassResult(graph_module, False)
        for node in [node for node in graph.nodes if node in early and node.op == "call_function"]:
            first.prepend(node)
        made: dict[tuple[Node, bool], Node] = {}
        for node, rows in told:
            assert rows is not None
            if (key := (rows.flags, rows.wanted)) not in made:
                with graph.inserting_before(first):
                    made[key] = _flags(graph_module, rows)
            place = TOLD[node.target]
            node.args = (*node.args[:place], made[key], *node.args[place + 1 :])
        graph_module.recompile()
        return PassResult(graph_module, True)


def rows_read(nodes: list[Node]) -> dict[Node, Reads]:
    """Of every value of a graph, which rows its readers read."""
    found: dict[Node, Reads] = {}
    for node in reversed(nodes):
        reads = {_read_by(user, node, found.get(user)) for user in node.users}
        found[node] = reads.pop() if len(reads) == 1 else None
    return found


def _read_by(user: Node, value: Node, of_user: Reads) -> Reads:
    """What `user` reads of `value`, if of its own result `of_user` is read."""
    every = {_read_as(user, i, of_user) for i, arg in enumerate(_args(user)) if arg is value}
    direct = sum(arg is value for arg in _args(user))
    listed = [arg for arg in _args(user) if isinstance(arg, (list, tuple)) and value in arg]
    if listed:
        if user.target != ATEN.cat.default or direct:
            return None
        axis = (_args(user)[1] if len(_args(user)) > 1 else 0) % len(_shape(user))
        return of_user if of_user is not None and of_user.axis != axis else None
    if value in user.kwargs.values():
        return None
    return every.pop() if len(every) == 1 else None


def _read_as(user: Node, place: int, of_user: Reads) -> Reads:
    """The same of the argument at one place."""
    target = user.target
    if target in WHERE and place > 0:
        condition = _args(user)[0]
        flags, axis = _flags_of(condition), _axis_of_flags(condition, user)
        if of_user is None and flags is not None and axis is not None:
            return _at(Rows(flags, place == 1, axis), user, _args(user)[place])
        return _at(of_user, user, _args(user)[place])
    if target in AND and of_user is None:
        other = _args(user)[1 - place]
        flags, axis = _flags_of(other), _axis_of_flags(other, user)
        return None if flags is None or axis is None else _at(Rows(flags, True, axis), user, _args(user)[place])
    if target in EXPERTS and place < 3:
        flags = _flags_of(_args(user)[3])
        return None if flags is None else Rows(flags, True, 0)
    if of_user is None:
        return None
    if target in ELEMENTWISE or target in WHERE:
        return _at(of_user, user, _args(user)[place])
    last = len(_shape(user)) - 1
    if place > 0:
        return None
    if target in BY_ROWS or target == OWN.rotary.default:
        return of_user if of_user.axis < last else None
    if target == OWN.attention.default:
        return of_user if of_user.axis == 2 and _shape(user)[0] == 1 else None
    if target == VIEW:
        return _through_view(of_user, _shape(user), _shape(_args(user)[0]))
    if target == ATEN.permute_copy.default:
        return Rows(of_user.flags, of_user.wanted, _args(user)[1][of_user.axis] % (last + 1))
    if target == ATEN.expand_copy.default:
        return _at(of_user, user, _args(user)[0])
    if target == ATEN.slice_copy.Tensor:
        axis = (_args(user)[1] if len(_args(user)) > 1 else 0) % (last + 1)
        return of_user if axis != of_user.axis else None
    if target in REDUCTIONS:
        rank = len(_shape(_args(user)[0]))
        reduced = [axis % rank for axis in _args(user)[1]]
        return of_user if all(axis > of_user.axis for axis in reduced) else None
    return None


def _at(rows: Reads, user: Node, argument: object) -> Reads:
    """The rows of an argument that is broadcast to the result."""
    if rows is None or not isinstance(argument, Node):
        return None
    shape, wide = _shape(argument), _shape(user)
    axis = rows.axis - (len(wide) - len(shape))
    if axis < 0 or shape[axis] != wide[rows.axis]:
        return None
    return Rows(rows.flags, rows.wanted, axis)


def _through_view(rows: Rows, shape: tuple[int, ...], before: tuple[int, ...]) -> Reads:
    """The rows of what a view with rows of its own was made of."""
    outer, count = math.prod(shape[: rows.axis]), shape[rows.axis]
    for axis, size in enumerate(before):
        if size == count and math.prod(before[:axis]) == outer:
            return Rows(rows.flags, rows.wanted, axis)
    return None


def _flags_of(condition: object) -> Node | None:
    """The tensor of one flag for each row that a condition is a view of."""
    while isinstance(condition, Node) and condition.target == VIEW:
        condition = _args(condition)[0]
    return condition if isinstance(condition, Node) and _static(condition) else None


def _axis_of_flags(condition: object, user: Node) -> int | None:
    """Along which axis of the result its flags lie; None: along several, or there is one."""
    if not isinstance(condition, Node) or not _static(condition) or not _static(user):
        return None
    shape = _shape(condition)
    longer = [axis for axis, size in enumerate(shape) if size != 1]
    return longer[0] + len(_shape(user)) - len(shape) if len(longer) == 1 else None


def _fits(node: Node, rows: Reads) -> bool:
    """Whether the operator can be told: its rows are those of the flags, one or several side by side for each."""
    if rows is None or not _static(node) or _args(node)[TOLD[node.target]] is not None:
        return False
    shape, count = _shape(node), math.prod(_shape(rows.flags))
    outer = math.prod(shape[: rows.axis])
    if node.target == OWN.attention.default:
        outer = 1 if rows.axis == 2 and shape[0] == 1 and _shape(_args(node)[3])[0] == 1 else 0
    return outer == 1 and shape[rows.axis] == count > 1


def _behind(flags: Node) -> set[Node]:
    """What flags are made of, themselves included."""
    found, left = set(), [flags]
    while left:
        if (node := left.pop()) not in found:
            found.add(node)
            left.extend(node.all_input_nodes)
    return found


def _flags(graph_module: GraphModule, rows: Rows) -> Node:
    """A node (C,) bool: which rows are read."""
    graph, value = graph_module.graph, rows.flags.meta["val"]
    flags = rows.flags
    if not rows.wanted:
        flags = graph.call_function(NOT, (flags,))
        flags.meta["val"] = value
    shape = [math.prod(_shape(flags))]
    if [*_shape(flags)] != shape:
        flags = graph.call_function(VIEW, (flags, shape))
        flags.meta["val"] = value.reshape(shape)
    return flags


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _static(node: Node) -> bool:
    value = node.meta.get("val")
    return value is not None and hasattr(value, "shape") and all(isinstance(d, int) for d in value.shape)


def _args(node: Node) -> tuple[Any, ...]:
    """Those of operators, whose places and types the operator says."""
    return node.args
