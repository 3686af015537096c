"""The interface of mixers, which is the same for attention and for recurrences.

    y, state' = mixer(x, rows, state, call)              what positions read, and what the call makes of the state
    state' = mixer.absorb(rows, past, state, call)       the second alone: what stopped positions leave as well

**Rows** are all that other positions may learn of a position: keys and values, the inputs of a convolution, how much a matrix is to
decay. A mixer hands them in by `rows.add` and is given back those that are kept: of a stopped position in a loop, those of its last
iteration. Hosts keep some of them in slots (`Kept`). **State** is what replaces itself: the matrix of a recurrence. It is a
function of rows, which is why a stopped position can be absorbed without being computed.

Padding (rows from `n_valid` on) leaves no trace in a state. A call of any number of positions gives the numbers that the same
positions give in several calls. The forms are parallel: products over all positions of a call, of which a graph holds at most
`BLOCK`; longer calls, which only eager code makes, go block by block. A call of one position is the step form: what is between
positions is then of size one, or gone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rmse_edge.layers.rows import Kept
from rmse_edge.layers.stack import Kind
from rmse_edge.loop.contract import Tensors

BLOCK = 64  # positions that are computed together

Past = dict[str, "Tensor | None"]  # rows before the call by name, (B, heads, slots, width); None: there are none


@dataclass(frozen=True)
class StateKind:
    """A tensor that every call replaces; zeros before the first."""

    name: str
    shape: tuple[int, ...]  # of one sequence, at most three axes: loops and the batch come before


class Call(NamedTuple):
    """Where a call stands."""

    position: Tensor  # (B,) of the first row
    n_valid: Tensor  # (B,) rows that are not padding
    fixed: Tensors  # angles and masks, by name
    leaves: bool = (
        True  # the state behind the call is asked for: not of a loop, whose states `absorb` makes, nor in training
    )

    def valid(self, count: int) -> Tensor:
        """(B, count) bool: rows that are not padding."""
        return torch.arange(count, device=self.n_valid.device) < self.n_valid[:, None]

    def there(self, count: int) -> Tensor:
        """The same as factors, (B, 1, count, 1)."""
        return self.valid(count).to(torch.float32)[:, None, :, None]

    def of_loops(self, loops: int) -> Call:
        """The same for the rows of all loops as one batch, loops outermost."""
        return Call(self.position.repeat(loops), self.n_valid.repeat(loops), {})


class Rows(Protocol):
    """The rows of one layer's call."""

    def add(self, name: str, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Hand in the rows of a kind, (B, heads, C, width).

        Returns:
            (those that are kept: rounded, and of stopped positions those they hold; those before the call, as `Past` has them,
            where the kind is kept at all).
        """


class Mixer(nn.Module, ABC):
    """See the module."""

    kind: Kind | None = None  # of its attention: which masks it reads
    # In graphs: parts of it as one operator each (operators.py). A target that has them sets it to True.
    operators = False

    @property
    def as_operators(self) -> bool:
        """Whether what is computed now is a graph of a target that has them."""
        return self.operators and torch.compiler.is_exporting()

    @property
    @abstractmethod
    def kept(self) -> tuple[Kept, ...]:
        """The kinds of its rows."""

    @property
    def states(self) -> tuple[StateKind, ...]:
        return ()

    @abstractmethod
    def forward(self, x: Tensor, rows: Rows, state: Tensors, call: Call) -> tuple[Tensor, Tensors]:
        """
        Args:
            x: (B, C, d) normed states.
            state: before the call, (B, ...) each.
        Returns:
            (what the positions read, (B, C, d); the state after the call, which means nothing where it leaves none).
        """

    def absorb(self, rows: Tensors, past: Past, state: Tensors, call: Call) -> Tensors:
        """The state after a call.

        Args:
            rows: as kept, by name, (B, heads, C, width) each.
            past: those before the call, of kinds that are `absorbed` and kept in slots.
            state: before the call.
        """
        return {}

    def reset_parameters(self) -> None:
        """Give what is no linear layer its first values."""


# What is carried from block to block.
Carried = tuple[Tensor, ...]


def by_blocks(
    block: Callable[[Carried, Carried], tuple[Tensor, Carried]], parts: Carried, carried: Carried
) -> tuple[Tensor, Carried]:
    """`block(parts, carried) -> (result, carried)` over the positions of a call, `BLOCK` at a time.

    Args:
        parts: (B, heads, C, ...) each.
    Returns:
        (results of all positions, (B, heads, C, n); what the last block carries).
    """
    count = parts[0].shape[2]
    if torch.compiler.is_exporting() or count <= BLOCK:
        return block(parts, carried)
    found = []
    for start in range(0, count, BLOCK):
        some = tuple(t.narrow(2, start, min(BLOCK, count - start)) for t in parts)
        result, carried = block(some, carried)
        found.append(result)
    return torch.cat(found, 2), carried
