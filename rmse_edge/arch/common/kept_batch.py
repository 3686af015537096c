"""What a model keeps between calls of a batch, row by row: each at its own position."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from rmse_edge.errors import UserError
from rmse_edge.info import PAGE, TextInfo
from rmse_edge.layers.rope import given_angles
from rmse_edge.loop.contract import Append, LoopSpec, Replace, StateSpec, Tensors, Written
from rmse_edge.loop.generator import starts
from rmse_edge.numbers import PREFIX, SLOTS


class KeptBatch:
    """The state tensors of a `LoopSpec` for a batch of texts.

    Rows advance by themselves: padding moves no row forward. What is appended grows by pages, as the longest row needs it; a
    neural memory learns at each row's own segments. Empty until `allocate`.

    Attributes:
        state: by name, each of its spec's shape with a batch of B; empty while this is.
        memory: the neural memory by name; empty for a model without one.
        segment: (B, segment, d) exit states since each row's last boundary; None without a memory.
        position: (B,) int64 NumPy: tokens committed so far, which is the next token's absolute position.
    """

    called: ClassVar[str] = "what is kept"

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Become empty; the next call may have another batch size."""
        self.specs: dict[str, StateSpec] = {}
        self.state: Tensors = {}
        self.memory: Tensors = {}
        self.segment: Tensor | None = None
        self.slots = 0  # of what is appended
        self.position = np.zeros(0, np.int64)
        self._device: torch.device | None = None  # None: empty

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


def noise_of(spec: LoopSpec, seed: int, positions: np.ndarray) -> Tensors:
    """What `spec.noise` asks for, (B, C, d) each, for `positions` (B, C): every row has the noise of its own position, so
    that it does not matter which texts are in a batch.
    """
    if not spec.noise:
        return {}
    places, inverse = np.unique(positions, return_inverse=True)
    found = starts(spec.noise, seed, places.tolist(), spec.h.shape[-1])
    return {name: torch.from_numpy(rows[inverse.reshape(positions.shape)]) for name, rows in found.items()}


def call_context(
    spec: LoopSpec,
    text: TextInfo,
    position: np.ndarray,
    count: np.ndarray,
    seed: int,
    device: torch.device,
    prefix: np.ndarray,
) -> Tensors:
    """What a call is told beside its tokens and its state: where it stands, noise, and that nothing was retrieved.

    Args:
        position, count: (B,) of each row: where it begins, and how many of the call's rows it fills.
        prefix: (B,) of each text.
    """
    places = position[:, None] + np.arange(spec.chunk)  # (B, C)
    host: dict[str, Any] = {"position": position, "n_valid": count} | ({PREFIX: prefix} if text.prefix else {})
    host |= given_angles(places, text.rotary_dims, text.rope_theta, text.further_thetas)
    found = {name: torch.from_numpy(array) for name, array in host.items()} | noise_of(spec, seed, places)
    known = {"tokens", SLOTS, *found, *(s.name for s in spec.state)}
    for t in spec.inputs:
        if t.name not in known:
            found[t.name] = torch.zeros(t.of_batch(len(position)), dtype=t.dtype)
    return {name: tensor.to(device) for name, tensor in found.items()}


def _of_rows(which: Tensor, new: Tensor, old: Tensor, spec: StateSpec) -> Tensor:
    """`new` in the rows `which` (B,) of the batch, `old` in the others."""
    assert spec.batch_axis is not None
    shape = [1] * old.dim()
    shape[spec.batch_axis] = -1
    return torch.where(which.view(shape), new, old)
