"""The type in which keys and values are kept, and rounding to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def table_row(table: Tensor, k: int | Tensor) -> Tensor:
    """Row k of a per-loop table (K, ...): k is a Python int when the loop is unrolled, an int64 scalar in a graph."""
    return table[k] if isinstance(k, int) else table.index_select(0, k.reshape(1)).squeeze(0)


class KeptKeysValues(nn.Module):
    """Keys and values (..., G, C, hd) rounded to the type of their cache.

    They are rounded *before use*, so that a token reads the same number now and from the cache later.
    """

    # Is told of keys (0) and values (1) before they are rounded: observer(x, which, k, heads).
    observer: Callable[[Tensor, int, int, slice | None], None] | None = None
    kv_scales: Tensor  # (2, K, G) of keys and of values, in an int8 cache: a static scale per loop and head

    def __init__(self, kv_dtype: str, max_loops: int, heads: int) -> None:
        """
        Args:
            kv_dtype: "float32", "float16" or "int8".
            max_loops: K, the trained depth; 1 where the cache is of no loop.
            heads: G, those of all layers together.
        """
        super().__init__()
        self.kv_dtype, self.max_loops, self.kept_heads = kv_dtype, max_loops, heads
        if kv_dtype == "int8":
            self.register_buffer("kv_scales", torch.ones(2, max_loops, heads))

    def keep_in(self, kv_dtype: str) -> None:
        """Round keys and values to another type, a float, from now on."""
        self.kv_dtype = kv_dtype
        if "kv_scales" in self._buffers:  # of an int8 cache
            del self.kv_scales

    def rounded(self, x: Tensor, which: int, k: int | Tensor | None, heads: slice | None = None) -> Tensor:
        """Keys (`which` 0) or values (1) of loop k, (B, G, C, hd), as numbers that the cache can hold.

        With int8, gradients pass the rounding unchanged.

        Args:
            k: None: x is of all loops, (K * B, G, C, hd), loops outermost.
            heads: those of the cache that x is of; None: all.
        """
        if self.observer is not None:
            assert isinstance(k, int)
            self.observer(x, which, k, heads)
        dtype = getattr(torch, self.kv_dtype)
        if x.dtype == dtype:
            return x
        if dtype != torch.int8:
            return x.to(dtype).to(x.dtype)
        scale = self.scale(which, k)
        if heads is not None:
            scale = scale[:, heads]
        if k is None:  # (K, G, 1, 1) -> (K * B, G, 1, 1)
            scale = scale.repeat_interleave(x.shape[0] // scale.shape[0], 0)
        found = (x / scale).round().clamp(-127, 127) * scale
        # Straight through where gradients are asked for; in a graph that would be three more nodes.
        learning = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_exporting()
        return x + (found - x).detach() if learning else found

    def scale(self, which: int, k: int | Tensor | None) -> Tensor:
        """Scales of loop k's keys (0) or values (1), (1, G, 1, 1); with k None those of all loops, (K, G, 1, 1)."""
        scales = self.kv_scales[which]
        return (scales if k is None else table_row(scales, k).unsqueeze(0))[..., None, None]

    def to_cache(self, x: Tensor, which: int) -> Tensor:
        """What the cache stores for `rounded` keys or values of all loops, (K, B, G, C, hd)."""
        if self.kv_dtype != "int8":
            return x.to(getattr(torch, self.kv_dtype))
        return (x / self.scale(which, None).unsqueeze(1)).round().to(torch.int8)

    def from_cache(self, x: Tensor, which: int, k: int | Tensor, dtype: torch.dtype) -> Tensor:
        """Loop k's keys or values (B, G, W, hd) as the cache stores them -> the numbers that were rounded."""
        x = x.to(dtype)
        return x * self.scale(which, k) if self.kv_dtype == "int8" else x
