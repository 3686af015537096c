"""What a looped model says of itself, whatever runs it."""

from __future__ import annotations

from typing import Any

from rmse_edge.info import ModelInfo
from rmse_edge.runtimes.measure.bench import WEIGHT_BYTES


def facts_of(info: ModelInfo) -> dict[str, Any]:
    """Its parameters, and the bytes of weights that a token multiplies with: in each loop, and once."""
    held = WEIGHT_BYTES[info.quant]
    weights = {"loop": round(held * info.loop_weights), "once": round(held * info.once_weights)}
    return {"weights": weights, "parameters": info.parameters}
