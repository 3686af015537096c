"""The architectures: `config.json`'s `model_type` is the name of a file or folder beside this one, which has an `ARCH`.

Other packages add theirs as entry points of the group `rmse_edge.arch`, and programs with `register`:

    [project.entry-points."rmse_edge.arch"]
    mine = "my_package.mine:ARCH"
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from rmse_edge.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from rmse_edge.loop.contract import LoopModel

GROUP = "rmse_edge.arch"
KvDtype = Literal["float32", "float16", "int8"]
_REGISTERED: dict[str, Arch] = {}


class Config(Protocol):
    """What config.json says, checked. Usually a frozen dataclass."""

    model_type: str

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> Config:
        """
        Raises:
            ConfigError: a key or a value that this architecture does not have.
        """

    @classmethod
    def from_file(cls, path: str | Path) -> Config:
        """Of a config.json; raises as `from_dict`."""

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON has it, `model_type` left out."""

    def to_json(self) -> str:
        """The text of config.json."""


def none_of_it(config: Any) -> Mapping[str, Any]:
    return {}


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
    # A model -> the type in which it keeps keys and values; a model and such a type -> itself, or a copy that uses it.
    cache_dtype: Callable[[Any], KvDtype] = lambda model: "float32"
    with_cache_dtype: Callable[[Any, KvDtype], Any] = lambda model, dtype: model
    # A config -> fields of `ModelInfo` by their dotted names, such as "text.vocab_size", that a manifest of it must have.
    stated: Callable[[Any], Mapping[str, Any]] = none_of_it
    # A model -> what beside weights and config tells it from others, for its fingerprint.
    salt: Callable[[Any], bytes] = lambda model: b""


def register(model_type: str, arch: Arch) -> None:
    """Make an architecture known to this process, in place of one of the same name."""
    _REGISTERED[model_type] = arch


def model_types() -> list[str]:
    """The names of all architectures there are."""
    package = import_module(__package__)
    own = {m.name for m in pkgutil.iter_modules(package.__path__)} - {"registry", "identity"}
    return sorted(own | set(_REGISTERED) | {entry.name for entry in entry_points(group=GROUP)})


def arch_of(model_type: str, where: str = "config") -> Arch:
    """The architecture of this name.

    Raises:
        ConfigError: there is none; the message begins with `where` and lists those there are.
    """
    if model_type in _REGISTERED:
        return _REGISTERED[model_type]
    known = model_types()
    if model_type not in known:
        raise ConfigError(f"{where}: model_type: got {model_type!r}, expected one of {', '.join(known)}")
    entries = [entry for entry in entry_points(group=GROUP) if entry.name == model_type]
    return entries[0].load() if entries else import_module(f".{model_type}", __package__).ARCH


def arch_of_model(model: nn.Module | LoopModel) -> Arch:
    """The architecture of a model."""
    return arch_of(cast(Any, model).config.model_type)
