"""What ONNX packages may be told."""

from __future__ import annotations

from dataclasses import dataclass

from rmse_edge.export.targets import TargetOptions


@dataclass(frozen=True)
class OnnxOptions(TargetOptions):
    """Options of the target ONNX. `accuracy_level` is 4 unless given."""

    compact: bool = True  # compute experts of active rows only, in calls of many rows
    # Recurrences and short convolutions as LinearAttention and CausalConvWithState, which ONNX Runtime has from 1.29 on.
    recurrent_operators: bool = True
