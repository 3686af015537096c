"""What ExecuTorch packages may be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rmse_edge.errors import ArgumentError
from rmse_edge.export.targets import TargetOptions
from rmse_edge.quantize.scheme import BITS

if TYPE_CHECKING:
    from .placement import ExpertProfile


@dataclass(frozen=True)
class ExecutorchOptions(TargetOptions):
    """Options of the target ExecuTorch: the kernels round activations."""

    LEVELS: ClassVar[tuple[int, ...]] = (4,)

    profile_experts: ExpertProfile | None = None  # lays out experts in the file; None: by their numbers

    def check(self, target: str, quant: str) -> None:
        super().check(target, quant)
        if self.profile_experts is not None and quant not in BITS:
            raise ArgumentError(
                "profile_experts",
                f"quant={quant} has no experts that are read one by one; export to int8 or int4",
                self.profile_experts.digest,
            )
