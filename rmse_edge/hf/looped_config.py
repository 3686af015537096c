"""Configurations as Hugging Face's Auto classes know them, one class per `model_type`. Needs transformers, not torch.

One dialect: the fields are those of the architecture's dataclass, taken over name by name, and every instance passes that
dataclass's checks. The config.json of either one is read by the other.
"""

from __future__ import annotations

import dataclasses
import json
from importlib import import_module
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

from rmse_edge.arch.common.published import OF_TRANSFORMERS
from rmse_edge.arch.registry import arch_of

from .known import OWN, text_types

SUFFIX = "PretrainedConfig"
# What transformers writes or adds by itself: no architecture is asked about it, unless it has a field of that name.
THEIRS = (
    OF_TRANSFORMERS | {"model_type", "experts_implementation"} | {f.name for f in dataclasses.fields(PreTrainedConfig)}
)


class _Absent:
    """Of a field that was not given: the dataclass may read it from another key, such as a theta among rope_parameters."""

    def __repr__(self) -> str:
        return "not given"


ABSENT = _Absent()


class LoopedPretrainedConfig(PreTrainedConfig):
    """The configuration of a `LoopedForCausalLM`; the dataclass `arch_config` says what every field means, and its range.

    Raises:
        ConfigError: a value out of range or an unknown key, named.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]
    arch_config: ClassVar[type[Any]]

    # Weights are stored in whatever type and computed with in float32.
    dtype: Any = "float32"

    def __post_init__(self, **kwargs: Any) -> None:
        own = {name: value for name in self.own_fields() if (value := getattr(self, name)) is not ABSENT}
        rest = {key: value for key, value in kwargs.items() if key not in THEIRS and not key.startswith("_")}
        checked = self.arch_config.from_dict(own | rest, str(kwargs.get("name_or_path") or "config"))
        for name in self.own_fields():
            value = getattr(checked, name)
            setattr(self, name, list(value) if isinstance(value, tuple) else value)  # as in JSON
        # Whose code a checkpoint names does not matter: it is not run.
        theirs = {k: v for k, v in kwargs.items() if k in THEIRS or k.startswith("_")}
        for name in ("auto_map", "torch_dtype"):
            theirs.pop(name, None)
        self.dtype = "float32"
        super().__post_init__(**theirs)

    def validate(self) -> None:
        """The checks of `arch_config`, before a save. transformers' own refuse kinds of layers that it lacks, such as Dory's.

        Raises:
            ConfigError: a value that was changed since is out of range.
        """
        self.to_looped()

    @classmethod
    def own_fields(cls) -> list[str]:
        """The names of the architecture's fields."""
        return [f.name for f in dataclasses.fields(cls.arch_config) if f.name != "model_type"]

    def to_looped(self) -> Any:
        """The same configuration as the dataclass that the model is built from.

        Raises:
            ConfigError: a value that was changed since is out of range.
        """
        return self.arch_config(**{name: getattr(self, name) for name in self.own_fields()})

    @classmethod
    def from_looped(cls, config: Any) -> Any:
        return cls(**{name: value for name, value in config.to_dict().items() if name != "model_type"})

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: the config.json of `save_checkpoint`, which any reader of ours takes."""
        return json.loads(self.to_looped().to_json())


def class_name(model_type: str, suffix: str) -> str:
    """
    >>> class_name("huginn_raven", "ForCausalLM")
    'HuginnRavenForCausalLM'
    """
    words = "".join(c if c.isalnum() else " " for c in model_type).split()
    return "".join(word[:1].upper() + word[1:] for word in words) + suffix


def with_fields_of(model_type: str, config: type[Any]) -> type[LoopedPretrainedConfig]:
    """A configuration class with the fields of the dataclass `config`."""
    names = [f.name for f in dataclasses.fields(config) if f.name != "model_type"]
    # They must be fields, not plain attributes: transformers takes those for settings of sampling that are named like them,
    # such as RMS-E's `top_k`, experts per position.
    body = {
        "__module__": __name__,
        "__doc__": f"`{config.__name__}` for transformers; see there for every field, its meaning and its range.",
        "__annotations__": dict.fromkeys(names, Any),
        "model_type": model_type,
        "arch_config": config,
        **dict.fromkeys(names, ABSENT),
    }
    return type(class_name(model_type, SUFFIX), (LoopedPretrainedConfig,), body)


_made: dict[str, type[LoopedPretrainedConfig]] = {}


def config_class(model_type: str) -> type[LoopedPretrainedConfig]:
    """The configuration class of an architecture, the same each time.

    Raises:
        ConfigError: there is no such architecture.
    """
    if model_type in OWN:
        return getattr(import_module(OWN[model_type].config[0], __package__), OWN[model_type].config[1])
    config = arch_of(model_type).config
    if model_type not in _made or _made[model_type].arch_config is not config:  # it may have been registered anew
        _made[model_type] = with_fields_of(model_type, config)
    return _made[model_type]


def __getattr__(name: str) -> Any:
    """The classes by their names, which is how pickle finds them in another process (PEP 562)."""
    if name.endswith(SUFFIX):
        for model_type in text_types():
            if class_name(model_type, SUFFIX) == name:
                return config_class(model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
