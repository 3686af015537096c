"""The type in which keys and values are kept, and rounding to it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rmse_edge.numbers import KvDtype


def table_row(table: Tensor, k: int | Tensor) -> Tensor:
    """Row k of a per-loop table (K, ...): k is a Python int when the loop is unrolled, an int64 scalar in a graph."""
    return table[k] if isinstance(k, int) else table.index_select(0, k.reshape(1)).squeeze(0)


class KeptKeysValues(nn.Module):
    """Keys and values (..., G, C, hd) rounded to the type of their cache.

    They are rounded *before use*, so that a token reads the same number now and from the cache later.
    """

    # Is told of keys (0) and values (1) of loop k before they are rounded: observer(x (B, G, C, hd), which, k, heads).
    observer: Callable[[Tensor, int, int, slice | None], None] | None = None
    kv_scales: Tensor  # (2, K, G) of keys and of values, in an int8 cache: a static scale per loop and head

    def __init__(self, kv_dtype: KvDtype, max_loops: int, heads: int, shares_scales: bool = False) -> None:
        """
        Args:
            max_loops: K, as many as may be asked for; 1 where the cache is of no loop.
            heads: G, those of all layers together.
            shares_scales: one loop may be given what another has rounded: calibration finds the same scales for all.
        """
        super().__init__()
        self.max_loops, self.kept_heads, self.shares_scales = max_loops, heads, shares_scales
        self.keep_in(kv_dtype)

    def keep_in(self, kv_dtype: KvDtype) -> None:
        """Round keys and values to this type from now on; to int8 by scales that calibration is to find."""
        self.kv_dtype = kv_dtype
        if kv_dtype == "int8":
            self.register_buffer("kv_scales", torch.ones(2, self.max_loops, self.kept_heads))
        elif "kv_scales" in self._buffers:
            del self.kv_scales

    def rounded(self, x: Tensor, which: int, k: int | Tensor | None, heads: slice | None = None) -> Tensor:
        """Keys (`which` 0) or values (1) of loop k, (B, G, C, hd), as numbers that the cache can hold.

        With int8, gradients pass the rounding unchanged.

        Args:
            k: None: x is of all loops, (K * B, G, C, hd), loops outermost; the observer is not told.
            heads: those of the cache that x is of; None: all.
        """
        if self.observer is not None and k is not None:
            self.observer(x, which, int(k), heads)
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
        found = (x / self.scale(which, None).unsqueeze(1)).round()
        return found.clamp(-127, 127).to(torch.int8)  # what another loop has rounded may be beyond this one's range

    def from_cache(self, x: Tensor, which: int, k: int | Tensor, dtype: torch.dtype) -> Tensor:
        """Loop k's keys or values (B, G, W, hd) as the cache stores them -> the numbers that were rounded."""
        x = x.to(dtype)
        return x * self.scale(which, k) if self.kv_dtype == "int8" else x


def caches_of(model: Any) -> dict[str, KeptKeysValues]:
    """What rounds the keys and values of a model whose configuration names their type, `kv_dtype`: by path."""
    if not hasattr(model.config, "kv_dtype"):
        return {}
    return {path: module for path, module in model.named_modules() if isinstance(module, KeptKeysValues)}


def cache_dtype(model: Any) -> KvDtype:
    """The type in which a model keeps keys and values; "float32" where there is no choice."""
    return next((cache.kv_dtype for cache in caches_of(model).values()), "float32")


def with_cache_dtype(model: Any, dtype: KvDtype) -> Any:
    """The model itself, or a copy that keeps keys and values in another type; in int8 its scales are yet to be found.

    The model itself also where its architecture has no such choice.
    """
    if dtype == cache_dtype(model) or not caches_of(model):
        return model
    twin = copy.deepcopy(model)
    twin.config = dataclasses.replace(model.config, kv_dtype=dtype)
    for cache in caches_of(twin).values():
        cache.keep_in(dtype)
    return twin


def scales_of(model: Any) -> bytes:
    """Tells int8 caches of different scales apart, of which one could be read as the other; empty for other types."""
    kept = [cache.kv_scales for cache in caches_of(model).values() if cache.kv_dtype == "int8"]
    return b"".join(scales.cpu().numpy().tobytes() for scales in kept)
