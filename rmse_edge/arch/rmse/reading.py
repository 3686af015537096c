"""RMS-E over whole texts with its own exits, and an int8 cache with scales that suit a text."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rmse_edge.arch import int8_cache
from rmse_edge.loop.course import Stop
from rmse_edge.loop.reading import TrajectoryReader, stop_of

from .model import RMSE

CACHE = "block.attention"  # which rounds keys and values


def deployed_exit(model: RMSE) -> Stop | None:
    """The configuration's own exit rules as a `stop` of `RMSE.trajectory`; None where all are off."""
    return stop_of(model.config.dials, lambda h: model.head(h)["logits"])


def reader(model: RMSE) -> TrajectoryReader:
    """Sequences whole, or a segment at once where a memory is written."""
    return TrajectoryReader(model, model.config.dials, model.head_proj)


def with_int8_cache(model: RMSE, blocks: Tensor, progress: Callable[[int], object] = lambda _: None) -> RMSE:
    """A copy with an int8 cache, whose scales are those of the texts `blocks` (n, T)."""
    return int8_cache.calibrated(model, CACHE, blocks, progress)


def kv_scales(model: RMSE, blocks: Tensor) -> Tensor:
    """Scales for `block.attention.kv_scales` of a model with a float KV cache: (2, K, G)."""
    return int8_cache.kv_scales(reader(model), model.block.attention, blocks)
