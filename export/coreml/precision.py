"""Which operators of a Core ML function compute in float16, and which must not.

In float16 a router's logits are off by 1e-3, which flips experts, and a survival product rounds to nothing. So what only
*decides* stays in float32: routing, from the router's product to the experts' weights; and everything that ends in a
decision of the loop (active, survival, depth) and nowhere else. Both are found in the graph, by what the results are used
for, so that it holds for any model. Wide products are no decisions, whatever they lead to: the entropy rule evaluates the
head inside the loop, whose weights are float16 where it is read. Off the Neural Engine the means of norms stay in
float32, too: they cost a row each.

And so does what leads to nothing but a state that every call replaces, products included: a recurrence adds up what a text leaves,
roundings with it, and what a memory learns in Newton-Schulz steps is divided by lengths that float16 rounds to zero.
"""

from __future__ import annotations

from collections.abc import Collection

from coremltools.converters.mil.mil import Block, Operation, Var


class Halving:
    """The `op_selector` of an `FP16ComputePrecision`: True for operators that compute in float16.

    One object serves one conversion.
    """

    def __init__(self, decisions: Collection[int], statistics: bool, replaced: Collection[int] = ()) -> None:
        """
        Args:
            decisions: which outputs of the function, by place, only say how to go on.
            statistics: keep means and roots of norms in float32.
            replaced: which outputs are states that every call replaces.
        """
        self.decisions = frozenset(decisions)
        self.statistics = statistics
        self.replaced = frozenset(replaced)
        self._kept: dict[int, Operation] | None = None  # by id; the pass replaces operators as it goes

    def __call__(self, op: Operation) -> bool:
        if self._kept is None:
            self._kept = exclusive(op.enclosing_block, self.decisions, self.statistics, self.replaced)
        return id(op) not in self._kept


def exclusive(
    block: Block, decisions: Collection[int], statistics: bool, replaced: Collection[int] = ()
) -> dict[int, Operation]:
    """Operators of a function without nested blocks that lead to decisions and replaced states only, by id."""
    results = {id(var) for i, var in enumerate(block.outputs) if i not in decisions and i not in replaced}
    deciding = {id(var) for i, var in enumerate(block.outputs) if i in decisions or i in replaced}
    states = {id(var) for i, var in enumerate(block.outputs) if i in replaced}
    kept: dict[int, Operation] = {}
    dead: set[int] = set()
    routing: set[int] = set()  # of these, what routes and what it alone needs, and what states alone need
    for op in reversed(block.operations):
        outputs = op.outputs
        if op.op_type == "const" or any(id(var) in results for var in outputs):
            continue
        uses = [use for var in outputs for use in var.child_ops if id(use) not in dead]
        ends = any(id(var) in deciding for var in outputs) or bool(uses)
        if not ends:  # what nobody reads, which a later pass removes, decides about nothing
            dead.add(id(op))
        if _routes(op) or (statistics and op.op_type == "rsqrt"):
            kept[id(op)] = op
            routing.add(id(op))
        elif ends and all(id(use) in kept for use in uses):
            routed = all(id(use) in routing for use in uses) and all(
                id(var) in states for var in outputs if id(var) in deciding
            )
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
