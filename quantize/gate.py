"""Exit gate after quantising: shifted states make it brake a little sooner or later, and its bias can undo that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmse_edge.arch.registry import arch_of_model
from rmse_edge.loop.dials import DIALS

from .compare import mean_depth
from .reader import own_dials

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


def recalibrate(reference: Any, model: Any, blocks: Tensor) -> Recalibration | None:
    """Move the bias of `model`'s gate until positions run as many loops on average as in `reference`, in place.

    Args:
        blocks: (n, T) int64.
    Returns:
        What was done; None where the architecture has no gate, or the configuration's is off.
    """
    name = arch_of_model(model).gate_bias(model.config)
    if name is None or not DIALS["exit_threshold"].enables(own_dials(model).exit_threshold):
        return None
    gate = model.get_parameter(name)
    wanted, bias = mean_depth(reference, blocks), gate.detach().clone()

    def depth_at(shift: float) -> float:
        with torch.no_grad():
            gate.copy_(bias + shift)
        return mean_depth(model, blocks)

    before = depth_at(0.0)
    best = (abs(before / wanted - 1), 0.0, before)
    # Of the shifts that were tried: the highest at which positions run too many loops, the lowest at which too few.
    deep, shallow = (0.0, before), (0.0, before)
    step = best[0] if before > wanted else -best[0]  # a higher bias stops earlier
    for _ in range(STEPS):
        if best[0] <= CLOSE:
            break
        if deep[1] > wanted > shallow[1]:  # between them, as if it were a line, and not too near to what is known
            share = (deep[1] - wanted) / (deep[1] - shallow[1])
            shift = deep[0] + (shallow[0] - deep[0]) * min(max(share, 0.1), 0.9)
        else:
            shift = max(-WIDEST, min(WIDEST, (deep if step > 0 else shallow)[0] + step))
            step *= 2
        depth = depth_at(shift)
        deep, shallow = ((shift, depth), shallow) if depth > wanted else (deep, (shift, depth))
        best = min(best, (abs(depth / wanted - 1), shift, depth))
    with torch.no_grad():
        gate.copy_(bias + best[1])
    return Recalibration(wanted, before, best[2], best[1])
