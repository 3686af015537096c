"""Registers every architecture of texts with transformers' Auto classes, without importing transformers.

`import rmse_edge` must stay cheap: a machine that runs a package has NumPy and one engine. So nothing is imported here.
Whatever Auto module is loaded already gets its entry at once; for the others a finder waits at the head of
`sys.meta_path` and adds the entry right after transformers has executed the module. Either order of the two imports
works, and without transformers nothing happens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from .known import text_types

CONFIGS = "transformers.models.auto.configuration_auto"
MODELS = "transformers.models.auto.modeling_auto"


def register_configs() -> None:
    """Map every model_type to its configuration class, and those that are registered from now on."""
    from rmse_edge.arch.registry import on_register

    on_register.append(registered)
    for name in text_types():
        _register_config(name)


def _register_config(model_type: str) -> None:
    from .looped_config import config_class

    sys.modules[CONFIGS].AutoConfig.register(model_type, config_class(model_type), exist_ok=True)


def register_models() -> None:
    """Map every configuration class to its model class, which the module of these does at its end.

    That module may be what has transformers load its model list: then it is not at its end yet, and is left to get there.
    """
    if find_spec("torch") is not None:  # transformers can be used for its tokenizers alone
        import_module(__package__ + ".looped_model")


PENDING: dict[str, Callable[[], None]] = {CONFIGS: register_configs, MODELS: register_models}


def registered(model_type: str) -> None:
    """Let the Auto modules that are loaded know an architecture that was registered after them."""
    if model_type in text_types():
        _register_config(model_type)
        if MODELS not in PENDING and find_spec("torch") is not None:
            import_module(__package__ + ".looped_model").register(model_type)


class AutoModuleFinder:
    """Finds the modules of `PENDING` like everyone else does, and has their loader register afterwards."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if name not in PENDING:
            return None
        for finder in sys.meta_path:
            if finder is not cls and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = RegisteringLoader(spec.loader)  # type: ignore[assignment]
                    return spec
        return None


class RegisteringLoader:
    """A loader that runs the real one, puts it back in its place, and registers."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: Any) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        settle(module.__name__)


def settle(name: str) -> None:
    """Register what waited for module `name`; the finder leaves when nothing waits any more."""
    register = PENDING.pop(name, None)
    if register is not None:
        register()
    if not PENDING and AutoModuleFinder in sys.meta_path:
        sys.meta_path.remove(AutoModuleFinder)


def install() -> None:
    """Register with the Auto modules that are loaded, and wait for those that are not."""
    for name in list(PENDING):
        if name in sys.modules:
            settle(name)
    if PENDING and AutoModuleFinder not in sys.meta_path:
        sys.meta_path.insert(0, AutoModuleFinder)
