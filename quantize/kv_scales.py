"""An int8 cache for a model of texts: a static scale per loop and head for keys, and one for values.

Scales come from the largest number seen in calibration. They cost nothing at run time and make prefill and decode round
alike; values beyond the range are clipped. Positions that have stopped supply keys and values to deeper loops, so the text is
read at full depth and, where an exit rule is on, with the model's own exits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rmse_edge.errors import ArgumentError
from rmse_edge.layers.cache import KeptKeysValues, caches_of, with_cache_dtype

from .reader import reader_of

BATCH = 32  # sequences run at once
HEADROOM = 1.05  # over the largest value seen


def with_int8_cache(model: Any, blocks: Tensor, progress: Callable[[int], object] = lambda _: None) -> Any:
    """A copy of `model` with an int8 cache, whose scales are those of the texts `blocks` (n, T) int64.

    Raises:
        ArgumentError: keys or values are not numbers.
        UserError: there is no way to read texts with this model.
    """
    found = kv_scales(with_cache_dtype(model, "float32"), blocks, progress)
    changed = with_cache_dtype(model, "int8")
    changed = copy.deepcopy(model) if changed is model else changed
    for path, cache in caches_of(changed).items():
        cache.kv_scales.copy_(found[path])
    return changed


@torch.no_grad()
def kv_scales(model: Any, blocks: Tensor, progress: Callable[[int], object] = lambda _: None) -> Mapping[str, Tensor]:
    """Scales for each cache of a model that keeps floats: its path -> (2, K, G), of keys and of values.

    Args:
        blocks: (n, T) int64 tokens, each row from an empty past.
    Raises:
        ArgumentError: keys or values are not numbers.
        UserError: there is no way to read texts with this model.
    """
    caches, reader = caches_of(model), reader_of(model)
    largest = {path: torch.zeros(2, cache.max_loops, cache.kept_heads) for path, cache in caches.items()}
    loops = model.spec(model.call_sizes()[0]).max_loops
    with ExitStack() as watching:
        for path, cache in caches.items():
            watching.callback(setattr, cache, "observer", cache.observer)
            cache.observer = partial(_keep, largest[path])
        for part in blocks.split(BATCH):
            reader.read(part, loops=loops, every=False)
            if reader.exits:
                reader.read(part, stop=True, every=False)
            progress(part.numel())
    return {path: _scales(largest[path], cache) for path, cache in caches.items()}


def _keep(largest: Tensor, x: Tensor, which: int, k: int, heads: slice | None) -> None:
    """Keep in `largest` (2, K, G) the largest of keys or values (B, G, C, hd)."""
    of_loop = largest[which, k] if heads is None else largest[which, k, heads]
    of_loop.copy_(torch.maximum(of_loop, x.abs().amax((0, 2, 3))))


def _scales(largest: Tensor, cache: KeptKeysValues) -> Tensor:
    if not bool(torch.isfinite(largest).all()):
        raise ArgumentError(
            "kv", "keys or values hold NaN or Inf on the calibration text; the checkpoint diverges there", "int8"
        )
    if cache.shares_scales:
        largest = largest.amax(1, keepdim=True).expand_as(largest)
    return (largest * HEADROOM / 127).clamp_min(1e-8)
