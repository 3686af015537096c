"""Scales of an int8 KV cache: one per loop and head for keys and one for values, from the largest seen in calibration.

Static scales cost nothing at run time and make prefill and decode round alike. Keys are normed before they are stored, so
their range hardly depends on the text; values beyond the range are clipped. Positions that stopped supply keys and values
to all deeper loops from the state they stopped with, so the text is read at full depth and with the model's own exits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.errors import ArgumentError

from .compare import deployed_exit

BATCH = 32  # sequences run at once
HEADROOM = 1.05  # over the largest value seen


@torch.no_grad()
def kv_scales(model: RMSE, blocks: Tensor, progress: Callable[[int], object] = lambda _: None) -> Tensor:
    """Scales for `block.attention.kv_scales` of a model with a float KV cache: (2, K, G).

    Args:
        blocks: (n, T) int64 tokens, each row from an empty past.
    Raises:
        UserError: keys or values are not numbers.
    """
    config = model.config
    largest = torch.zeros(2, config.max_loops, config.n_kv_heads)

    def keep(block: nn.Module, args: tuple, result: tuple[Tensor, Tensor, Tensor]) -> None:
        for which, x in enumerate(result[1:]):  # (B, G, C, hd)
            largest[which, int(args[1])] = torch.maximum(largest[which, int(args[1])], x.abs().amax((0, 2, 3)))

    stop = deployed_exit(model)
    handle = model.block.register_forward_hook(keep)
    try:
        for part in blocks.split(BATCH):
            model.trajectory(part, every=False)
            if stop is not None:
                model.trajectory(part, stop=stop, every=False)
            progress(part.numel())
    finally:
        handle.remove()
    if not bool(torch.isfinite(largest).all()):
        raise ArgumentError(
            "kv", "keys or values hold NaN or Inf on the calibration text; the checkpoint diverges there", "int8"
        )
    return (largest * HEADROOM / 127).clamp_min(1e-8)
