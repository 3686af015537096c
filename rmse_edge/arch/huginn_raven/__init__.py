"""Huginn, or raven (Geiping et al. 2025, arXiv 2502.05171): a recurrent block between a prelude and a coda, applied 32 times."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`ARCH`, on first use: its configuration alone needs no PyTorch."""
    if name != "ARCH":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .entry import ARCH

    return ARCH
