"""Passes over a method in ExecuTorch's edge dialect, before XNNPACK takes its parts."""

from __future__ import annotations

from executorch.exir.dialects._ops import ops
from executorch.exir.pass_base import ExportPass, PassResult
from torch.fx import GraphModule

PERMUTE = ops.edge.aten.permute_copy.default
EXPAND = ops.edge.aten.expand_copy.default
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


def _shape(node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _keeps_order(node) -> bool:
    """Whether it is a permutation that leaves the axes longer than 1 in their order."""
    if node.target != PERMUTE:
        return False
    sizes = tuple(node.args[0].meta["val"].shape)
    longer = [axis % len(sizes) for axis in node.args[1] if sizes[axis] != 1]
    return longer == sorted(longer)


def _is_static(node) -> bool:
    return all(isinstance(d, int) for d in _shape(node))


def _is_idle(node) -> bool:
    """Whether it has its argument's shape. Symbols are compared by name: to ask whether two are equal would make them so."""
    return [str(d) for d in _shape(node)] == [str(d) for d in _shape(node.args[0])]


EDGE_PASSES = [DropIdleExpands(), ReshapesAsViews()]
