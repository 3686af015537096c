"""rmse-edge: looped language models that stop early for real, from PyTorch to phones.

Importing this package is cheap: names are loaded when they are first used, and torch and transformers only with them.
It also makes `AutoModelForCausalLM.from_pretrained` know checkpoints of every architecture (see rmse_edge/hf/auto.py).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .hf.auto import install

if TYPE_CHECKING:
    from .arch.rmse.config import RMSEConfig
    from .arch.rmse.model import RMSE
    from .checkpoint import load_checkpoint, save_checkpoint
    from .errors import UserError
    from .hf.model import RMSECache, RMSEForCausalLM, RMSEPretrainedConfig

__version__ = "0.1.0"

__all__ = [
    "RMSE",
    "RMSECache",
    "RMSEConfig",
    "RMSEForCausalLM",
    "RMSEPretrainedConfig",
    "UserError",
    "__version__",
    "load_checkpoint",
    "save_checkpoint",
]

_HOME = {
    "RMSE": "arch.rmse.model",
    "RMSECache": "hf.cache",
    "RMSEConfig": "arch.rmse.config",
    "RMSEForCausalLM": "hf.model",
    "RMSEPretrainedConfig": "hf.config",
    "UserError": "errors",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "transformers":
            raise ImportError(f"{name} needs transformers: pip install 'rmse-edge[hf]'") from error
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install()
