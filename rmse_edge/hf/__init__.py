"""Checkpoints of texts in transformers: `AutoModelForCausalLM.from_pretrained` and `generate`, for every architecture.

Names are loaded when they are first used: `import rmse_edge` passes through here and must not load transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import RMSECache
    from .config import RMSEPretrainedConfig
    from .looped_cache import LoopedCache
    from .looped_config import LoopedPretrainedConfig
    from .looped_model import LoopedForCausalLM
    from .model import RMSEForCausalLM

__all__ = [
    "LoopedCache",
    "LoopedForCausalLM",
    "LoopedPretrainedConfig",
    "RMSECache",
    "RMSEForCausalLM",
    "RMSEPretrainedConfig",
]

_HOME = {
    "LoopedCache": "looped_cache",
    "LoopedForCausalLM": "looped_model",
    "LoopedPretrainedConfig": "looped_config",
    "RMSECache": "cache",
    "RMSEForCausalLM": "model",
    "RMSEPretrainedConfig": "config",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
