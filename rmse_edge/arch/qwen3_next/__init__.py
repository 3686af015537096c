"""Qwen3-Next (Qwen team 2025): three layers of Gated DeltaNet for one of gated attention, and sparse experts in each."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`ARCH`, on first use: its configuration alone needs no PyTorch."""
    if name != "ARCH":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .entry import ARCH

    return ARCH
