"""Experts that ONNX Runtime's `MoE` has no form for, because their gates and ups are soft-capped: a loop over those chosen.

`ExpertLoop` stands in the graph until it is known whether the weights are integers. It becomes an ONNX `Loop` of one iteration
for each expert that some row has chosen. An iteration takes that expert's weights out of the stack, which lies in outer scope,
and computes the rows that chose it. So nothing is computed of other experts, and of the stack no copy is made but of one
expert at a time; what is copied is read from memory twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .ops import EXPERT_LOOP
from .passes import forget_own_operators, graphs

# Of `ExpertLoop`: how many iterations; (N, d); (N, k) experts and their weights; the experts that some row has chosen; zeros
# like x; the stacks (E, 2f, d) and (E, d, f).
INPUTS = ("count", "x", "chosen", "weights", "which", "start", "gate_up", "down")
UP, DOWN = INPUTS.index("gate_up"), INPUTS.index("down")

# A product with one expert's weights: (rows, the number of the expert, the result, in the body) -> its nodes.
Product = Callable[[str, str, str], list[NodeProto]]


def expert_loop(node: NodeProto, up: Product, down: Product) -> NodeProto:
    """Given: y = ExpertLoop(count, x, chosen, weights, which, start, gate_up, down). Result: y = Loop(count, , start).

    Args:
        up, down: the products with gate_up and down, as their weights are stored.
    """
    given = dict(zip(INPUTS, node.input, strict=True))
    caps = {a.name: a.f for a in node.attribute}
    prefix = node.output[0]
    nodes: list[NodeProto] = []

    def do(kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; returns the name of its result."""
        result = f"{prefix}_{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [result], **attributes))
        return result

    def constant(values: object, dtype: type = np.float32) -> str:
        return do("Constant", value=numpy_helper.from_array(np.array(values, dtype)))

    def capped(x: str, cap: float) -> str:
        bound = constant(cap)
        return do("Mul", do("Tanh", do("Div", x, bound)), bound)

    turn, going, added, one = (f"{prefix}_{name}" for name in ("turn", "going", "added", "axis"))
    nodes.append(helper.make_node("Constant", [], [one], value=numpy_helper.from_array(np.array([1], np.int64))))
    expert = do("Gather", given["which"], turn, axis=0)
    mine = do("Cast", do("Equal", given["chosen"], expert), to=TensorProto.FLOAT)  # (N, k)
    share = do("ReduceSum", do("Mul", mine, given["weights"]), one, keepdims=1)  # (N, 1)
    rows = do("Transpose", do("NonZero", do("ReduceSum", mine, one, keepdims=0)), perm=[1, 0])  # (n, 1)
    hidden, result = f"{prefix}_hidden", f"{prefix}_result"
    nodes += up(do("GatherND", given["x"], rows), expert, hidden)  # (n, 2f), gate and up by turns
    pairs = do("Reshape", hidden, constant([0, -1, 2], np.int64))
    gate, raised = (do("Gather", pairs, constant(i, np.int64), axis=2) for i in (0, 1))
    computed = do("Mul", do("Mul", capped(gate, caps["gate_cap"]), do("Sigmoid", gate)), capped(raised, caps["up_cap"]))
    nodes += down(do("Mul", computed, do("GatherND", share, rows)), expert, result)
    total = do("ScatterND", added, rows, result, reduction="add")
    kept = do("Identity", going)
    body = helper.make_graph(
        nodes,
        f"{prefix}_expert",
        [
            helper.make_tensor_value_info(turn, TensorProto.INT64, []),
            helper.make_tensor_value_info(going, TensorProto.BOOL, []),
            helper.make_tensor_value_info(added, TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info(kept, TensorProto.BOOL, []),
            helper.make_tensor_value_info(total, TensorProto.FLOAT, None),
        ],
    )
    return helper.make_node("Loop", [given["count"], "", given["start"]], node.output, node.name, body=body)


def of_floats(stack: str) -> Product:
    """The product with one expert of a stack of floats (E, N, K)."""

    def product(rows: str, expert: str, result: str) -> list[NodeProto]:
        weight = f"{result}_weight"
        return [
            helper.make_node("Gather", [stack, expert], [weight], axis=0),
            helper.make_node("Gemm", [rows, weight], [result], transB=1),
        ]

    return product


def expand_expert_loops(model: ModelProto) -> None:
    """Those whose weights are floats, in the graph and in its bodies.

    Given:   y = ExpertLoop(..., gate_up, down)
    Result:  y = Loop, whose body takes one expert's weights and multiplies
    """
    for graph in [*graphs(model.graph)]:
        for node in graph.node:
            if node.op_type == EXPERT_LOOP:
                node.CopyFrom(expert_loop(node, of_floats(node.input[UP]), of_floats(node.input[DOWN])))
    forget_own_operators(model)
