"""Hierarchical Reasoning Models: a slow network H and a fast one L by turns (Wang et al. 2025, arXiv 2506.21734)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rmse_edge.numbers import Loops, Some

from .common import recursive
from .common.solver import solver


@dataclass(frozen=True)
class HrmConfig(recursive.RecursiveConfig):
    """The published settings."""

    model_type: ClassVar[str] = "hrm"
    halting = "q"

    H_cycles: Loops = 2
    L_cycles: Loops = 2
    H_layers: Some = 4
    L_layers: Loops = 4
    gradient: Literal["cycle", "step", "full"] = "step"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.H_layers > 0, "H_layers", "at least 1")

    @property
    def two_networks(self) -> bool:
        return True


ARCH = solver(HrmConfig)
