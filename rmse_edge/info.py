"""`ModelInfo`: what a host needs to know about a model, from a checkpoint or a manifest.

It is in parts: what every looped model has, and what texts, boards, and models that look passages up have besides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import Field
from typing_extensions import TypedDict  # pydantic takes Python's own from 3.12 on

from .errors import ArgumentError, PackageError
from .loop.dials import DIALS, Dials
from .numbers import Count, Loops, Positive, Some, Token, VocabularySize
from .schema import Finite, Name, Shape, Whole, validated

if TYPE_CHECKING:
    from .loop.contract import LoopSpec, StateSpec

Dtype = Literal["float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"]
Form = tuple[tuple[int, ...], Dtype]  # shape and type
Kind = Literal["ring", "append", "replace", "written"]
Reader = Literal["prelude", "loop", "coda", "commit"]
BoardKind = Literal["sudoku", "maze"]


PAGE = 256  # slots by which a state that is appended to grows
LARGEST_STATE = 4 << 30  # bytes that a model may keep between calls
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}


def dtype_name(dtype: object) -> Dtype:
    """The name of a type of PyTorch's."""
    return cast(Dtype, str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class State:
    """A tensor that is kept between calls; rmse_edge/loop/contract.py says what the fields mean."""

    shape: Shape
    dtype: Dtype
    kind: Kind
    source: Name  # of written ones the method that gives them, of all others the tensor that they are updated with
    read_by: tuple[Reader, ...]
    per_loop: bool

    @property
    def form(self) -> Form:
        return self.shape, self.dtype

    def of_slots(self, slots: int | None) -> tuple[int, ...]:
        """The shape while the appended state has so many slots; None: all of them."""
        if slots is None or self.kind != "append":
            return self.shape
        return (*self.shape[:-2], slots, self.shape[-1])

    def nbytes(self, slots: int | None = None) -> int:
        """Bytes while the appended state has so many slots."""
        return prod(self.of_slots(slots)) * SIZES[self.dtype]

    @property
    def row(self) -> Form:
        """What one iteration reads of it."""
        return (self.shape[1:] if self.per_loop else self.shape), self.dtype

    def taken(self, rows: int) -> tuple[int, ...]:
        """The shape of its source in calls of so many rows."""
        return self.shape if self.kind == "replace" else (*self.shape[:-2], rows, self.shape[-1])

    @classmethod
    def of(cls, spec: StateSpec) -> State:
        update: Any = spec.update
        source = update.method if spec.kind == "written" else update.source
        return cls(
            spec.shape,
            dtype_name(spec.dtype),
            cast(Kind, spec.kind),
            source,
            cast("tuple[Reader, ...]", spec.read_by),
            spec.per_loop,
        )


@dataclass(frozen=True)
class TextInfo:
    """Of a model of texts that reads and writes token by token."""

    vocab_size: VocabularySize
    # Channels of each head that turn with the position; 0: the host gives no angles.
    rotary_dims: Some = 0
    rope_theta: Positive = 10_000.0
    # Bases of layers that turn by another: the host gives cos_NAME and sin_NAME besides.
    further_thetas: dict[Name, Positive] = field(default_factory=dict)
    # Whether a text may begin with a prefix: positions that see each other whatever their order.
    prefix: bool = False
    max_seq_len: Annotated[int, Field(ge=1, le=2**53)] | None = None
    eos_token_ids: tuple[Token, ...] = ()  # each of them ends a text
    # ranges [first, end) of ids without a token, ascending; never to be drawn
    unused_token_ids: tuple[tuple[Token, VocabularySize], ...] = ()


@dataclass(frozen=True)
class PlanInfo:
    """Of a model of texts whose iterations are executions of layers, by a plan that is made when a text begins."""

    layers: Count
    prompt: Count  # positions that the plan is made of, at most; the largest call has as many


@dataclass(frozen=True)
class DraftingInfo:
    """Of a model with heads for multi-token prediction: `draft0`, `draft1`, ... for calls of one row (rmse_edge/layers/mtp.py)."""

    heads: Count
    reads: Name  # what `head` calls the state that it reads


@dataclass(frozen=True)
class BoardInfo:
    """Of a model that is given a board of cells and fills it in."""

    cells: Count
    symbols: Count  # that a cell may hold
    prefix: Some = 0  # vectors that stand before those of the cells in h
    puzzles: Count = (
        1  # that the model has vectors of; a host says which of them a board is of, where there are several
    )
    kind: BoardKind | None = None  # what the boards are, so that a host can read, print and check them; None: not known


@dataclass(frozen=True)
class BlocksInfo:
    """Of a model that writes a text block by block, each filled in by denoising steps."""

    size: Count  # positions of a block
    mask_token_id: Token  # stands for what is not written yet
    text: TextInfo  # what such a model has in common with those that write token by token


class Retrieval(TypedDict):
    """Sizes of a retrieval head."""

    key_dims: Count
    slots: Count
    hits: Count
    gamma: Finite


@dataclass(frozen=True)
class ModelInfo:
    """What a host needs to know about a model."""

    name: Annotated[str, Field(max_length=200)]
    target: Name  # "torch", "onnx", ...
    model_type: Name
    max_loops: Loops  # the trained depth, and what `untrained_loops` of its configuration allows beyond it
    dials: Dials  # the checkpoint's own settings
    rules: tuple[Name, ...]  # the dials that the model has
    width: Count  # channels of h
    parameters: Whole
    nbytes: Whole  # of the artifact on disk; a manifest, which is a part of it, does not say
    chunks: tuple[Count, ...]  # rows of the calls that exist, ascending; of a model of texts the first is 1
    segment: Count | None  # no call crosses a multiple of so many positions
    methods: tuple[Name, ...]  # that the model has, whoever drives the loop
    state: dict[Name, State]
    noise: dict[Name, Positive] = field(
        default_factory=dict
    )  # inputs to be filled with noise: their standard deviation
    # Slots by which what is appended grows as a text gets longer; None: nothing is, or all slots are there from the start.
    page: Count | None = None
    text: TextInfo | None = None
    board: BoardInfo | None = None
    blocks: BlocksInfo | None = None
    plan: PlanInfo | None = None  # None: all iterations are alike
    drafting: DraftingInfo | None = None  # None: the model has no heads that draft
    retrieval: Retrieval | None = None  # None: the model has no retrieval head
    quant: Name = "fp32"  # how weights are held: fp32, fp16, int8, int4
    # of the weights, the same for a checkpoint and every package made of it
    fingerprint: Annotated[str, Field(max_length=200)] = ""
    # Weights that one token is multiplied with in every loop and, whatever its depth, once.
    loop_weights: Whole = 0
    once_weights: Whole = 0
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_spec(cls, specs: Mapping[int, LoopSpec], **fields: Any) -> ModelInfo:
        """What specs say of a model, one for each size of its calls; `fields` are the others."""
        spec = next(iter(specs.values()))
        return cls(
            max_loops=spec.max_loops,
            rules=spec.dials,
            width=spec.h.shape[-1],
            chunks=tuple(specs),
            segment=spec.segment,
            methods=tuple(dict.fromkeys(name for s in specs.values() for name in s.methods)),
            state={s.name: State.of(s) for s in spec.state},
            noise=dict(spec.noise),
            page=None if spec.capacity is None else PAGE,
            **fields,
        )

    def dials_with(self, **overrides: float | int | None) -> Dials:
        """The checkpoint's dials with those given (not None) replaced, checked."""
        return self.dials.changed(self.max_loops, self.untrained, **overrides)

    def dials_asked(self, values: Mapping[str, float | int | None]) -> Dials:
        """As `dials_with`, for values that somebody asked for: a rule that the model lacks is refused, not ignored.

        Raises:
            ArgumentError: a dial is out of the model's range, or the model was not built with that rule.
        """
        for name, value in values.items():
            off = DIALS[name].off
            if name not in self.rules and off is not None and value not in (None, off):
                raise ArgumentError(name, f"{self.name} has no such rule; it has {', '.join(self.rules)}")
        return self.dials_with(**values)

    def check(self, dials: Dials) -> Dials:
        """Itself, if the model can run it.

        Raises:
            ArgumentError: naming the dial and its range.
        """
        return dials.check(self.max_loops, self.untrained)

    @property
    def untrained(self) -> int | None:
        """Loops of `max_loops` beyond the trained depth; None: its architecture has no such setting."""
        found = self.config.get("untrained_loops")
        return found if isinstance(found, int) else None

    @property
    def trained_loops(self) -> int:
        return self.max_loops - (self.untrained or 0)

    def with_limit(self, max_seq_len: int | None) -> ModelInfo:
        """The same for texts of at most so many tokens."""
        return self.with_language(dataclasses.replace(self.language, max_seq_len=max_seq_len))

    def with_language(self, text: TextInfo) -> ModelInfo:
        """The same of a text of which other things are known."""
        if self.blocks is not None:
            return dataclasses.replace(self, blocks=dataclasses.replace(self.blocks, text=text))
        return dataclasses.replace(self, text=text)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return {name: value for name, value in asdict(self).items() if name != "nbytes"}

    @classmethod
    def from_json(cls, values: Any, nbytes: int, where: str = "manifest") -> ModelInfo:
        """
        Raises:
            PackageError: a field is missing or does not fit its type; one line begins with `where` and names it.
        """
        if isinstance(values, dict):
            values = values | {"nbytes": nbytes}
        return validated(cls, values, where, PackageError, "export the package again", "model")

    @property
    def full_depth(self) -> Dials:
        """Every position runs every loop."""
        return Dials(self.max_loops)

    @property
    def language(self) -> TextInfo:
        """Its part about texts, whether it writes them token by token or block by block.

        Raises:
            ValueError: it is no model of texts.
        """
        if (found := self.text_part) is None:
            raise ValueError(f"{self.name}: is no model of texts")
        return found

    @property
    def text_part(self) -> TextInfo | None:
        """As `language`; None: it is no model of texts."""
        return self.blocks.text if self.blocks is not None else self.text

    @property
    def vocab_size(self) -> int:
        return self.language.vocab_size

    @property
    def memory(self) -> dict[str, State]:
        """The state that is written once per segment; empty: the model has none."""
        return {name: s for name, s in self.state.items() if s.kind == "written"}

    @property
    def remembers(self) -> bool:
        """Whether it has a memory that is written while it reads."""
        return bool(self.memory)

    @property
    def rings(self) -> dict[str, State]:
        """The state that holds positions in slots, whether older ones fall out or not."""
        return {name: s for name, s in self.state.items() if s.kind in ("ring", "append")}

    @property
    def window(self) -> int | None:
        """Positions after which all rings have wrapped; None where nothing wraps."""
        sizes = [s.shape[-2] for s in self.state.values() if s.kind == "ring"]
        return max(sizes, default=None)

    @cached_property
    def capacity(self) -> int | None:
        """Positions that a text may have at most, for its state; None: any number."""
        return next((s.shape[-2] for s in self.state.values() if s.kind == "append"), None)

    def slots(self, positions: int) -> int | None:
        """Slots of the appended state of a text of so many positions; None: nothing is appended."""
        if self.capacity is None or self.page is None:
            return self.capacity
        return min(self.capacity, self.page * max(1, -(-positions // self.page)))

    def kept_bytes(self, positions: int = 0) -> int:
        """Bytes of the state behind so many positions."""
        slots = self.slots(positions)
        return sum(s.nbytes(slots) for s in self.state.values())

    @cached_property
    def room(self) -> int | None:
        """Positions whose state is not larger than `LARGEST_STATE`, as far as it grows; None: any number."""
        if self.capacity is None or self.page is None:
            return self.capacity
        slot = sum(s.nbytes(1) for s in self.state.values() if s.kind == "append")
        others = sum(s.nbytes() for s in self.state.values() if s.kind != "append")
        return min(self.capacity, max(0, LARGEST_STATE - others) // slot)

    @cached_property
    def longest(self) -> int | None:
        """Tokens that a text may have at most, for its state and for the export; None: any number."""
        return min((n for n in (self.language.max_seq_len, self.room) if n is not None), default=None)
