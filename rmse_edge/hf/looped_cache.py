"""`LoopedCache`: what `generate` carries from call to call: the model's state, and a position per row."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from rmse_edge.arch.common.kept_batch import KeptBatch
from rmse_edge.errors import UserError


class LoopedCache(KeptBatch, Cache):
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
        Cache.__init__(self, layers=[])
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next call may have another batch size."""
        self.forget()
        self.columns = 0
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
