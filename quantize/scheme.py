"""Which tensors of RMS-E are quantised, and in which format.

What decides (router, exit gate, memory gates) and what scales (norms, step encodings) stays float: a rounding there changes
*which* computation is done. So does the memory: what it learns while running is float too, and it is small.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..checkpoint import stored_keys
from ..config import RMSEConfig
from ..errors import UserError
from ..model import RMSE
from .tensors import Format

BITS = {"int8": 8, "int4": 4}
METHODS = ("gptq", "rtn")
GROUPS = (128, 64, 32, 16)  # of dense matrices, by preference: larger groups are smaller and faster

EXPERTS = ("block.experts.gate_up_proj", "block.experts.down_proj")
DENSE = (
    "embed.weight",
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
            raise UserError(f"--quant: got {self.quant!r}, expected one of {', '.join(BITS)}")
        if self.quant == "int8" and not self.symmetric:
            raise UserError("--asymmetric: int8 is symmetric, its range is wide enough; leave it out or use int4")
        if self.quant == "int8" and (self.group_size != 32 or self.dense_group_size is not None):
            flag = "--group-size" if self.group_size != 32 else "--dense-group-size"
            raise UserError(f"{flag}: int8 has one scale per output channel; leave it out or use int4")
        for group in (self.group_size, self.dense_group_size):
            if group is not None:
                Format(4, group)  # checks it

    def formats(self, model: RMSE) -> dict[str, Format]:
        """The format of every tensor that is quantised.

        Raises:
            UserError: a tensor is not in the table, or a group size does not divide its inputs; names the tensor.
        """
        found = {}
        for name in stored_keys(model.config, list(model.state_dict())):
            if not is_quantized(name, model.config):
                continue
            tensor = model.get_parameter(name)
            if tensor.numel():  # no shared expert: zero wide
                found[name] = self._format(name, tensor.shape[-1])
        return found

    def _format(self, name: str, inputs: int) -> Format:
        bits = BITS[self.quant]
        if bits == 8:
            return Format(8)
        if name in EXPERTS:
            group, flag = self.group_size, "--group-size"
        else:
            group = self.dense_group_size or next((g for g in GROUPS if inputs % g == 0), GROUPS[-1])
            flag = "--dense-group-size"
        if inputs % group:
            fitting = [str(g) for g in (*GROUPS[::-1], 256) if inputs % g == 0]
            hint = f"{flag} {' or '.join(fitting)}" if fitting else "--quant int8, which needs no groups"
            raise UserError(f"{name}: group size {group} does not divide its {inputs} inputs; pass {hint}")
        return Format(4, group, self.symmetric)


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
