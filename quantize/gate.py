"""Exit gate after quantising: shifted states make it brake a little sooner or later, and its bias can undo that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rmse_edge.arch.rmse.model import RMSE

from .compare import deployed_exit, mean_depth

CLOSE = 0.002  # relative difference of the mean depth that is good enough
WIDEST = 1.0  # logit that the bias may move
STEPS = 8


@dataclass(frozen=True)
class Recalibration:
    """Mean depths on the calibration text."""

    wanted: float  # of the float model
    before: float
    after: float
    shift: float  # of the gate's bias, logits


def recalibrate(reference: RMSE, model: RMSE, blocks: Tensor) -> Recalibration | None:
    """Move the bias of `model`'s gate until positions run as many loops on average as in `reference`, in place.

    Args:
        blocks: (n, T) int64.
    Returns:
        What was done; None where the configuration's gate is off.
    """
    own = deployed_exit(reference)
    stop = deployed_exit(model)
    if own is None or stop is None or model.config.exit_threshold >= 1:
        return None
    wanted, bias = mean_depth(reference, blocks, own), model.gate.bias.detach().clone()

    def depth_at(shift: float) -> float:
        with torch.no_grad():
            model.gate.bias.copy_(bias + shift)
        return mean_depth(model, blocks, stop)

    before = depth = depth_at(0.0)
    best = (abs(before / wanted - 1), 0.0, before)
    low, high = (-WIDEST, 0.0) if depth < wanted else (0.0, WIDEST)  # a higher bias stops earlier
    for _ in range(STEPS):
        if best[0] <= CLOSE:
            break
        shift = (low + high) / 2
        depth = depth_at(shift)
        low, high = (shift, high) if depth > wanted else (low, shift)
        best = min(best, (abs(depth / wanted - 1), shift, depth))
    with torch.no_grad():
        model.gate.bias.copy_(bias + best[1])
    return Recalibration(wanted, before, best[2], best[1])
