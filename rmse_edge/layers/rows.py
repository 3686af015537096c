"""What layers keep of every position, for the positions behind it: keys, values, the inputs of short convolutions.

Every kind of it is one tensor, in which the rows of all layers lie side by side as heads: (loops, B, heads, slots, width), or
without the first axis outside a loop. It is appended, or lies in a ring where no position looks back further. A loop's
`KvPolicy` (rmse_edge/layers/stack.py) holds for all kinds alike: with "repeat", deeper loops find of a position that stopped
what its last loop kept, with "all" their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rmse_edge.loop.contract import Append, Ring, StateSpec, Tensors, TensorSpec, Update
from rmse_edge.numbers import KvDtype

from . import policy as of_policy
from .cache import KeptKeysValues
from .policy import KvPolicy

ORDER = "ring_order"  # rings that are read in the order of their positions: ORDER_SLOTS of `ring_order`


@dataclass(frozen=True)
class Kept:
    """One kind of rows of a stack of layers."""

    name: str
    heads: int  # of all layers
    width: int
    # Slots of a ring; None: all positions are kept; 0: none is, the rows are read within the call alone.
    ring: int | None = None
    ordered: bool = False  # the ring is read in the order of its positions, by `ring_order`
    cache: str | None = None  # whose type they are rounded to before use, with others of this name; None: float32
    which: int = 0  # 0: keys, 1: values
    absorbed: bool = False  # a state is made of them: of a loop, `commit` reads what was kept before the call

    def call(self, chunk: int) -> tuple[int, ...]:
        """The shape of a call's rows."""
        return (1, self.heads, chunk, self.width)


class KeptRows(nn.Module):
    """The kinds of rows of a stack of layers, of one loop or of none."""

    def __init__(
        self,
        kinds: tuple[Kept, ...],
        max_loops: int | None = None,
        policy: KvPolicy = "all",
        kv_dtype: KvDtype = "float32",
    ) -> None:
        """
        Args:
            max_loops: K; None: the stack is not looped.
            policy: "repeat" or "all", of a stack that is looped.
        """
        super().__init__()
        assert policy != "propagate"
        self.kinds, self.max_loops, self.policy = kinds, max_loops, policy
        rounded = {k.cache: k.heads for k in kinds if k.cache is not None}
        self.caches = nn.ModuleDict(
            {name: KeptKeysValues(kv_dtype, max_loops or 1, n, policy == "repeat") for name, n in rounded.items()}
        )

    def dtype(self, kind: Kept) -> torch.dtype:
        """In which hosts keep it."""
        return torch.float32 if kind.cache is None else getattr(torch, self._cache(kind).kv_dtype)

    def _cache(self, kind: Kept) -> KeptKeysValues:
        found = self.caches[str(kind.cache)]
        assert isinstance(found, KeptKeysValues)
        return found

    # ------------------------------------------------------------------------------------------------ what hosts see

    def state(
        self, prefix: str, capacity: int, readers: tuple[str, ...], loops: int | None = None
    ) -> tuple[StateSpec, ...]:
        """past_PREFIXNAME of every kind, filled from PREFIXNAME.

        Args:
            loops: for which each is kept; None: those of the stack, if it is looped.
        """
        first = () if (loops := loops or self.max_loops) is None else (loops,)
        found = []
        for kind in self._in_slots():
            source = f"{prefix}{kind.name}"
            update: Update = Append(source) if kind.ring is None else Ring(source)
            shape = (*first, 1, kind.heads, kind.ring or capacity, kind.width)
            by = (*readers, "commit") if first and kind.absorbed else readers
            found.append(
                StateSpec(f"past_{source}", shape, self.dtype(kind), len(first), update, by, per_loop=bool(first))
            )
        return tuple(found)

    def _in_slots(self) -> tuple[Kept, ...]:
        """The kinds that hosts keep."""
        return tuple(kind for kind in self.kinds if kind.ring != 0)

    def specs(self, prefix: str, chunk: int) -> tuple[TensorSpec, ...]:
        """PREFIXNAME of every kind: a call's rows, not yet as hosts keep them."""
        return tuple(TensorSpec(f"{prefix}{kind.name}", kind.call(chunk)) for kind in self.kinds)

    def kept_specs(self, prefix: str, chunk: int, loops: int | None = None) -> tuple[TensorSpec, ...]:
        """PREFIXNAME of every kind, of `loops` loops or of none: as hosts keep them."""
        first = () if loops is None else (loops,)
        return tuple(
            TensorSpec(f"{prefix}{kind.name}", (*first, *kind.call(chunk)), self.dtype(kind), len(first))
            for kind in self._in_slots()
        )

    def nothing(self, prefix: str, like: Tensor) -> Tensors:
        """PREFIXNAME of every kind, of positions that have kept nothing yet; for states (B, C, d)."""
        return {f"{prefix}{kind.name}": of_policy.nothing(like, kind.heads, kind.width) for kind in self.kinds}

    # ------------------------------------------------------------------------------------------------ computation

    def of_call(
        self,
        k: int | Tensor,
        past: Tensors | None,
        order: Mapping[int, Tensor],
        active: Tensor | None = None,
        held: Tensors | None = None,
    ) -> CallRows:
        """The rows of one call.

        Args:
            k: the loop, from 0; 0 outside loops.
            past: what hosts keep of the positions before the call, by NAME, of loop k; None: there are none.
            order: by slots, of rings that are read in order: `ring_order`.
            active: (B, C) bool, positions that have not stopped; None: all.
            held: by NAME, of which stopped positions keep theirs.
        """
        before: Tensors = {}
        if past is None:
            return CallRows(self, k, before, active, held)
        for kind in self._in_slots():
            rows = past[kind.name]
            if kind.cache is not None:
                rows = self._cache(kind).from_cache(rows, kind.which, k, torch.float32)
            if kind.ordered:
                rows = order[kind.ring or 0].unsqueeze(1) @ rows
            before[kind.name] = rows
        return CallRows(self, k, before, active, held)

    def rounded(self, kind: Kept, rows: Tensor, k: int | Tensor, heads: slice) -> Tensor:
        """Rows of some heads as their cache can hold them."""
        return rows if kind.cache is None else self._cache(kind).rounded(rows, kind.which, k, heads)

    def kept(self, rows: Tensors, source: str, prefix: str, loops: bool = False) -> Tensors:
        """A call's rows, by SOURCENAME, as hosts keep them, by PREFIXNAME; with `loops` of all loops, (K, B, heads, C, n)."""
        found = {}
        for kind in self._in_slots():
            given = rows[f"{source}{kind.name}"]
            if kind.cache is not None:
                stacked = given if loops else given.unsqueeze(0)
                stacked = self._cache(kind).to_cache(stacked, kind.which)
                given = stacked if loops else stacked.squeeze(0)
            found[f"{prefix}{kind.name}"] = given
        return found


