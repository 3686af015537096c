"""The contract between a looped model and everything that runs or exports it.

A looped model is five methods around one block that is applied until no position is active:

    prelude  what is computed once per call               tokens -> x0
    begin    the loop's first carry and its invariants    x0, context -> h, active, ...; masks
    step     ONE iteration                                k, carry, past of loop k -> carry, emitted K/V
    head     what is read off the final state             h -> logits
    commit   what the call leaves behind                  h, emitted -> state for the next call

A model may have further methods around these, such as RMS-E's `memorize`: see `LoopSpec.extra`.

`LoopModel` is what an architecture implements; `run_loop` is the only loop there is: eager PyTorch drives it with a
Python `while`, `torch.export` with `torch.while_loop`. Nothing here assumes a language model: a puzzle solver that
refines a board has no context, no state and no commit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

# The quality dial: scalar inputs of `loop` and `step`, so that it needs no re-export. Name -> (dtype, meaning).
DIALS: dict[str, tuple[torch.dtype, str]] = {
    "max_loops": (torch.int64, "iterations at most, 1..trained depth"),
    "min_loops": (torch.int64, "iterations before an exit rule may stop a position, 1-based"),
    "exit_threshold": (torch.float32, "stop when the brake score reaches it; >= 1 disables"),
    "exit_epsilon": (torch.float32, "stop when the relative state change falls below it; 0 disables"),
    "exit_entropy": (torch.float32, "stop when the logits' entropy (nats) falls below it; 0 disables"),
}


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor with a static shape."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype)

    @property
    def nbytes(self) -> int:
        return self.zeros().element_size() * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class LoopSpec:
    """Every tensor of a looped model for calls of `chunk` positions. Shapes are static.

    `h`, `active` (bool, any shape: one flag per thing that stops by itself) and `depth` (int64, the shape of `active`)
    are always part of the carry and need not be named in `carry`.
    """

    chunk: int
    max_loops: int  # the trained depth
    inputs: tuple[TensorSpec, ...]  # of prelude
    prelude: tuple[TensorSpec, ...]  # what prelude returns; begin, step and commit may read it
    h: TensorSpec
    active: TensorSpec
    head: tuple[TensorSpec, ...]  # what head returns
    context: tuple[TensorSpec, ...] = ()  # given by the host per call: angles, position, number of valid rows
    state: tuple[TensorSpec, ...] = ()  # kept between calls; (K, ...): iteration k reads row k
    memory: tuple[TensorSpec, ...] = ()  # kept between calls, read whole by every iteration
    carry: tuple[TensorSpec, ...] = ()  # carried beside h, active and depth
    invariants: tuple[TensorSpec, ...] = ()  # made by begin beside the first carry; every iteration may read them
    emits: tuple[TensorSpec, ...] = ()  # returned by every iteration; stacked to (K, ...) over the loop
    commit: tuple[TensorSpec, ...] = ()  # what commit returns; empty: the model has no commit
    # Further methods, `Tensors -> Tensors`, that hosts call outside the loop: name -> (inputs, outputs).
    extra: Mapping[str, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]] = field(default_factory=dict)
    dials: tuple[str, ...] = ("max_loops", "min_loops", "exit_threshold", "exit_epsilon")
    # For hosts and tests: what is not a tensor (window, rope_theta, ...); "ids": exclusive upper bound of integer inputs,
    # "examples": name -> values, where made-up inputs must not be random.
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def carried(self) -> tuple[TensorSpec, ...]:
        """The whole carry in order: h, active, depth, then the model's own."""
        return (self.h, self.active, TensorSpec("depth", self.active.shape, torch.int64), *self.carry)


@runtime_checkable
class LoopModel(Protocol):
    """What an architecture implements to be run and exported. Tensors go in and out by the names in its `spec`."""

    def spec(self, chunk: int) -> LoopSpec:
        """Names, shapes and types for calls of `chunk` positions.

        Raises:
            UserError: the model cannot be called with that many positions.
        """

    def prelude(self, tensors: Tensors) -> Tensors:
        """`spec.inputs` -> `spec.prelude`."""

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        """prelude + context -> (first carry without `depth`, `spec.invariants`: masks and the like)."""

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        """One iteration.

        Args:
            k: 0-d int64, counted from 0.
            carry: h, active, depth and the model's own. A position that is not active keeps its state.
            past: row k of every state tensor.
            fixed: prelude, context, memory and invariants.
            dials: scalars named in `spec.dials`.
        Returns:
            (new carry without `depth`, which the driver counts; what this iteration emits).
        """

    def head(self, h: Tensor) -> Tensors:
        """The final state -> `spec.head`."""

    def commit(self, tensors: Tensors) -> Tensors:
        """prelude, context, h, depth, iterations (0-d) and the stacked emits (K, ...) -> `spec.commit`.

        Rows of the stacked emits from `iterations` on are undefined: those loops did not run.
        """


