"""The registry of targets: one file and one decorator each."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from rmse_edge.errors import ArgumentError, UserError, quiet
from rmse_edge.quantize.scheme import BITS

if TYPE_CHECKING:
    from torch import nn

    from rmse_edge.arch.common.quantization import Use
    from rmse_edge.info import ModelInfo
    from rmse_edge.loop.contract import LoopSpec
    from rmse_edge.numbers import KvDtype
    from rmse_edge.quantize import Format, QuantizedTensor

    from .program import LoopProgram, Signature

QUANTIZATIONS = ("fp32", "fp16", "int8", "int4")
ACCURACY_LEVELS = (0, 4)
# What is so of a target that has not got an option which others have.
WITHOUT = {
    "compact": "never computes the experts of stopped rows",
    "experts": "has one form of experts",
    "compute": "packages are the same everywhere",
    "profile_experts": "packages keep no budget of memory for experts; executorch's do",
}


@dataclass(frozen=True)
class TargetOptions:
    """What a target may be told beside the precision. A target that may be told more has a subclass of its own."""

    LEVELS: ClassVar[tuple[int, ...]] = ACCURACY_LEVELS  # that the target has, the last one is the default

    # Activations of int8 and int4 weights: 4 rounds them to int8, 0 computes in float; None: the target's own way.
    accuracy_level: int | None = None

    def __post_init__(self) -> None:
        if self.accuracy_level not in (None, *ACCURACY_LEVELS):
            raise ArgumentError("accuracy_level", f"got {self.accuracy_level}, expected 0 or 4")

    @property
    def level(self) -> int:
        """`accuracy_level`, or the target's own."""
        return self.LEVELS[-1] if self.accuracy_level is None else self.accuracy_level

    @classmethod
    def of(cls, target: str, given: Mapping[str, Any]) -> Self:
        """Options by name, as a command line gives them to any target.

        Raises:
            ArgumentError: the target has no such option, and why.
        """
        for name, value in given.items():
            if name not in {f.name for f in fields(cls)}:
                raise ArgumentError(name, f"{target} {WITHOUT[name]}; leave it out", value)
        return cls(**given)

    def check(self, target: str, quant: str) -> None:
        """Fail where they do not suit a precision.

        Raises:
            ArgumentError: naming the option and the fix.
        """
        if quant not in BITS:
            if self.accuracy_level is not None:
                raise ArgumentError(
                    "accuracy_level", f"quant={quant} has no integers; leave it out", self.accuracy_level
                )
        elif self.level not in self.LEVELS:
            way = "rounds" if 4 in self.LEVELS else "does not round"
            raise ArgumentError(
                "accuracy_level",
                f"{target} {way} the activations of quantised weights to int8 (level {self.LEVELS[-1]}); "
                "leave it out, or export to onnx",
                self.accuracy_level,
            )


@dataclass(frozen=True)
class LowerOptions:
    """What a target may be told."""

    quant: str = "fp32"  # how weights are stored
    tensors: Mapping[str, QuantizedTensor] = field(
        default_factory=dict
    )  # int8 and int4: the integers, by name of the weight
    own: Any = None  # the options of this target alone, of the type `Target.options`; None: as it is by default
    # Where activations are rounded: lower to files that do not round them as well, to prove the integers by the exact rule.
    exact_twin: bool = False
    info: ModelInfo | None = None  # what the manifest is going to say of the model
    scratch: Path | None = None  # a folder with room for files that are gone behind the export; None: the system's own
    idle: bool = False  # a core is left that nothing computes on, see `aside`
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
    options: type[TargetOptions] = TargetOptions
    twins: bool = False  # knows `LowerOptions.exact_twin`
    asymmetric: bool = False  # takes quantised weights with zero points
    scale_bytes: int = 2  # of a quantised weight's scales, as stored
    any_rows: bool = False  # methods with a symbolic number of rows, see `trace`; otherwise all shapes are static
    host_loop: bool = False  # the engine has no loop, see `trace`
    grows: bool = False  # methods take any number of slots of the appended state; otherwise all there are
    drafts: bool = False  # has methods for heads that draft (rmse_edge/layers/mtp.py)
    plans: bool = False  # its hosts know planned loops (rmse_edge/loop/plan.py)
    batches: bool = False  # methods take any number of boards at once, see `trace`; otherwise one
    halves: tuple[str, ...] = ()  # precisions whose packages compute in float16
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
