"""Configurations that others have published: which of their keys mean something here, and which must have one value.

A `config.json` of a published model holds settings of its own code beside the numbers that define the model. Each such key
is named, so that a setting which would change the computation is an error and never passed over.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from rmse_edge.errors import ConfigError
from rmse_edge.schema import first_of, read_json

# What transformers writes into every config.json; none of it concerns the model.
OF_TRANSFORMERS = frozenset(
    "architectures transformers_version dtype torch_dtype auto_map use_cache return_dict output_hidden_states "
    "output_attentions is_encoder_decoder chunk_size_feed_forward id2label label2id num_labels problem_type name_or_path "
    "attn_implementation initializer_range pretraining_tp is_decoder tokenizer_class task_specific_params".split()
)


class PublishedConfig:
    """Reading and writing for frozen dataclasses whose fields have the names of a published config.json."""

    model_type: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    # Keys of the published file that this model has no use for.
    passed_over: ClassVar[frozenset[str]] = frozenset()
    # Keys that are no field -> the values with which they say what is computed here.
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """
        Raises:
            ConfigError: a key that is not known, a setting that is computed otherwise here, a value out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key, allowed in cls.only.items():
            if key in values and values[key] not in allowed:
                wanted = " or ".join(json.dumps(value) for value in allowed)
                raise ConfigError(f"{where}: {key}: got {json.dumps(values[key])[:60]}, expected {wanted}: other models "
                                  f"of {cls.model_type} are not supported")  # fmt: skip
        named = known | cls.only.keys() | cls.passed_over | OF_TRANSFORMERS | {"model_type"}
        rest = {key: value for key, value in values.items() if not key.startswith("_")}
        if (unknown := first_of(rest, named)) is not None:
            raise ConfigError(f"{where}: unknown key {unknown!r}; known keys are {', '.join(sorted(known))}")
        try:
            return cls(**{key: value for key, value in values.items() if key in known})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        except TypeError:  # a field without a default is missing
            missing = [f.name for f in dataclasses.fields(cls) if f.name not in values]  # type: ignore[arg-type]
            raise ConfigError(f"{where}: {missing[0]} is missing") from None

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        return cls.from_dict(read_json(Path(path), ConfigError), str(path))

    def to_dict(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}

    def to_json(self) -> str:
        head = {"model_type": self.model_type, "architectures": list(self.architectures)}
        return json.dumps(head | self.to_dict(), indent=2) + "\n"

    def require(self, ok: bool, name: str, expected: str) -> None:
        """Fail with a `ConfigError` that names the field, unless `ok`."""
        if not ok:
            raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected {expected}")

    def check_tokens(self) -> None:
        """Fail where a special token is outside the vocabulary."""
        size = self.vocab_size  # type: ignore[attr-defined]
        for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, role)
            beyond = [i for i in (ids if isinstance(ids, tuple) else (ids,)) if i is not None and i >= size]
            self.require(not beyond, role, f"below vocab_size ({size})")
