"""What ONNX packages may be told."""

from __future__ import annotations

from dataclasses import dataclass

from rmse_edge.errors import ArgumentError
from rmse_edge.export.targets import TargetOptions

FUSED, GATHERED = EXPERTS = ("fused", "gathered")


@dataclass(frozen=True)
class OnnxOptions(TargetOptions):
    """Options of the target ONNX. `accuracy_level` is 4 unless given."""

    compact: bool = True  # compute experts of active rows only, in calls of many rows
    # Of every row: "fused", all that it chose in one operator, `MoE` or `QMoE`; "gathered", in operators that every engine has,
    # on a copy of their weights.
    experts: str = FUSED
    # Recurrences and short convolutions as LinearAttention and CausalConvWithState, which ONNX Runtime has from 1.29 on.
    recurrent_operators: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts not in EXPERTS:
            raise ArgumentError("experts", f"got {self.experts!r}, expected {' or '.join(EXPERTS)}")

    @property
    def gathered(self) -> bool:
        return self.experts == GATHERED
