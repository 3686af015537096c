"""What the trainer needs of a looped model: a trajectory of normed states, the head that reads them, and the exit gate."""

from __future__ import annotations

from typing import Any

from torch import nn

from rmse_edge.arch.registry import arch_of, arch_of_model, model_types
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


def gate_name(model: nn.Module) -> str:
    """The path of the exit gate, a linear layer from a normed state to one logit."""
    bias = arch_of_model(model).gate_bias
    assert bias is not None  # `trainable`
    return bias.rpartition(".")[0]


def gate_of(model: nn.Module) -> nn.Module:
    return model.get_submodule(gate_name(model))


def head_of(model: nn.Module) -> nn.Module:
    """What a normed state is multiplied with to give logits."""
    table: Any = arch_of_model(model).quantization
    return model.get_submodule(table(model.config).head.rpartition(".")[0])
