"""How checkpoints of HRM-Text hold its tensors.

Released ones have [gate; query; key; value] of an attention as one, `L_module.layers.0.attn.gqkv_proj.weight`, and [gate; up]
of an MLP, `mlp.gate_up_proj.weight`. transformers 5.24.0 writes these, too; within itself it has the parts, whose names are
the model's own here: `L_module.layers.0.self_attn.q_proj.weight`. Both are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rmse_edge.arch.registry import Stored

from .config import HrmTextConfig

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STACKS = ("L_module", "H_module")  # in the order in which an iteration calls them


def layers(c: HrmTextConfig) -> list[str]:
    """The paths of all layers, in the order of the data flow."""
    return [f"model.{stack}.layers.{i}" for stack in STACKS for i in range(c.layers)]


def stored(c: HrmTextConfig) -> list[Mapping[str, Stored]]:
    """The one other way: how released checkpoints hold the model's tensors."""
    found: dict[str, Stored] = {}
    for layer in layers(c):
        joined, fused = (f"{layer}.attn.gqkv_proj.weight",), (f"{layer}.mlp.gate_up_proj.weight",)
        for i, name in enumerate(("gate", "q", "k", "v")):
            found[f"{layer}.self_attn.{name}_proj.weight"] = Stored(joined, _part(i, 4))
        for i, name in enumerate(("gate", "up")):
            found[f"{layer}.mlp.{name}_proj.weight"] = Stored(fused, _part(i, 2))
        found[f"{layer}.self_attn.o_proj.weight"] = Stored((f"{layer}.attn.o_proj.weight",))
    return [found]


def _part(i: int, count: int) -> Callable[[Tensor], Tensor]:
    """Of `count` equal parts of the rows, part i; all rows where they have no such parts, for the reader to refuse."""
    return lambda w: w if len(w) % count else w[i * len(w) // count : (i + 1) * len(w) // count]
