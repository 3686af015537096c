"""Passes over a method in ExecuTorch's edge dialect, before XNNPACK takes its parts."""

from __future__ import annotations

from operator import getitem
from typing import cast

from executorch.exir.dialects._ops import ops
from executorch.exir.pass_base import ExportPass, PassResult
from torch.fx import GraphModule, Node

from .active import LeaveOutRows

PERMUTE = ops.edge.aten.permute_copy.default
WHERE = ops.edge.aten.where.self
WHERE_ROWS = ops.edge.rmse_edge.where_rows.default
EXPAND = ops.edge.aten.expand_copy.default
POWER, PRODUCT = ops.edge.aten.pow.Tensor_Scalar, ops.edge.aten.mul.Tensor
ATTENTION = ops.edge.rmse_edge.attention.default
SPLIT = ops.edge.aten.split_with_sizes_copy.default
VIEW = ops.edge.aten.view_copy.default
RESHAPES = (ops.edge.aten.squeeze_copy.dims, ops.edge.aten.squeeze_copy.dim, ops.edge.aten.unsqueeze_copy.default)


class DropIdleExpands(ExportPass):
    """An expand to the shape that is there already is a copy; every matmul of more than two dimensions brings two.

    Given:   y = expand(x, x.shape)
    Result:  y = x
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        found = False
        for node in list(graph_module.graph.nodes):
            if node.op == "call_function" and node.target == EXPAND and _is_idle(node):
                node.replace_all_uses_with(node.args[0])
                graph_module.graph.erase_node(node)
                found = True
        graph_module.recompile()
        return PassResult(graph_module, found)


class ReshapesAsViews(ExportPass):
    """Squeezes are copies at run time, as are permutations that only move axes of size 1; views of static shapes are nothing
    at all. Other shapes stay as they are.

    Given:   y = unsqueeze(x, 0)
    Result:  y = view(x, y.shape)
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        found = False
        for node in graph_module.graph.nodes:
            reshapes = node.op == "call_function" and (node.target in RESHAPES or _keeps_order(node))
            if reshapes and _is_static(node):
                node.target, node.args = VIEW, (node.args[0], [*_shape(node)])
                found = True
        graph_module.recompile()
        return PassResult(graph_module, found)


class WholeRows(ExportPass):
    """A condition for whole rows is asked once for each of them; the portable kernel looks at every number.

    Given:   y = where(condition (..., 1), a (..., n), b (..., n))
    Result:  y = rmse_edge::where_rows(condition, a, b)
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        found = False
        for node in graph_module.graph.nodes:
            if node.op == "call_function" and node.target == WHERE and _is_by_rows(node):
                node.target, found = WHERE_ROWS, True
        graph_module.recompile()
        return PassResult(graph_module, found)


class SquaresAsProducts(ExportPass):
    """The portable kernel asks the C library for every power.

    Given:   y = pow(x, 2)
    Result:  y = mul(x, x)
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        found = False
        for node in graph_module.graph.nodes:
            if node.op == "call_function" and node.target == POWER and node.args[1] == 2 and _is_float(node):
                node.target, node.args, found = PRODUCT, (node.args[0], node.args[0]), True
        graph_module.recompile()
        return PassResult(graph_module, found)


class LayersOfOneCache(ExportPass):
    """The keys and values of all layers lie one behind the other in what a host keeps. Attention reads its own where they
    are: to cut the cache apart would copy all of it in every loop.

    Given:   attention(..., past_keys=split(keys, G, 1)[i], past_values=split(values, G, 1)[i], ..., first=0)
    Result:  attention(..., past_keys=keys, past_values=values, ..., first=i * G)
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        graph, found = graph_module.graph, False
        for node in graph.nodes:
            if node.target != ATTENTION or not all(isinstance(side, Node) for side in node.args[5:7]):
                continue
            keys, values = (_part_of(side) for side in node.args[5:7])
            if keys is None or values is None or keys[1] != values[1] or node.args[11] != 0:
                continue
            node.args = (*node.args[:5], keys[0], values[0], *node.args[7:11], keys[1])
            found = True
        if found:
            graph.eliminate_dead_code()
            graph_module.recompile()
        return PassResult(graph_module, found)


def _part_of(node: Node) -> tuple[Node, int] | None:
    """Of a part of a tensor (1, G, S, hd) that was split along its groups: the tensor, and the part's first group."""
    if node.target is not getitem:
        return None
    split, place = cast(tuple[Node, int], node.args)
    if split.target != SPLIT:
        return None
    whole, sizes, axis = cast(tuple[Node, list[int], int], (*split.args, 0)[:3])
    return (whole, sum(sizes[:place])) if axis == 1 and _shape(whole)[0] == 1 else None


def _is_by_rows(node) -> bool:
    """Whether the condition has the leading axes of both values, which are alike, and 1 for each of the others."""
    if not all(isinstance(arg, Node) and _is_static(arg) for arg in node.args):
        return False
    condition, a, b = (_shape(arg) for arg in node.args)
    types = {arg.meta["val"].dtype for arg in node.args[1:]}
    if a != b or a != _shape(node) or len(condition) != len(a) or len(types) != 1:
        return False
    leading = next((i for i, (c, n) in enumerate(zip(condition, a)) if c != n), len(a))
    return leading < len(a) and all(c == 1 for c in condition[leading:])


def _shape(node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _keeps_order(node) -> bool:
    """Whether it is a permutation that leaves the axes longer than 1 in their order."""
    if node.target != PERMUTE:
        return False
    sizes = _shape(node.args[0])
    longer = [axis % len(sizes) for axis in node.args[1] if sizes[axis] != 1]
    return longer == sorted(longer)


def _is_static(node) -> bool:
    return all(isinstance(d, int) for d in _shape(node))


def _is_float(node) -> bool:
    return node.meta["val"].is_floating_point() and node.args[0].meta["val"].dtype == node.meta["val"].dtype


def _is_idle(node) -> bool:
    """Whether it has its argument's shape. Symbols are compared by name: to ask whether two are equal would make them so."""
    return [str(d) for d in _shape(node)] == [str(d) for d in _shape(node.args[0])]


EDGE_PASSES = [
    DropIdleExpands(),
    ReshapesAsViews(),
    WholeRows(),
    SquaresAsProducts(),
    LayersOfOneCache(),
    LeaveOutRows(),
]
