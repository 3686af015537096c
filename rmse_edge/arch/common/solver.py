"""What the rest of the project asks recursive solvers. Hosts of packages ask too, so PyTorch is imported where a model is made."""

from __future__ import annotations

from typing import Any

from rmse_edge.arch.registry import Arch

from .recursive import RecursiveConfig, parts, stated, stored, table


def build(config: RecursiveConfig) -> Any:
    from .recursive_model import RecursiveSolver

    return RecursiveSolver(config)


def solver(config: type[RecursiveConfig]) -> Arch:
    """Of one whose files have this configuration."""
    return Arch(
        config, build, parts, settings=config.settings, stored=stored, quantization=table, trains=True, stated=stated
    )
