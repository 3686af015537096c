"""HRM-Text (Sapient): a slow and a fast stack of layers by turns, over a prompt that may see all of itself."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`ARCH`, on first use: its configuration alone needs no PyTorch."""
    if name != "ARCH":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .entry import ARCH

    return ARCH
