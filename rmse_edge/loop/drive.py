"""The loop over a model's `begin` and `step`: eagerly with a Python `while`, which stops for real, or traced with
`torch.while_loop`, which the graphs of ONNX are made of.

Where the host owns the loop, around an exported `step`, it is that of rmse_edge/loop/steps.py; Core ML's graph and the C++
runner follow the same rule in their own languages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .contract import LoopModel, LoopSpec, Tensors
from .plan import PLAN, drive_plan, plan_of, times

WhileLoop = Callable[[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]], tuple[Tensor, ...]]


def python_while(
    cond: Callable[..., Tensor], body: Callable[..., tuple[Tensor, ...]], carry: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The eager counterpart of `torch.while_loop`: it physically stops."""
    while bool(cond(*carry)):
        carry = body(*carry)
    return carry


def run_loop(
    model: LoopModel, spec: LoopSpec, tensors: Tensors, dials: Tensors, while_loop: WhileLoop = python_while
) -> Tensors:
    """Apply the block until nothing is active or `max_loops` is reached.

    Args:
        tensors: prelude's results, context and the state that the loop reads, by name, for a batch of any size.
        dials: the scalars of `spec.dials`.
    Returns:
        h, depth, iterations (0-d int64: the deepest position's depth, the real cost of the call) and every emit
        stacked to (K, ...), undefined from row `iterations` on.
    """
    if spec.layers:
        return _run_plan(model, spec, tensors, dials)
    first, invariants = model.begin(tensors)
    fixed = tensors | invariants
    names = [t.name for t in spec.carried]
    emits = [t.name for t in spec.emits]
    first = first | {"depth": torch.zeros_like(first["active"], dtype=torch.int64)}
    if torch.compiler.is_exporting():
        first = _apart(first, fixed)
    h = first["h"]
    stacks = empty_stacks(spec, h).values()
    start = (torch.zeros((), dtype=torch.int64, device=h.device), *(first[n] for n in names), *stacks)

    def cond(k: Tensor, *values: Tensor) -> Tensor:
        return (k < dials["max_loops"]) & values[names.index("active")].any()

    def body(k: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        carry = dict(zip(names, values))
        past = {t.name: tensors[t.name].index_select(0, k.reshape(1)).squeeze(0) for t in spec.rows}
        new, emitted = model.step(k, carry, past, fixed, dials)
        new["depth"] = depth_after(carry, new)
        stacked = [
            stack.index_copy(0, k.reshape(1), emitted[name].unsqueeze(0))
            for name, stack in zip(emits, values[len(names) :])
        ]
        return (k + 1, *(new[n] for n in names), *stacked)

    iterations, *values = while_loop(cond, body, start)
    result = dict(zip(names + emits, values))
    return {name: result[name] for name in ("h", "depth", *emits)} | {"iterations": iterations}


def _run_plan(planned: LoopModel, spec: LoopSpec, tensors: Tensors, dials: Tensors) -> Tensors:
    """`run_loop` of a planned loop, of one text."""
    model: Any = planned  # a `PlannedTextModel`
    first, invariants = model.begin(tensors)
    fixed = tensors | invariants
    first = first | {"depth": torch.zeros_like(first["active"], dtype=torch.int64)}
    rows = {t.name: tensors[t.name] for t in spec.rows}

    def layer(index: int, given: Tensors, k: int) -> Tensors:
        carry = {t.name: given[t.name] for t in spec.carried}
        past = {name: given[name] for name in rows}
        new, emitted = model.layer(index, torch.tensor(k, device=given["h"].device), carry, past, fixed, dials)
        return {f"next_{name}": t for name, t in (new | {"depth": depth_after(carry, new)}).items()} | emitted

    def decide(index: int, h: Tensor) -> int:
        return times(model.decide(tensors | {"h": h} | dials)["chances"][0, index])

    stacks = empty_stacks(spec, first["h"])
    begun = None if int(tensors["position"][0]) == 0 else plan_of(tensors[PLAN])
    carry, k = drive_plan(layer, decide, first, rows, stacks, spec.layers, int(dials["max_loops"]), begun)
    iterations = torch.tensor(k, device=carry["h"].device)
    return {"h": carry["h"], "depth": carry["depth"], "iterations": iterations} | stacks


def empty_stacks(spec: LoopSpec, h: Tensor) -> Tensors:
    """Room for every emit of all iterations, (K, ...), by name, for the batch of h. Floating point emits have the type of h: the
    model may have been cast since its spec was written.
    """
    batch = 1 if spec.h.batch_axis is None else h.shape[spec.h.batch_axis]
    return {
        t.name: h.new_zeros(
            (spec.max_loops, *t.of_batch(batch)), dtype=h.dtype if t.dtype.is_floating_point else t.dtype
        )
        for t in spec.emits
    }


def depth_after(carry: Tensors, new: Tensors) -> Tensor:
    """The depth after an iteration: one more of what was active, unless the model counts for itself."""
    return new["depth"] if "depth" in new else carry["depth"] + carry["active"].to(torch.int64)


def _apart(first: Tensors, fixed: Tensors) -> Tensors:
    """The first carry with a tensor of its own for each: a traced loop may not carry one twice, or one that it reads."""
    seen = {id(t) for t in fixed.values()}
    apart = {}
    for name, t in first.items():
        apart[name] = t.clone() if id(t) in seen else t
        seen.add(id(t))
    return apart