class InjectedHits(NamedTuple):
    """What was retrieved for a text: read by the positions from `since` on, up to the next multiple of 64."""

    since: int
    values: Tensor  # (n, slots, d), best first
    scores: Tensor  # (n,) cosines by which they were found


@dataclass(frozen=True)
class WholeText:
    """What a model says of a text of T tokens that it was given at once."""

    logits: Tensor  # (T, V)
    depth: Tensor  # (T,) int64
    h: Tensor  # (T, d) the state each position stopped with
    surprise: Tensor  # of every whole segment of 64 tokens, in order; empty for a model without memory
    # Dial -> what its exit rule compares with it after every iteration, (K, T); meaningless once a position has stopped.
    scores: Mapping[str, Tensor]
    # (T,) how far the position was from another decision, of an exit rule, a router or whatever else decides in the
    # model: the smallest such distance over its iterations. Infinite where nothing was to be decided.
    margin: Tensor


@runtime_checkable
class TextModel(LoopModel, Protocol):
    """A looped model of texts, of which a package can be proved: it also knows its answer without a runtime."""

    def whole_text(self, tokens: Tensor, dials: Tensors, hits: InjectedHits | None = None) -> WholeText:
        """A text from an empty past, in one go.

        The parity gate holds runtimes against it, their caches and calls included. So it must not be written on top of
        what it judges: no cache that slots are written into, no calls of fixed size, no `commit`. A position's past is the
        positions before it, as attention defines them. What a runtime rounds on purpose, such as keys and values kept in
        float16, is rounded here too.

        Args:
            tokens: (T,) int64, positions 0 to T - 1.
            dials: the scalars of `spec.dials`.
            hits: None: nothing was retrieved.
        """


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
        tensors: prelude's results, context, state and memory, by name.
        dials: the scalars of `spec.dials`.
    Returns:
        h, depth, iterations (0-d int64: the deepest position's depth, the real cost of the call) and every emit
        stacked to (K, ...), undefined from row `iterations` on.
    """
    first, invariants = model.begin(tensors)
    fixed = tensors | invariants
    names = [t.name for t in spec.carried]
    emits = [t.name for t in spec.emits]
    first = first | {"depth": torch.zeros_like(first["active"], dtype=torch.int64)}
    h = first["h"]
    stacks = [
        # Floating point emits have the type of h: the model may have been cast since its spec was written.
        h.new_zeros((spec.max_loops, *_emit_shape(h, spec, t)), dtype=h.dtype if t.dtype.is_floating_point else t.dtype)
        for t in spec.emits
    ]
    start = (torch.zeros((), dtype=torch.int64, device=h.device), *(first[n] for n in names), *stacks)

    def cond(k: Tensor, *values: Tensor) -> Tensor:
        return (k < dials["max_loops"]) & values[names.index("active")].any()

    def body(k: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        carry = dict(zip(names, values))
        past = {t.name: tensors[t.name].index_select(0, k.reshape(1)).squeeze(0) for t in spec.state}
        new, emitted = model.step(k, carry, past, fixed, dials)
        new["depth"] = carry["depth"] + carry["active"].to(torch.int64)
        stacked = [
            stack.index_copy(0, k.reshape(1), emitted[name].unsqueeze(0))
            for name, stack in zip(emits, values[len(names) :])
        ]
        return (k + 1, *(new[n] for n in names), *stacked)

    iterations, *values = while_loop(cond, body, start)
    result = dict(zip(names + emits, values))
    return {name: result[name] for name in ("h", "depth", *emits)} | {"iterations": iterations}


def _emit_shape(h: Tensor, spec: LoopSpec, emit: TensorSpec) -> tuple[int, ...]:
    """The emit's shape with the batch of this call: specs are written for a batch of one."""
    return (h.shape[0], *emit.shape[1:]) if len(emit.shape) > 1 and emit.shape[0] == spec.h.shape[0] else emit.shape
