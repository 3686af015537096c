"""Ouro, or LoopLM (Zhu et al. 2025, arXiv 2510.25741): a dense stack applied four times, with a gate that may stop it."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`ARCH`, on first use: its configuration alone needs no PyTorch."""
    if name != "ARCH":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .entry import ARCH

    return ARCH
