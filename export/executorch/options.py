"""What ExecuTorch packages may be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rmse_edge.export.targets import TargetOptions


@dataclass(frozen=True)
class ExecutorchOptions(TargetOptions):
    """Options of the target ExecuTorch: the kernels round activations."""

    LEVELS: ClassVar[tuple[int, ...]] = (4,)
