"""What the trainer asks of a looped model's architecture. Its model is `HasTrajectory` (rmse_edge/loop/reading.py)."""

from __future__ import annotations

from typing import Any

from rmse_edge.arch.registry import arch_of, model_types
from rmse_edge.errors import ConfigError


def trainable(model_type: str, where: str) -> Any:
    """The configuration class of an architecture that can be trained.

    Raises:
        ConfigError: there is no such architecture, or it is not trained here.
    """
    if model_type in model_types() and (arch := arch_of(model_type)).trains:
        return arch.config
    known = [name for name in model_types() if arch_of(name).trains]
    raise ConfigError(f"{where}: got {model_type!r}, expected one of {', '.join(('gpt', *known))}")


def gate_name(config: Any) -> str | None:
    """The path of the exit gate in a model of this configuration; None: it has none."""
    bias = arch_of(config.model_type).gate_bias(config)
    return None if bias is None else bias.rpartition(".")[0]
