"""`LoopedCache`: what `generate` carries from call to call: the model's state, and a position per row."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from rmse_edge.errors import UserError
from rmse_edge.info import PAGE
from rmse_edge.loop.contract import Append, LoopSpec, Replace, StateSpec, Tensors, Written
from rmse_edge.numbers import SLOTS


class LoopedCache(Cache):
    """The state tensors of a `LoopSpec`, row by row.

    Rows advance by themselves: padding moves no row forward. What is appended grows by pages, as the longest row needs it; a
    neural memory learns at each row's own segments. Empty until the first call, which decides batch size and device.

    Attributes:
        state: by name, each of its spec's shape with a batch of B; empty while the cache is.
        memory: the neural memory by name; empty for a model without one.
        segment: (B, segment, d) exit states since each row's last boundary; None without a memory.
        position: (B,) int64 NumPy: tokens committed so far, which is the next token's absolute position.
        columns: columns of input_ids seen, padding included: what `generate` calls the length of the cache.
    """

    called: ClassVar[str] = "a LoopedCache"
    kind: ClassVar[str] = "what a looped model keeps"  # that cannot be rolled back

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next call may have another batch size."""
        self.specs: dict[str, StateSpec] = {}
        self.state: Tensors = {}
        self.memory: Tensors = {}
        self.segment: Tensor | None = None
        self.slots = 0  # of what is appended
        self.position = np.zeros(0, np.int64)
        self.columns = 0
        self._device: torch.device | None = None  # None: empty
        self._depth: list[Tensor] = []

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in self.state.items())
        return f"{type(self).__name__}({shapes or 'empty'}, position={self.position.tolist()})"

    def __len__(self) -> int:
        """Loops that have a state of their own, 0 while empty."""
        return next((self.state[name].shape[0] for name, s in self.specs.items() if s.per_loop), 0)

    @property
    def depth(self) -> Tensor:
        """(B, columns) int64 on the CPU: iterations each column executed, 0 for padding.

        After `generate` on a prompt of n columns, `depth[:, n - 1 :]` belongs to the new tokens one by one: the
        position whose logits produced the token.
        """
        return torch.cat(self._depth, 1) if self._depth else torch.zeros(len(self.position), 0, dtype=torch.int64)

    def allocate(self, model: Any, spec: LoopSpec, batch: int, device: torch.device) -> None:
        """Make the state of an empty cache; a cache in use must have this batch size.

        Raises:
            UserError: the cache holds another number of rows.
        """
        if self._device is not None:
            if len(self.position) != batch:
                raise UserError(
                    f"cache: {self.called} of {len(self.position)} rows, got input_ids of {batch}; "
                    "a cache continues the batch it was made for"
                )
            return
        self._device, self.position = device, np.zeros(batch, np.int64)
        self.specs = {s.name: s for s in spec.state if not isinstance(s.update, Written)}
        self.slots = self._pages(spec.capacity or 0)
        self.state = {
            name: torch.zeros(s.of_slots(self.slots).of_batch(batch), dtype=s.dtype, device=device)
            for name, s in self.specs.items()
        }
        if spec.written:
            assert spec.segment is not None, "a memory is written at the end of a segment"
            blank = model.blank({})
            # `expand`: rows are replaced one by one, never written into.
            self.memory = {s.name: blank[s.name].expand(s.of_batch(batch)) for s in spec.written}
            self.segment = torch.zeros(batch, spec.segment, spec.h.shape[-1], device=device)

    def _pages(self, capacity: int, positions: int = 0) -> int:
        """Slots for so many positions."""
        return min(capacity, PAGE * max(1, -(-positions // PAGE)))

    def require_room(self, spec: LoopSpec, counts: np.ndarray) -> None:
        """Fail unless each row can take so many more positions, (B,).

        Raises:
            UserError: what is appended is full before.
        """
        longest = int((self.position + counts).max(initial=0))
        if spec.capacity is not None and longest > spec.capacity:
            raise UserError(
                f"input_ids: {longest} tokens are more than the {spec.capacity} that the model attends to; shorten the text"
            )

    def tensors(self) -> Tensors:
        """What the methods of a model read, by the names of its spec; `slots` as the context has them."""
        return self.state | self.memory | {SLOTS: torch.arange(self.slots, device=self._device)}

    def commit(self, model: Any, spec: LoopSpec, found: Tensors, count: np.ndarray) -> None:
        """Take what a call gave for the first `count` (B,) positions of each row, and move the rows forward.

        Rows that come to the end of a segment teach their memory what is behind them.

        Args:
            found: what the methods of the call gave, the sources of the state and `h` among it.
        """
        self._grow(spec, int((self.position + count).max()))
        rows, columns = np.nonzero(np.arange(spec.chunk) < count[:, None])
        r, c, at = (torch.from_numpy(i).to(self._device) for i in (rows, columns, self.position[rows] + columns))
        for name, s in self.specs.items():
            if isinstance(s.update, Replace):
                went = torch.from_numpy(count > 0).to(self._device)
                self.state[name] = _of_rows(went, found[s.update.source], self.state[name], s)
                continue
            assert not isinstance(s.update, Written) and s.batch_axis is not None
            new, old = (t.movedim((s.batch_axis, -2), (0, 1)) for t in (found[s.update.source], self.state[name]))
            size = old.shape[1]
            last = torch.from_numpy(columns >= count[rows] - size).to(self._device)  # no slot is written twice
            old[r[last], at[last] % size] = new[r[last], c[last]]
        if self.segment is not None:
            self.segment = self.segment.index_put((r, at % self.segment.shape[1]), found["h"][r, c])
        self.position = self.position + count
        if self.segment is not None:
            self._memorize(model, spec, (count > 0) & (self.position % self.segment.shape[1] == 0))

    def _grow(self, spec: LoopSpec, positions: int) -> None:
        """Give what is appended the slots that so many positions need."""
        slots = self._pages(spec.capacity or 0, positions)
        if slots <= self.slots:
            return
        for name, s in self.specs.items():
            if isinstance(s.update, Append):
                old = self.state[name]
                new = old.new_zeros(s.of_slots(slots).of_batch(len(self.position)))
                new[..., : self.slots, :] = old
                self.state[name] = new
        self.slots = slots

    def _memorize(self, model: Any, spec: LoopSpec, whole: np.ndarray) -> None:
        """Teach the memories of the rows `whole` (B,) their segments."""
        if not whole.any():
            return
        assert self.segment is not None
        there = torch.full((len(whole),), self.segment.shape[1], device=self._device)
        given = {"segment": self.segment, "n_valid": there} | self.memory
        methods = {s.update.method for s in spec.written if isinstance(s.update, Written)}
        new = {name: t for method in methods for name, t in getattr(model, method)(given).items()}
        row = torch.from_numpy(whole).to(self._device)
        self.memory = {s.name: _of_rows(row, new[f"next_{s.name}"], self.memory[s.name], s) for s in spec.written}

    def advance(self, depth: Tensor) -> None:
        """Note the columns of a finished forward call by their depths, (B, T)."""
        self.columns += depth.shape[1]
        self._depth.append(depth.cpu())

    # ------------------------------------------------------------------------------- the interface of transformers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: what has no more room says so by itself, whatever the number of columns."""
        return -1

    @property
    def is_compileable(self) -> bool:
        return False  # calls are cut on the host, by the positions of each row

    @property
    def is_linear(self) -> list[bool]:
        """One layer that knows its length. `generate` cuts off what a cache has read already unless all layers are linear,
        and of none, all are.
        """
        return [False]

    @property
    def is_initialized(self) -> bool:
        return self._device is not None

    @property
    def is_croppable(self) -> bool:
        return False  # what was overwritten cannot come back

    @property
    def batch_size(self) -> int:
        return len(self.position) if self._device is not None else -1

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("update", "written layer by layer")

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("get_mask_sizes", "read as a list of layers")

    def reorder_cache(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("reorder_cache", "reordered, as beam search would")

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("crop", "rolled back, as assisted decoding would")

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("batch_repeat_interleave", "repeated, as contrastive search would")

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("batch_select_indices", "thinned out, as contrastive search would")

    def _refuse(self, operation: str, what: str) -> NoReturn:
        raise UserError(
            f"{type(self).__name__}.{operation}: {self.kind} cannot be {what}; use greedy search or sampling"
        )


def _of_rows(which: Tensor, new: Tensor, old: Tensor, spec: StateSpec) -> Tensor:
    """`new` in the rows `which` (B,) of the batch, `old` in the others."""
    assert spec.batch_axis is not None
    shape = [1] * old.dim()
    shape[spec.batch_axis] = -1
    return torch.where(which.view(shape), new, old)
