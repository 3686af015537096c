"""Inkling 2 that also sees: its config.json has the numbers of the text model under `text_config`, and that is what is run.

What is read is an `InklingConfig`, so a checkpoint that is written again is one of `inkling2_loop_text`.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """`ARCH`, on first use."""
    if name != "ARCH":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .entry import ARCH

    return ARCH
