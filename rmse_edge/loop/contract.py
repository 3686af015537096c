"""The contract between a looped model and everything that runs or exports it.

A looped model is five methods around one block that is applied until nothing is active, and two that it may have:

    prelude  what is computed once per call               inputs, its state -> x0
    begin    the loop's first carry and its invariants    x0, context -> h, active, ...; masks
    step     ONE iteration                                k, carry, past of loop k -> carry, emitted K/V
    coda     layers behind the loop, for every position   h, its state -> y, what its state becomes    (optional)
    head     what is read off the final state             y, or h without a coda -> logits
    commit   what the call leaves behind                  h, emitted, state -> state for the next call (optional)

Further methods that hosts call outside the loop, such as RMS-E's `memorize`, are `LoopSpec.extra`.

**State** is what is kept between calls. Each tensor of it says how a host updates it (`Update`) and which methods read it:

| update    | what the host does with the call's `source`                                         | for                    |
|-----------|-------------------------------------------------------------------------------------|------------------------|
| `Ring`    | writes the row of position p into slot p mod W; what is older is gone               | attention in a window  |
| `Append`  | writes the row of position p into slot p, and refuses the position after the last   | attention to all       |
| `Replace` | takes `source` whole                                                                | recurrences, conv tails|
| `Written` | nothing: a method of `extra`, called once per segment, gives it anew                | neural memories        |

What is appended grows: a host gives a call as many slots as the text needs, a page more whenever they are full, and never
more than the spec's shape says. So a model reads the number of slots off the tensors that it is given, never off its
configuration; `begin`, which is given no state, finds it in a tensor of the context named `slots`.

`LoopModel` is what an architecture implements; `rmse_edge/loop/drive.py` has the loop. Nothing here assumes a language
model: a puzzle solver that refines a board has no context, no state and no commit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor with a static shape, written for a batch of one."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    batch_axis: int | None = 0  # where the batch is; None, or a scalar: there is none
    # The axis as long as the appended state has slots, see `Append`; its size in `shape` is the most there are.
    slots_axis: int | None = field(default=None, kw_only=True)

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype)

    def of_slots(self, slots: int) -> TensorSpec:
        """The same where the appended state has so many slots."""
        if (axis := self.slots_axis) is None:
            return self
        return replace(self, shape=(*self.shape[:axis], slots, *self.shape[axis + 1 :]))

    def of_batch(self, batch: int) -> tuple[int, ...]:
        """The shape for a batch of so many."""
        if self.batch_axis is None or not self.shape:
            return self.shape
        return (*self.shape[: self.batch_axis], batch, *self.shape[self.batch_axis + 1 :])

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Ring:
    """Position p lies in slot p mod W of the last axis but one; W is its size.

    What a slot held before is seen by no position of the call that overwrites it: a model masks by absolute distance.
    """

    source: str  # (..., C, n), given by this call's prelude, loop, coda or commit


@dataclass(frozen=True)
class Append:
    """Position p lies in slot p of the last axis but one, whose size is the number of positions that a text may have.

    A call is given some of the slots, from the first: at least as many as there were positions before it. Everything of which
    a model says the same `slots_axis` (`SLOTS` in its context, masks among its invariants) has as many.
    """

    source: str  # as in `Ring`


@dataclass(frozen=True)
class Replace:
    """The state after the call is `source`, of the same shape.

    Rows from `n_valid` on are padding: the model must leave them out of it, no host can.
    """

    source: str


@dataclass(frozen=True)
class Written:
    """`method` of `extra` gives it anew as next_NAME, at the end of every segment."""

    method: str = "memorize"


Update = Ring | Append | Replace | Written
UPDATES: dict[str, type[Update]] = {"ring": Ring, "append": Append, "replace": Replace, "written": Written}
READERS = ("prelude", "loop", "coda", "commit")


@dataclass(frozen=True)
class StateSpec(TensorSpec):
    """A tensor that is kept between calls."""

    batch_axis: int | None = 1
    update: Update = Ring("")
    read_by: tuple[str, ...] = ("loop",)  # some of `READERS`
    per_loop: bool = True  # (K, ...): iteration k reads row k; otherwise all that read it read it whole

    def __post_init__(self) -> None:
        if isinstance(self.update, Append) and self.slots_axis is None:
            object.__setattr__(self, "slots_axis", len(self.shape) - 2)

    @property
    def kind(self) -> str:
        """The name of its update, as manifests have it."""
        return next(name for name, kind in UPDATES.items() if isinstance(self.update, kind))

    @property
    def row(self) -> TensorSpec:
        """What one iteration reads of it."""
        batch, slots = (None if axis is None else axis - 1 for axis in (self.batch_axis, self.slots_axis))
        return TensorSpec(self.name, self.shape[1:], self.dtype, batch, slots_axis=slots)


@dataclass(frozen=True)
class LoopSpec:
    """Every tensor of a looped model for calls of `chunk` positions. Shapes are static.

    `h`, `active` (bool, any shape: one flag per thing that stops by itself) and `depth` (int64, the shape of `active`)
    are always part of the carry and need not be named in `carry`.
    """

    chunk: int
    max_loops: int  # the trained depth, and what a configuration allows beyond it
    inputs: tuple[TensorSpec, ...]  # of prelude; tensors of `context` that it reads are named here once more
    prelude: tuple[TensorSpec, ...]  # what prelude returns; the methods after it may read it
    h: TensorSpec
    active: TensorSpec
    head: tuple[TensorSpec, ...]  # what head returns
    context: tuple[TensorSpec, ...] = ()  # given by the host per call: angles, position, number of valid rows
    state: tuple[StateSpec, ...] = ()  # kept between calls
    carry: tuple[TensorSpec, ...] = ()  # carried beside h, active and depth
    invariants: tuple[TensorSpec, ...] = ()  # made by begin beside the first carry; every iteration may read them
    emits: tuple[TensorSpec, ...] = ()  # returned by every iteration; stacked to (K, ...) over the loop
    coda: tuple[TensorSpec, ...] = ()  # what coda returns, first what head reads; empty: the model has no coda
    commit: tuple[TensorSpec, ...] = ()  # what commit returns; empty: the model has no commit
    # Further methods, `Tensors -> Tensors`, that hosts call outside the loop: name -> (inputs, outputs).
    extra: Mapping[str, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]] = field(default_factory=dict)
    dials: tuple[str, ...] = ("max_loops", "min_loops", "exit_threshold", "exit_epsilon")  # of rmse_edge/loop/dials.py
    # Of a planned loop: how many layers there are, of which each iteration runs one; 0: all iterations are alike. The model is
    # a `PlannedTextModel`.
    layers: int = 0
    segment: int | None = None  # calls never cross a multiple of so many positions; None: they may
    # Inputs that a host fills with noise of this standard deviation, from a seed and the position: a state to begin from.
    noise: Mapping[str, float] = field(default_factory=dict)
    # For made-up inputs: exclusive upper bounds of integers, 2 without one, and values that must not be random.
    ids: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, Any] = field(default_factory=dict)

    @property
    def carried(self) -> tuple[TensorSpec, ...]:
        """The whole carry in order: h, active, depth, then the model's own."""
        depth = TensorSpec("depth", self.active.shape, torch.int64, self.active.batch_axis)
        return (self.h, self.active, depth, *self.carry)

    @property
    def rows(self) -> tuple[StateSpec, ...]:
        """The state of which iteration k reads row k."""
        return tuple(s for s in self.state if s.per_loop and "loop" in s.read_by)

    @property
    def whole(self) -> tuple[StateSpec, ...]:
        """The state that every iteration reads whole."""
        return tuple(s for s in self.state if not s.per_loop and "loop" in s.read_by)

    def read_by(self, method: str) -> tuple[StateSpec, ...]:
        """The state that a method reads, one of `READERS`."""
        return tuple(s for s in self.state if method in s.read_by)

    @property
    def capacity(self) -> int | None:
        """Positions that a text may have, for the state that is appended to; None: any number."""
        return next((s.shape[-2] for s in self.state if isinstance(s.update, Append)), None)

    def of_capacity(self, most: int | None) -> LoopSpec:
        """The same for texts of at most so many positions."""
        if most is None or self.capacity is None or most >= self.capacity:
            return self
        sides = ("inputs", "context", "state", "invariants")
        fewer: dict[str, Any] = {side: tuple(t.of_slots(most) for t in getattr(self, side)) for side in sides}
        return replace(self, **fewer)

    @property
    def written(self) -> tuple[StateSpec, ...]:
        """The state that methods of `extra` give anew."""
        return tuple(s for s in self.state if isinstance(s.update, Written))

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods of a call that the model has, and those of `extra`; `loop` stands for begin and step."""
        absent = {name for name, there in (("coda", self.coda), ("commit", self.commit)) if not there}
        return (*(m for m in ("prelude", "loop", "coda", "head", "commit") if m not in absent), *self.extra)

    @property
    def batches(self) -> bool:
        """Whether a call may be of several things, none of which knows of the others: nothing is kept between calls, given
        by position or stacked over the loops, and each stops as a whole.
        """
        parts = (self.state, self.context, self.emits, self.coda, self.commit, self.invariants)
        return not any(parts) and self.active.shape == (1,)

    @property
    def final(self) -> TensorSpec:
        """What head reads."""
        return self.coda[0] if self.coda else self.h


def check_spec(spec: LoopSpec) -> None:
    """Fail where a spec contradicts itself: what no host could carry out.

    Raises:
        ValueError: naming the tensor.
    """
    grows = {
        t.name: t.shape[t.slots_axis]
        for t in (*spec.state, *spec.context, *spec.invariants)
        if t.slots_axis is not None
    }
    for name, size in grows.items():
        if size != spec.capacity:
            raise ValueError(f"{name}: has {size} slots, where the state that is appended to has {spec.capacity}")
    for t in (*spec.prelude, *spec.carried, *spec.emits, *spec.coda, *spec.head, *spec.commit):
        if t.slots_axis is not None:
            raise ValueError(f"{t.name}: says slots_axis, which only inputs, context, state and invariants have")
    stacked = {t.name: (spec.max_loops, *t.shape) for t in spec.emits}
    given = {t.name: t.shape for t in (*spec.prelude, *spec.coda, *spec.commit)} | {
        name: shape for name, shape in stacked.items() if name not in {t.name for t in spec.commit}
    }
    for s in spec.state:
        if not s.read_by or not set(s.read_by) <= set(READERS):
            raise ValueError(f"{s.name}: read_by: got {s.read_by}, expected some of {', '.join(READERS)}")
        if s.per_loop and s.shape[0] != spec.max_loops:
            raise ValueError(f"{s.name}: per_loop, and has {s.shape[0]} rows for {spec.max_loops} loops")
        if isinstance(s.update, Written):
            if s.update.method not in spec.extra and spec.extra:
                raise ValueError(f"{s.name}: written by {s.update.method}, which is not among the extra methods")
            continue
        source = given.get(s.update.source)
        if source is None:
            raise ValueError(f"{s.name}: its source {s.update.source!r} is given by no method")
        wanted = s.shape if isinstance(s.update, Replace) else (*s.shape[:-2], spec.chunk, s.shape[-1])
        if source != wanted:
            raise ValueError(f"{s.name}: its source {s.update.source} has shape {source}, expected {wanted}")
    if spec.coda and spec.coda[0].shape[:-1] != spec.h.shape[:-1]:
        raise ValueError(
            f"{spec.coda[0].name}: what head reads, {spec.coda[0].shape}, has other rows than h {spec.h.shape}"
        )


@runtime_checkable
class LoopModel(Protocol):
    """What an architecture implements to be run and exported. Tensors go in and out by the names in its `spec`."""

    def spec(self, chunk: int) -> LoopSpec:
        """Names, shapes and types for calls of `chunk` positions.

        Raises:
            UserError: the model cannot be called with that many positions.
        """

    def call_sizes(self) -> tuple[int, ...]:
        """Positions of the calls to export, ascending; a shorter call is padded to the next."""

    def prelude(self, tensors: Tensors) -> Tensors:
        """`spec.inputs` and the state it reads -> `spec.prelude`."""

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        """prelude + context -> (first carry without `depth`, `spec.invariants`: masks and the like)."""

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        """One iteration.

        Args:
            k: 0-d int64, counted from 0.
            carry: h, active, depth and the model's own. A position that is not active keeps its state.
            past: row k of every state tensor in `spec.rows`.
            fixed: prelude, context, `spec.whole` and invariants.
            dials: scalars named in `spec.dials`.
        Returns:
            (new carry without `depth`, which the driver counts; what this iteration emits). A model whose positions go on
            being computed after they have stopped, for what others read of them, counts `depth` itself and returns it:
            the iteration whose state was kept.
        """

    def head(self, h: Tensor) -> Tensors:
        """The final state, `spec.final` -> `spec.head`."""

    def commit(self, tensors: Tensors) -> Tensors:
        """prelude, context, h, depth, iterations (0-d), the stacked emits (K, ...), its state -> `spec.commit`.

        Rows of the stacked emits from `iterations` on are undefined: those loops did not run. A model with a coda has a
        method `coda` likewise: prelude, context, h, depth and its state -> `spec.coda`.
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


