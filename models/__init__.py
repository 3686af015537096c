"""The models that come with rmse-edge, in a clone and in a wheel: `rmse-shakespeare`, `ouro-shakespeare`, `trm-sudoku`."""

from __future__ import annotations

from pathlib import Path

from rmse_edge.errors import ArgumentError

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Of all of them."""
    return sorted(file.parent.name for file in FOLDER.glob("*/config.json"))


def shipped(name: str) -> Path:
    """The checkpoint folder of one of them.

    Raises:
        ArgumentError: there is none of that name.
    """
    if name not in names():
        raise ArgumentError("name", f"got {name!r}, expected one of {', '.join(names())}")
    return FOLDER / name
