"""What the trainer needs of a looped model: a trajectory of normed states, the head that reads them, and the exit gate."""

from __future__ import annotations

from typing import Any

from torch import nn

from rmse_edge.arch.registry import arch_of, arch_of_model, model_types
from rmse_edge.errors import ConfigError


def trainable(model_type: str, where: str) -> Any:
    """The configuration class of an architecture that can be trained: it has an exit gate and a head that it names.

    Raises:
        ConfigError: there is no such architecture, or it is not trained here.
    """
    arch = arch_of(model_type, where)
    if arch.gate_bias is None or arch.quantization is None:
        names = ", ".join(name for name in model_types() if arch_of(name).gate_bias and arch_of(name).quantization)
        raise ConfigError(f"{where}: got {model_type!r}, which cannot be trained here; expected gpt or one of {names}")
    return arch.config


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
