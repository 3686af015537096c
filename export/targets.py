"""The registry of targets: one file and one decorator each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..quantize import QuantizedTensor
    from .program import LoopProgram

QUANTIZATIONS = ("fp32", "fp16", "int8", "int4")


@dataclass(frozen=True)
class LowerOptions:
    """What a target may be told."""

    quant: str = "fp32"  # how weights are stored
    # int8 and int4: the integers, by name of the weight; the program was traced with what they stand for.
    tensors: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    accuracy_level: int = 4  # activations of quantised weights: 4 rounds them to int8, 0 computes in float32
    exact_twin: bool = False  # lower a second time with float activations, to prove the integers by the exact rule
    compact: bool = True  # compute experts of active rows only, in calls of many rows
    progress: Callable[[str], None] = lambda _: None


# Lowers a program into files in a folder; returns what the target's runtime needs to know, for the manifest.
Lowering = Callable[["LoopProgram", Path, LowerOptions], dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """A lowering and the kind of program it wants."""

    lower: Lowering
    asymmetric: bool  # takes quantised weights with zero points
    any_rows: bool  # methods with a symbolic number of rows, see `trace`; otherwise all shapes are static


_TARGETS: dict[str, Target] = {}


def target(name: str, any_rows: bool = False, asymmetric: bool = False) -> Callable[[Lowering], Lowering]:
    """Register a function as the lowering of target `name`. A second one of the same name is an error.

    Args:
        any_rows: it lowers methods that serve calls of several sizes.
        asymmetric: it takes quantised weights with zero points.
    """

    def register(lower: Lowering) -> Lowering:
        if name in _TARGETS:
            raise ValueError(f"target {name!r} is registered twice")
        _TARGETS[name] = Target(lower, asymmetric, any_rows)
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


def get_target(name: str) -> Target:
    """The target of this name.

    Raises:
        UserError: no such target; the message lists those there are.
    """
    if name not in target_names():
        raise UserError(f"--target: got {name!r}, expected one of {', '.join(target_names())}")
    return _TARGETS[name]
