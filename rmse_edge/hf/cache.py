"""`RMSECache`: what `generate` carries from call to call: a KV ring per loop, the memory and a position per row."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.errors import UserError
from rmse_edge.loop.contract import Tensors
from rmse_edge.numbers import SEGMENT


class RMSECache(Cache):
    """Keys and values of every loop in a ring of `window` slots, row by row.

    Slot s of a row holds its largest committed position that is s modulo `window`; what a row has forgotten is
    overwritten, so the size does not grow with the text. Rows advance by themselves: padding moves no row forward.
    Empty until the first call, which decides batch size and device.

    Attributes:
        keys, values: (K, B, G, W, hd) in the configuration's `kv_dtype`; None while empty.
        memory: the neural memory by name, (B, ...) each; empty for a model without one.
        segment: (B, 64, d) exit states since each row's last multiple of 64 positions; None without a memory.
        position: (B,) int64 NumPy: tokens committed so far, which is the next token's absolute position.
        columns: columns of input_ids seen, padding included: what `generate` calls the length of the cache.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.memory: Tensors = {}
        self.segment: Tensor | None = None
        self.position = np.zeros(0, np.int64)
        self.columns = 0
        self._depth: list[Tensor] = []

    def __repr__(self) -> str:
        shape = None if self.keys is None else tuple(self.keys.shape)
        return f"{type(self).__name__}(keys and values {shape}, position={self.position.tolist()})"

    def __len__(self) -> int:
        """Loops that have a ring, 0 while empty."""
        return 0 if self.keys is None else self.keys.shape[0]

    @property
    def depth(self) -> Tensor:
        """(B, columns) int64 on the CPU: iterations each column executed, 0 for padding.

        After `generate` on a prompt of n columns, `depth[:, n - 1 :]` belongs to the new tokens one by one: the
        position whose logits produced the token.
        """
        return torch.cat(self._depth, 1) if self._depth else torch.zeros(len(self.position), 0, dtype=torch.int64)

    def allocate(self, model: RMSE, batch: int, device: torch.device) -> None:
        """Make the rings and the blank memory of an empty cache; a cache in use must have this batch size.

        Raises:
            UserError: the cache holds another number of rows.
        """
        config = model.config
        if self.keys is None:
            shape = (config.max_loops, batch, config.n_kv_heads, config.window, config.head_dim)
            dtype = getattr(torch, config.kv_dtype)
            self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            self.position = np.zeros(batch, np.int64)
            if model.memory is not None:
                self.memory = model.memory.initial(batch)
                self.segment = torch.zeros(batch, SEGMENT, config.d_model, device=device)
        elif self.keys.shape[1] != batch:
            raise UserError(
                f"past_key_values: an RMSECache of {self.keys.shape[1]} rows, got input_ids of {batch}; "
                "a cache continues the batch it was made for"
            )

    def rings(self) -> Tensors:
        """The state tensors of `LoopSpec`, by name."""
        assert self.keys is not None and self.values is not None, "allocate comes first"
        return {"past_keys": self.keys, "past_values": self.values}

    def commit(self, model: RMSE, keys: Tensor, values: Tensor, h: Tensor, count: np.ndarray) -> None:
        """Put the first `count` (B,) positions of a call into the rings and move the rows forward.

        Rows that come to a multiple of 64 positions teach their memory the segment behind them.

        Args:
            keys, values: (K, B, G, C, hd) with C <= window, so no slot is written twice.
            h: (B, C, d) exit states.
        """
        ring_keys, ring_values = self.rings().values()
        rows, columns = np.nonzero(np.arange(keys.shape[3]) < count[:, None])
        slots = (self.position[rows] + columns) % ring_keys.shape[3]
        r, c, s = (torch.from_numpy(i).to(keys.device) for i in (rows, columns, slots))
        ring_keys[:, r, :, s] = keys[:, r, :, c]  # (n, K, G, hd)
        ring_values[:, r, :, s] = values[:, r, :, c]
        if self.segment is not None:
            places = torch.from_numpy((self.position[rows] + columns) % SEGMENT).to(h.device)
            self.segment = self.segment.index_put((r, places), h[r, c])
        self.position = self.position + count
        whole = (count > 0) & (self.position % SEGMENT == 0)
        if self.segment is not None and whole.any():
            there = torch.full((len(count),), SEGMENT, device=h.device)
            new = model.memorize({"segment": self.segment, "n_valid": there} | self.memory)
            row = torch.from_numpy(whole).to(h.device)
            self.memory = {
                name: torch.where(row.view(-1, *[1] * (old.dim() - 1)), new[f"next_{name}"], old)
                for name, old in self.memory.items()
            }

    def advance(self, depth: Tensor) -> None:
        """Note the columns of a finished forward call by their depths, (B, T)."""
        self.columns += depth.shape[1]
        self._depth.append(depth.cpu())

    # ------------------------------------------------------------------------------- the interface of transformers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a text may be as long as it likes; only the last `window` positions are attended to."""
        return -1

    @property
    def is_compileable(self) -> bool:
        return False  # calls are cut on the host, at multiples of 64 positions of each row

    @property
    def is_initialized(self) -> bool:
        return self.keys is not None

    @property
    def is_croppable(self) -> bool:
        return False  # overwritten slots cannot come back

    @property
    def batch_size(self) -> int:
        return -1 if self.keys is None else self.keys.shape[1]

    def reset(self) -> None:
        """Forget everything; the next call may have another batch size."""
        self.keys = self.values = self.segment = None
        self.memory = {}
        self.position = np.zeros(0, np.int64)
        self.columns = 0
        self._depth = []

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("update", "written layer by layer")

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("get_mask_sizes", "read as a list of layers")

    def reorder_cache(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("reorder_cache", "reordered, as beam search would")

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("crop", "rolled back, as assisted decoding would")

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("batch_repeat_interleave", "repeated, as contrastive search would")

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("batch_select_indices", "thinned out, as contrastive search would")


def _refuse(operation: str, what: str) -> NoReturn:
    raise UserError(f"RMSECache.{operation}: a ring cannot be {what}; use greedy search or sampling")
