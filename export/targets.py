"""The registry of targets: one file and one decorator each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmse_edge.errors import ArgumentError, UserError, quiet

if TYPE_CHECKING:
    from torch import nn

    from rmse_edge.arch.quantization import Use
    from rmse_edge.info import ModelInfo
    from rmse_edge.loop.contract import LoopSpec
    from rmse_edge.numbers import KvDtype
    from rmse_edge.quantize import Format, QuantizedTensor

    from .program import LoopProgram, Signature

QUANTIZATIONS = ("fp32", "fp16", "int8", "int4")
ACCURACY_LEVELS = (0, 4)


@dataclass(frozen=True)
class LowerOptions:
    """What a target may be told."""

    quant: str = "fp32"  # how weights are stored
    # int8 and int4: the integers, by name of the weight; the program was traced with what they stand for.
    tensors: Mapping[str, QuantizedTensor] = field(default_factory=dict)
    accuracy_level: int = 4  # activations of quantised weights: 4 rounds them to int8, 0 computes in float32
    exact_twin: bool = False  # at level 4: lower a second time at level 0, to prove the integers by the exact rule
    compact: bool = True  # compute experts of active rows only, in calls of many rows
    compute: str | None = None  # what the program is laid out for, one of `Target.computes`
    info: ModelInfo | None = None  # what the manifest is going to say of the model
    progress: Callable[[str], None] = lambda _: None


# Lowers a program into files in a folder; returns what the target's runtime needs to know, for the manifest.
Lowering = Callable[["LoopProgram", Path, LowerOptions], dict[str, Any]]
# Fails with an ExportError where a target has no form for a weight: its name, its format, its number of inputs, its use.
CheckFormat = Callable[[str, "Format", int, "Use"], None]
# What a target makes of the model before it is traced; the model given stays as it is.
Prepare = Callable[["nn.Module", LowerOptions], "nn.Module"]
# The type in which a package stores keys and values: of its precision, and of the model's own cache.
CacheType = Callable[[str, "KvDtype"], "KvDtype"]
# What a package's methods take and give, by name: of a spec, and the package's precision.
Signatures = Callable[["LoopSpec", str], Mapping[str, "Signature"]]


@dataclass(frozen=True)
class Target:
    """A lowering and the kind of program it wants."""

    lower: Lowering
    quants: tuple[str, ...] = QUANTIZATIONS  # how it can store weights
    # Of quantised weights' activations, see `LowerOptions`; the last one is the default.
    accuracy_levels: tuple[int, ...] = ACCURACY_LEVELS
    asymmetric: bool = False  # takes quantised weights with zero points
    scale_bytes: int = 2  # of a quantised weight's scales, as stored
    compacts: bool = False  # knows `LowerOptions.compact`; others never compute the experts of stopped rows
    any_rows: bool = False  # methods with a symbolic number of rows, see `trace`; otherwise all shapes are static
    host_loop: bool = False  # the engine has no loop, see `trace`
    grows: bool = False  # methods take any number of slots of the appended state; otherwise all there are
    halves: tuple[str, ...] = ()  # precisions whose packages compute in float16
    # Values of `LowerOptions.compute`, the first is the default, each with the precisions that it has.
    computes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Stages of a lowering, for people who wait: how their names begin, and what each costs per method (seconds, roughly).
    stages: tuple[tuple[str, float], ...] = (("lowering", 1.0),)
    positions: int | None = None  # compared by the parity gate at most; None: as many as the rule says
    check_format: CheckFormat | None = None
    prepare: Prepare | None = None
    cache: CacheType | None = None  # None: as the model's
    signatures: Signatures | None = None  # None: those of the program's methods


# Where a target lives, and the packages whose absence it reports. Others register themselves when imported.
MODULES = {"coreml": ("coremltools",), "executorch": ("executorch", "torchao"), "onnx": ("onnx", "onnxscript")}
_TARGETS: dict[str, Target] = {}


def target(name: str, **kind: Any) -> Callable[[Lowering], Lowering]:
    """Register a function as the lowering of target `name`; `kind` are the fields of `Target`.

    A second one of the same name is an error.
    """

    def register(lower: Lowering) -> Lowering:
        if name in _TARGETS:
            raise ValueError(f"target {name!r} is registered twice")
        _TARGETS[name] = Target(lower, **kind)
        return lower

    return register


def target_names() -> list[str]:
    return sorted({*MODULES, *_TARGETS})


def get_target(name: str) -> Target:
    """The target of this name.

    Raises:
        UserError: no such target, the message lists those there are; or the packages it needs are not installed.
    """
    if name not in target_names():
        raise ArgumentError("target", f"got {name!r}, expected one of {', '.join(target_names())}")
    if name not in _TARGETS:
        try:
            with quiet():
                importlib.import_module(f".{name}.lower", __package__)  # registers itself
        except ImportError as error:
            if (error.name or "").split(".")[0] not in MODULES[name]:
                raise
            raise UserError(
                f"{error.name} is not installed; install it with: pip install 'rmse-edge[{name}]'"
            ) from None
    return _TARGETS[name]
