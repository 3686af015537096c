"""The architectures: `config.json`'s `model_type` is the name of a file or folder beside this one, which has an `ARCH`.

What several of them share is in `common`. Other packages add theirs as entry points of the group `rmse_edge.arch`, and
programs with `register`:

    [project.entry-points."rmse_edge.arch"]
    mine = "my_package.mine:ARCH"
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from rmse_edge.errors import ConfigError
from rmse_edge.schema import read_json

if TYPE_CHECKING:
    from torch import nn

    from rmse_edge.loop.contract import LoopModel
    from rmse_edge.loop.course import Reader

    from .common.quantization import QuantTable

GROUP = "rmse_edge.arch"
FIRST = "rmse"  # whose first checkpoints have no model_type: there was no other
NO_ARCHITECTURES = {"common", "registry"}  # of what is in this folder
_REGISTERED: dict[str, Arch] = {}
on_register: list[Callable[[str], None]] = []  # told the name of whatever is registered from then on


class Config(Protocol):
    """What config.json says, checked. A frozen dataclass.

    Of models of texts `vocab_size` is a field of it and, where they are known, `block_size` (positions of one training
    sequence), `bos_token_id`, `eos_token_id` and `pad_token_id`.
    """

    model_type: str

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> Config:
        """
        Raises:
            ConfigError: a key or a value that this architecture does not have.
        """

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON has it, `model_type` left out."""

    def to_json(self) -> str:
        """The text of config.json."""


def none_of_it(config: Any) -> Mapping[str, Any]:
    return {}


def no_gate(config: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Stored:
    """How a published checkpoint holds a tensor of the model: in which of its own tensors, and what to make of these.

    Stored(("model.norm.weight",))                                             under another name
    Stored(("wq.weight",), lambda w: w.T)                                      transposed
    Stored(("qkv.weight",), lambda w: w[:64])                                  as a part of one
    Stored(("gate.weight", "up.weight"), lambda *both: torch.cat(both))        as several

    They are read when their tensor is filled, and kept no longer: the peak is the model and these.
    """

    names: tuple[str, ...]
    # Float32 tensors in the order of `names` -> the tensor; None: it is the first of them.
    make: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Arch:
    """What the rest of the project asks an architecture."""

    config: type[Any]  # a `Config`
    build: Callable[[Any], Any]  # a config -> the `LoopModel`, a `torch.nn.Module` with the attribute `config`
    # A model -> the fields of `rmse_edge.info.ModelInfo` that its spec does not say: dials, text, board, retrieval,
    # loop_weights, once_weights.
    parts: Callable[[Any], dict[str, Any]]
    # How the names of config.json's fields begin that are settings: models that differ in nothing else are the same.
    settings: tuple[str, ...] = ()
    # A config -> tensors that need not be on disk, and whose values they then have.
    tied: Callable[[Any], Mapping[str, str]] = none_of_it
    # A config -> the tensors that its published checkpoints hold otherwise than by the model's own names. A folder with
    # all of the model's own names is read by these. Where there are several ways, they are a list, the model's own names
    # one of them: a folder is read in the way of which it lacks least.
    stored: Callable[[Any], Mapping[str, Stored] | list[Mapping[str, Stored]]] = none_of_it
    # Patterns (`fnmatch`) of names of published tensors that the model does without, such as tables of angles.
    unread: tuple[str, ...] = ()
    # How the names of tensors begin that a model may have beyond the one its training starts from.
    additions: tuple[str, ...] = ()
    # A config -> which tensors are quantised; None: the architecture is not quantised.
    quantization: Callable[[Any], QuantTable] | None = None
    # A model -> what reads whole texts with it, for calibration; None: the calls of hosts do.
    reader: Callable[[Any], Reader] | None = None
    # Whether its models write texts by blocks, not token by token: `ModelInfo.blocks`.
    by_blocks: bool = False
    # Whether iterations of its models are executions of layers, by a plan of each text: `ModelInfo.plan`.
    planned: bool = False
    # Whether rmse-train knows it: its models are `HasTrajectory` (rmse_edge/loop/reading.py).
    trains: bool = False
    # A config -> the name of the exit gate's bias; None: the model has no gate. It is trained last and alone, it decides
    # how soon positions stop, and quantising moves it. The gate is a linear layer.
    gate_bias: Callable[[Any], str | None] = no_gate
    # A config -> fields of `ModelInfo` by their dotted names, such as "text.vocab_size", that a manifest of it must have.
    stated: Callable[[Any], Mapping[str, Any]] = none_of_it


def register(model_type: str, arch: Arch) -> None:
    """Make an architecture known to this process, in place of one of the same name."""
    _REGISTERED[model_type] = arch
    for tell in on_register:
        tell(model_type)


@lru_cache(maxsize=1)
def _entries(path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    """What the packages of `path` add. Finding it reads a file of every installed package, and every verb asks often."""
    return {entry.name: entry for entry in reversed(tuple(entry_points(group=GROUP)))}  # the first of a name counts


def model_types() -> list[str]:
    """The names of all architectures there are."""
    package = import_module(__package__)
    own = {m.name for m in pkgutil.iter_modules(package.__path__)} - NO_ARCHITECTURES
    return sorted(own | set(_REGISTERED) | set(_entries(tuple(sys.path))))


def arch_of(model_type: str, where: str = "config") -> Arch:
    """The architecture of this name.

    Raises:
        ConfigError: there is none; the message begins with `where` and lists those there are.
    """
    if isinstance(model_type, str) and model_type in _REGISTERED:  # a file may say anything
        return _REGISTERED[model_type]
    known = model_types()
    if model_type not in known:
        raise ConfigError(f"{where}: model_type: got {model_type!r}, expected one of {', '.join(known)}")
    entry = _entries(tuple(sys.path)).get(model_type)
    return entry.load() if entry else import_module(f".{model_type}", __package__).ARCH


def read_config(path: str | Path) -> Any:
    """The configuration in a config.json, of the architecture that its `model_type` names.

    The first checkpoints of RMS-E have no `model_type`: a file without one is read as theirs if it has only keys of theirs.

    Raises:
        ConfigError: one line that names the file: it is missing or no JSON object, its architecture is not known, or a
            key or a value is not what this expects.
    """
    try:
        values = read_json(Path(path), ConfigError)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected the config.json of a model") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object of configuration keys")
    if "model_type" not in values:
        first = arch_of(FIRST)
        theirs = {f.name for f in fields(first.config)}
        if unknown := sorted(key for key in values if key not in theirs and not key.startswith("_")):
            raise ConfigError(
                f"{path}: model_type is missing, expected one of {', '.join(model_types())}; {unknown[0]!r} is no key of "
                f"{FIRST}, which may leave it out"
            )
        return first.config.from_dict(values, where=str(path))
    return arch_of(values["model_type"], str(path)).config.from_dict(values, where=str(path))


def arch_of_model(model: nn.Module | LoopModel) -> Arch:
    """The architecture of a model."""
    return arch_of(cast(Any, model).config.model_type)
