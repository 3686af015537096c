"""RMS-E over whole texts with its own exits."""

from __future__ import annotations

from rmse_edge.loop.course import Stop
from rmse_edge.loop.reading import TrajectoryReader, stop_of

from .model import RMSE


def deployed_exit(model: RMSE) -> Stop | None:
    """The configuration's own exit rules as a `stop` of `RMSE.trajectory`; None where all are off."""
    return stop_of(model.config.dials, lambda h: model.head(h)["logits"])


def reader(model: RMSE) -> TrajectoryReader:
    """Sequences whole, or a segment at once where a memory is written."""
    return TrajectoryReader(model, model.config.dials, model.head_proj)
