"""Dr.LLM (Heakl et al. 2025, arXiv 2510.12773): layers of a frozen model that a prompt's routers skip, run or repeat."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`ARCH`, on first use: its configuration alone needs no PyTorch."""
    if name != "ARCH":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .entry import ARCH

    return ARCH
