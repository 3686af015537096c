"""The registry of targets: one file and one decorator each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from .program import LoopProgram

QUANTIZATIONS = ("fp32", "fp16")


@dataclass(frozen=True)
class LowerOptions:
    """What a target may be told."""

    quant: str = "fp32"  # how weights are stored
    compact: bool = True  # compute experts of active rows only, in calls of many rows
    progress: Callable[[str], None] = lambda _: None


# Lowers a program into files in a folder; returns what the target's runtime needs to know, for the manifest.
Lowering = Callable[["LoopProgram", Path, LowerOptions], dict[str, Any]]

_TARGETS: dict[str, Lowering] = {}


def target(name: str) -> Callable[[Lowering], Lowering]:
    """Register a function as the lowering of target `name`. A second one of the same name is an error."""

    def register(lower: Lowering) -> Lowering:
        if name in _TARGETS:
            raise ValueError(f"target {name!r} is registered twice")
        _TARGETS[name] = lower
        return lower

    return register


def target_names() -> list[str]:
    try:
        from . import onnx  # noqa: F401  (registers itself)
    except ImportError as error:
        if error.name not in ("onnx", "onnxscript"):
            raise
        raise UserError(f"{error.name} is not installed; install it with: pip install 'rmse-edge[onnx]'") from None
    return sorted(_TARGETS)


def get_target(name: str) -> Lowering:
    """The lowering of a target.

    Raises:
        UserError: no such target; the message lists those there are.
    """
    if name not in target_names():
        raise UserError(f"--target: got {name!r}, expected one of {', '.join(target_names())}")
    return _TARGETS[name]
