"""In which format tensors are quantised; which ones is said by their architecture (rmse_edge/arch/common/quantization.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rmse_edge.arch.common.quantization import QuantTable
from rmse_edge.arch.registry import arch_of_model
from rmse_edge.checkpoint import stored_keys
from rmse_edge.errors import ArgumentError, UserError

from .tensors import Format

BITS = {"int8": 8, "int4": 4}
METHODS = ("gptq", "rtn")
GROUPS = (128, 64, 32, 16)  # of dense matrices, by preference: larger groups are smaller and faster


@dataclass(frozen=True)
class Scheme:
    """How a model is quantised."""

    quant: str = "int4"  # int8: a scale per output channel; int4: a scale per group of inputs
    group_size: int = 32  # int4, of the routed experts
    dense_group_size: int | None = None  # int4, of everything else; None: the largest of 128, 64, 32, 16 that divides
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.quant not in BITS:
            raise ArgumentError("quant", f"got {self.quant!r}, expected one of {', '.join(BITS)}")
        if self.quant == "int8" and not self.symmetric:
            raise ArgumentError(
                "symmetric", "int8 is symmetric, its range is wide enough; leave it out or use int4", False
            )
        if self.quant == "int8" and (self.group_size != 32 or self.dense_group_size is not None):
            name = "group_size" if self.group_size != 32 else "dense_group_size"
            raise ArgumentError(name, "int8 has one scale per output channel; leave it out or use int4")
        for group in (self.group_size, self.dense_group_size):
            if group is not None:
                Format(4, group)  # checks it

    def formats(self, model: Any) -> dict[str, Format]:
        """The format of every tensor that is quantised.

        Raises:
            UserError: the architecture has no table, a tensor is not in it, or a group size does not divide its inputs;
                names the tensor.
        """
        table, inputs = table_of(model), {}
        for name in stored_keys(model.config, list(model.state_dict())):
            if table.quantizes(name) and model.get_parameter(name).numel():  # no shared expert: zero wide
                inputs[name] = model.get_parameter(name).shape[-1]
        if BITS[self.quant] == 8:
            return dict.fromkeys(inputs, Format(8))
        return {name: Format(4, self._group(name, inputs, table), self.symmetric) for name in inputs}

    def _group(self, name: str, inputs: Mapping[str, int], table: QuantTable) -> int:
        """The group size of one tensor, of those that are quantised and their numbers of inputs."""
        expert = table.use(name) == "experts"
        if expert:
            group, argument = self.group_size, "group_size"
        else:
            group = self.dense_group_size or next((g for g in GROUPS if inputs[name] % g == 0), GROUPS[-1])
            argument = "dense_group_size"
        if inputs[name] % group == 0:
            return group
        # What is proposed has to suit all tensors, those of the other size too.
        alike = [n for other, n in inputs.items() if (table.use(other) == "experts") == expert]
        fitting = [str(g) for g in (*GROUPS[::-1], 256) if all(n % g == 0 for n in alike)]
        if any(n % GROUPS[-1] for n in inputs.values()):
            hint = "pass quant=int8, which needs no groups"
        else:
            hint = f"pass {argument}={' or '.join(fitting)}"
        raise UserError(f"{name}: group size {group} does not divide its {inputs[name]} inputs; {hint}")


def table_of(model: Any) -> QuantTable:
    """What a model's architecture says of its weights.

    Raises:
        UserError: it has no table.
    """
    table, config = arch_of_model(model).quantization, model.config
    if table is None:
        raise UserError(
            f"model_type {config.model_type}: the architecture does not say which of its tensors may be quantised; export "
            "it with quant=fp32 or fp16"
        )
    return table(config)
