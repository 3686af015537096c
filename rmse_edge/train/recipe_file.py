"""What recipes have in common: they are JSON files of one object, whose fields are changed by "key=value"."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar, Self

from rmse_edge.errors import ArgumentError, ConfigError
from rmse_edge.schema import first_of, read_json


class RecipeFile:
    """A frozen dataclass that is read from a recipe.json."""

    groups: ClassVar[tuple[str, ...]] = ()  # fields that are objects, whose own are changed by "group.key=value"
    named: ClassVar[str] = ""  # what messages about changes begin with

    def _values(self) -> dict[str, Any]:
        assert dataclasses.is_dataclass(self) and not isinstance(self, type)
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self._values(), indent=2) + "\n"

    def override(self, changes: list[str]) -> Self:
        """The recipe with "key=value" changes applied: "lr=1e-3", "model.d_model=64".

        Values are JSON; what is not JSON is taken as text.

        Raises:
            ArgumentError: no such key, or a value out of range.
        """
        values = self._values()
        for change in changes:
            key, equals, text = change.partition("=")
            if not equals or not key:
                raise ArgumentError("changes", f"got {change!r}, expected key=value")
            try:
                value = json.loads(text)
            except ValueError:
                value = text
            group, dot, inner = key.partition(".")
            if dot and group in self.groups:
                values[group] = (values[group] or {}) | {inner: value}
            else:
                values[key] = value
        try:
            return type(self).from_dict(values, where=self.named)
        except ConfigError as error:
            raise ArgumentError("changes", str(error)) from None

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "recipe") -> Self:
        """A recipe of these fields, the others as they are by default; `where` is what messages begin with.

        Raises:
            ConfigError: naming the field.
        """
        assert dataclasses.is_dataclass(cls)
        known = {f.name for f in dataclasses.fields(cls)}
        if (unknown := first_of(values, known)) is not None:
            raise ConfigError(
                f"{where}{where and ': '}unknown key {unknown!r}; known keys are {', '.join(sorted(known))}"
            )
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}{where and ': '}{error}") from None

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """
        Raises:
            ConfigError: there is no such file, or it holds none; names it.
        """
        try:
            values = read_json(Path(path), ConfigError)
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file; expected a recipe.json") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a JSON object of recipe fields")
        return cls.from_dict(values, where=str(path))
