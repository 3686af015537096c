"""Exporters and their libraries, imported when a test first needs them."""

from __future__ import annotations

import importlib.util
import pkgutil
from typing import Any

import pytest

from rmse_edge.errors import quiet


class _Later:
    """Stands for a module, or for what is in one: every attribute is that of the real one, which is imported by then."""

    __slots__ = ("_name",)
    # What pytest asks of everything in a file, to find tests and fixtures.
    __test__ = False
    _mock_name = "later"

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # pytest asks whether this is a class
            raise AttributeError(attribute)
        return getattr(_found(self), attribute)

    # So that monkeypatch changes the real one, and back.

    @property
    def __dict__(self) -> Any:
        return vars(_found(self))

    def __setattr__(self, attribute: str, value: Any) -> None:
        setattr(_found(self), attribute, value)

    def __delattr__(self, attribute: str) -> None:
        delattr(_found(self), attribute)


def _found(stand_in: _Later) -> Any:
    with quiet():  # coremltools speaks of other versions as it is imported
        return pkgutil.resolve_name(object.__getattribute__(stand_in, "_name"))


def later(name: str) -> Any:
    """The module "a.b", or what is called C in it, "a.b:C", to be used by its attributes.

    Tests use it instead of a module-level import of what takes seconds, since finding tests imports every file.
    """
    return _Later(name)


def needs(package: str, extra: str) -> pytest.MarkDecorator:
    """Tests that are skipped where a package is missing, which this does not import."""
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"needs {package}: pip install 'rmse-edge[{extra}]'")
