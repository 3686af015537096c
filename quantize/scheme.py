"""Which tensors of RMS-E are quantised, and in which format.

What decides (router, exit gate, memory gates) and what scales (norms, step encodings) stays float: a rounding there changes
*which* computation is done. So does the memory: what it learns while running is float too, and it is small.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rmse_edge.arch.rmse.config import RMSEConfig
from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.checkpoint import stored_keys
from rmse_edge.errors import ArgumentError, UserError

from .tensors import Format

BITS = {"int8": 8, "int4": 4}
METHODS = ("gptq", "rtn")
GROUPS = (128, 64, 32, 16)  # of dense matrices, by preference: larger groups are smaller and faster

EXPERTS = ("block.experts.gate_up_proj", "block.experts.down_proj")
EMBEDDING = "embed.weight"
DENSE = (
    EMBEDDING,
    "inject.weight",
    "block.attention.q_proj.weight",
    "block.attention.kv_proj.weight",
    "block.attention.o_proj.weight",
    "block.experts.shared_gate_up_proj.weight",
    "block.experts.shared_down_proj.weight",
    "head_proj.weight",
)
ATTENTION_GATE = "block.attention.gate_proj.weight"  # dense where it has a channel per channel, else a row per head
FLOAT = re.compile(
    r"(.*norm\.weight|step_encoding|gate\.(weight|bias)|block\.experts\.(router\.weight|step_logits|balance_bias)"
    r"|block\.attention\.kv_scales|memory\..*|retrieval\..*)"
)


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

    def formats(self, model: RMSE) -> dict[str, Format]:
        """The format of every tensor that is quantised.

        Raises:
            UserError: a tensor is not in the table, or a group size does not divide its inputs; names the tensor.
        """
        inputs = {}
        for name in stored_keys(model.config, list(model.state_dict())):
            if is_quantized(name, model.config) and model.get_parameter(name).numel():  # no shared expert: zero wide
                inputs[name] = model.get_parameter(name).shape[-1]
        if BITS[self.quant] == 8:
            return dict.fromkeys(inputs, Format(8))
        return {name: Format(4, self._group(name, inputs), self.symmetric) for name in inputs}

    def _group(self, name: str, inputs: Mapping[str, int]) -> int:
        """The group size of one tensor, of those that are quantised and their numbers of inputs."""
        expert = name in EXPERTS
        if expert:
            group, argument = self.group_size, "group_size"
        else:
            group = self.dense_group_size or next((g for g in GROUPS if inputs[name] % g == 0), GROUPS[-1])
            argument = "dense_group_size"
        if inputs[name] % group == 0:
            return group
        # What is proposed has to suit all tensors, those of the other size too.
        alike = [n for other, n in inputs.items() if (other in EXPERTS) == expert]
        fitting = [str(g) for g in (*GROUPS[::-1], 256) if all(n % g == 0 for n in alike)]
        if any(n % GROUPS[-1] for n in inputs.values()):
            hint = "pass quant=int8, which needs no groups"
        else:
            hint = f"pass {argument}={' or '.join(fitting)}"
        raise UserError(f"{name}: group size {group} does not divide its {inputs[name]} inputs; {hint}")


def is_quantized(name: str, config: RMSEConfig) -> bool:
    """Whether a tensor is quantised.

    Raises:
        UserError: the table has no line for it.
    """
    if name in DENSE or name in EXPERTS:
        return True
    if name == ATTENTION_GATE:
        return config.attention_gate == "elementwise"
    if FLOAT.fullmatch(name):
        return False
    raise UserError(
        f"{name}: the quantiser does not know this tensor; say in rmse_edge/quantize/scheme.py whether it stays float"
    )