class CallRows:
    """The rows of one call, filled layer by layer in the order in which the layers run."""

    def __init__(
        self, owner: KeptRows, k: int | Tensor, before: Tensors, active: Tensor | None, held: Tensors | None
    ) -> None:
        self.owner, self.k, self.before, self.held = owner, k, before, held
        self.kinds = {kind.name: kind for kind in owner.kinds}
        self.active = active
        self.stopped_keep = None if active is None or held is None else active[:, None, :, None]
        self.parts: dict[str, list[Tensor]] = {kind.name: [] for kind in owner.kinds}
        self.filled = dict.fromkeys(self.parts, 0)

    def add(self, name: str, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Keep the next heads of a kind.

        Args:
            rows: (B, heads, C, n), of positions that have stopped whatever they may be.
        Returns:
            (the rows that are kept: rounded, and of stopped positions those they hold; what was before the call,
            (B, heads, slots, n); None: nothing, of a kind that is not read in order, zeros of one that is).
        """
        first = self.filled[name]
        heads = slice(first, first + rows.shape[1])
        rows = self.owner.rounded(self.kinds[name], rows, self.k, heads)
        if self.stopped_keep is not None and self.held is not None:
            rows = torch.where(self.stopped_keep, rows, _part(self.held[name], heads))
        self.parts[name].append(rows)
        self.filled[name] = heads.stop
        if name in self.before:
            return rows, _part(self.before[name], heads)
        kind = self.kinds[name]
        return rows, rows.new_zeros(*rows.shape[:2], kind.ring or 0, rows.shape[3]) if kind.ordered else None

    def rows(self, prefix: str) -> Tensors:
        """All that was kept, by PREFIXNAME, (B, heads, C, n)."""
        return {f"{prefix}{name}": torch.cat(parts, 1) for name, parts in self.parts.items()}


def _part(rows: Tensor, heads: slice) -> Tensor:
    """Some heads of rows; all of them without an operator, of which a graph would make a copy."""
    return rows if rows.shape[1] == heads.stop - heads.start else rows[:, heads]
