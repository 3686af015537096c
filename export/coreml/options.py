"""What Core ML packages may be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from rmse_edge.errors import ArgumentError
from rmse_edge.export.targets import QUANTIZATIONS, TargetOptions


@dataclass(frozen=True)
class CoremlOptions(TargetOptions):
    """Options of the target Core ML, which does not round activations to int8."""

    LEVELS: ClassVar[tuple[int, ...]] = (0,)
    # Values of `compute`, each with the precisions that it has.
    COMPUTES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "cpu": QUANTIZATIONS, "gpu": QUANTIZATIONS, "ane": ("fp16", "int8", "int4"),
    }  # fmt: skip

    compute: str = "cpu"  # what the program is laid out for: the CPU, the GPU or the Neural Engine

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compute not in self.COMPUTES:
            raise ArgumentError("compute", f"got {self.compute!r}, expected one of {', '.join(self.COMPUTES)}")

    def check(self, target: str, quant: str) -> None:
        super().check(target, quant)
        if quant not in self.COMPUTES[self.compute]:
            having = ", ".join(self.COMPUTES[self.compute])
            raise ArgumentError("compute", f"has no {quant}; export with quant={having}", self.compute)
