"""Which operators of a Core ML function compute in float16, and which must not.

In float16 a router's logits are off by 1e-3, which flips experts, and a survival product rounds to nothing. So what only
*decides* stays in float32: routing, from the router's product to the experts' weights; and everything that ends in a
decision of the loop (active, survival, depth) and nowhere else. Both are found in the graph, by what the results are used
for, so that it holds for any model. Wide products are no decisions, whatever they lead to: the entropy rule evaluates the
head inside the loop, whose weights are float16 where it is read. Off the Neural Engine the means of norms stay in
float32, too: they cost a row each.
"""

from __future__ import annotations

from collections.abc import Collection

from coremltools.converters.mil.mil import Block, Operation, Var


class Halving:
    """The `op_selector` of an `FP16ComputePrecision`: True for operators that compute in float16.

    One object serves one conversion.
    """

    def __init__(self, decisions: Collection[int], statistics: bool) -> None:
        """
        Args:
            decisions: which outputs of the function, by place, only say how to go on.
            statistics: keep means and roots of norms in float32.
        """
        self.decisions = frozenset(decisions)
        self.statistics = statistics
        self._kept: dict[int, Operation] | None = None  # by id; the pass replaces operators as it goes

    def __call__(self, op: Operation) -> bool:
        if self._kept is None:
            self._kept = exclusive(op.enclosing_block, self.decisions, self.statistics)
        return id(op) not in self._kept


def exclusive(block: Block, decisions: Collection[int], statistics: bool) -> dict[int, Operation]:
    """Operators of a function without nested blocks that lead to decisions only, by id."""
    results = {id(var) for i, var in enumerate(block.outputs) if i not in decisions}
    deciding = {id(var) for i, var in enumerate(block.outputs) if i in decisions}
    kept: dict[int, Operation] = {}
    routing: set[int] = set()  # of these, what routes and what it alone needs
    for op in reversed(block.operations):
        outputs = op.outputs
        if op.op_type == "const" or any(id(var) in results for var in outputs):
            continue
        uses = [use for var in outputs for use in var.child_ops]
        ends = any(id(var) in deciding for var in outputs) or bool(uses)
        if _routes(op) or (statistics and op.op_type == "rsqrt"):
            kept[id(op)] = op
            routing.add(id(op))
        elif ends and all(id(use) in kept for use in uses):
            routed = bool(uses) and all(id(use) in routing for use in uses)
            if routed or not _wide(op):
                kept[id(op)] = op
                routing |= {id(op)} if routed else set()
    return kept


def _wide(op: Operation) -> bool:
    """Whether an operator is a product with more than one result per row."""
    return op.op_type in ("linear", "matmul") and op.outputs[0].shape[-1] != 1


def _routes(op: Operation) -> bool:
    """Whether an operator picks experts, or weighs the picked ones."""
    if op.op_type in ("topk", "gather_along_axis"):
        return True
    return op.op_type == "softmax" and isinstance(op.x, Var) and op.x.op is not None and _picked(op.x.op)


def _picked(op: Operation) -> bool:
    return op.op_type == "gather_along_axis"
