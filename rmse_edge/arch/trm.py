"""Tiny Recursive Models: one small network that refines an answer and a latent (Jolicoeur-Martineau 2025, arXiv 2510.04871)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rmse_edge.numbers import Some

from .common import recursive
from .common.solver import solver


@dataclass(frozen=True)
class TrmConfig(recursive.RecursiveConfig):
    """The published settings; H is the network of L, whatever `H_layers` says, unless `separate_H` asks for one of its own."""

    model_type: ClassVar[str] = "trm"
    halting = "solved"
    only = {"no_ACT_continue": (True,)}

    puzzle_emb_len: Some = 16
    separate_H: bool = False  # no published key: the paper's comparison of one network with two

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(not self.separate_H or self.H_layers > 0, "H_layers", "at least 1, since separate_H is on")

    @property
    def two_networks(self) -> bool:
        return self.separate_H


ARCH = solver(TrmConfig)
