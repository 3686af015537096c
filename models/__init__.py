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


def or_shipped(given: str | Path) -> Path:
    """A path as it is given; where nothing is there, the folder of the shipped model that it names: `rmse-shakespeare`, or
    `models/rmse-shakespeare`, as it is called in a clone.
    """
    path = Path(given).expanduser()
    name = path.as_posix().removeprefix("models/")
    return FOLDER / name if not path.exists() and name in names() else path
