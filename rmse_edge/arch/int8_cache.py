"""An int8 cache for a model of which a text is read: a static scale per loop and head for keys, and one for values.

Scales come from the largest number seen in calibration. They cost nothing at run time and make prefill and decode round
alike; values beyond the range are clipped. Positions that have stopped supply keys and values to deeper loops, so the text is
read at full depth and, where an exit rule is on, with the model's own exits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rmse_edge.arch.registry import arch_of_model
from rmse_edge.errors import ArgumentError
from rmse_edge.layers.cache import KeptKeysValues
from rmse_edge.loop.course import Reader

BATCH = 32  # sequences run at once
HEADROOM = 1.05  # over the largest value seen


def calibrated(
    model: Any, path: str, blocks: Tensor, progress: Callable[[int], object] = lambda _: None, shared: bool = False
) -> Any:
    """A copy of `model` with an int8 cache, whose scales are those of the texts `blocks` (n, T).

    Args:
        path: of the model's `KeptKeysValues` among its modules. The configuration calls the cache's type `kv_dtype`.
        shared: one scale per head for all loops.
    """
    arch, name = arch_of_model(model), f"{path}.kv_scales"
    state = {key: tensor for key, tensor in model.state_dict().items() if key != name}
    exact, changed = (arch.build(dataclasses.replace(model.config, kv_dtype=kv)).eval() for kv in ("float32", "int8"))
    exact.load_state_dict(state)
    assert arch.reader is not None
    scales = kv_scales(arch.reader(exact), exact.get_submodule(path), blocks, progress)
    if shared:
        scales = scales.amax(1, keepdim=True).expand_as(scales).contiguous()
    changed.load_state_dict(state | {name: scales})
    return changed


@torch.no_grad()
def kv_scales(
    reader: Reader, cache: KeptKeysValues, blocks: Tensor, progress: Callable[[int], object] = lambda _: None
) -> Tensor:
    """Scales for `kv_scales` of the cache of a model that keeps floats: (2, K, G).

    Args:
        reader: of the model.
        blocks: (n, T) int64 tokens, each row from an empty past.
    Raises:
        ArgumentError: keys or values are not numbers.
    """
    largest = torch.zeros(2, cache.max_loops, cache.kept_heads)

    def keep(x: Tensor, which: int, k: int, heads: slice | None) -> None:
        of_loop = largest[which, k] if heads is None else largest[which, k, heads]
        of_loop.copy_(torch.maximum(of_loop, x.abs().amax((0, 2, 3))))  # (B, G, C, hd)

    cache.observer = keep
    try:
        for part in blocks.split(BATCH):
            reader.read(part, loops=cache.max_loops, every=False)
            if reader.exits:
                reader.read(part, stop=True, every=False)
            progress(part.numel())
    finally:
        cache.observer = None
    if not bool(torch.isfinite(largest).all()):
        raise ArgumentError(
            "kv", "keys or values hold NaN or Inf on the calibration text; the checkpoint diverges there", "int8"
        )
    return (largest * HEADROOM / 127).clamp_min(1e-8)