class PrefixedTextModel(TextModel, Protocol):
    """A model of texts that may have a prefix: it names `PREFIX` (rmse_edge/numbers.py) in its context."""

    def whole_text(
        self, tokens: Tensor, dials: Tensors, hits: InjectedHits | None = None, prefix: int = 0
    ) -> WholeText:
        """As of `TextModel`; the first `prefix` tokens see each other whatever their order."""


class PlannedTextModel(Protocol):
    """A model of texts whose iterations are executions of `LoopSpec.layers` layers (rmse_edge/loop/plan.py): it has all methods of a
    `TextModel` but `step`, and these.
    """

    def layer(
        self, index: int, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors
    ) -> tuple[Tensors, Tensors]:
        """As `step`, of one layer; iteration k is the k-th execution of the text."""

    def decide(self, tensors: Tensors) -> Tensors:
        """The state h before a layer, `PROMPT` (rmse_edge/numbers.py) and the dials -> `chances` (B, L, 3): of each layer, of skipping,
        running and repeating it. It is named in `LoopSpec.extra`.
        """

    def whole_text(
        self, tokens: Tensor, dials: Tensors, hits: InjectedHits | None = None, prompt: int = 0
    ) -> WholeText:
        """As of `TextModel`; the plan is made of the first `prompt` tokens, 0: of all that one call takes."""
