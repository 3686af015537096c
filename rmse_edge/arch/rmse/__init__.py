"""RMS-E: one block of 512 experts, a neural memory and retrieval, applied until it is sure."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`ARCH`, on first use: its configuration alone needs no PyTorch."""
    if name != "ARCH":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .entry import ARCH

    return ARCH
