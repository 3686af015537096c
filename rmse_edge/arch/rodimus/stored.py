"""How published checkpoints of Rodimus hold its tensors: under other names, and two matrices in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rmse_edge.arch.common.hybrid import EMBEDDING, HEAD
from rmse_edge.arch.registry import Stored

from .config import RodimusConfig

if TYPE_CHECKING:
    from torch import Tensor

# Of a layer: own name -> published name.
MIXER: Mapping[str, str] = {
    "mixer_norms.0.weight": "mixer_norm.weight",
    "mixers.0.conv1d.weight": "mixer.inner_mixer.short_conv.conv1d.weight",
    "mixers.0.conv1d.bias": "mixer.inner_mixer.short_conv.conv1d.bias",
    "mixers.0.rk_proj.weight": "mixer.inner_mixer.in_proj.weight",
    "mixers.0.selection_proj.weight": "mixer.inner_mixer.mem_gate_proj.weight",
    "mixers.0.selection_proj.bias": "mixer.inner_mixer.mem_gate_proj.bias",
    "mixers.0.value_down_proj.weight": "mixer.inner_mixer.ch_gate_proj.0.weight",
    "mixers.0.value_up_proj.weight": "mixer.inner_mixer.ch_gate_proj.1.weight",
    "mixers.0.value_up_proj.bias": "mixer.inner_mixer.ch_gate_proj.1.bias",
    "mixers.0.residual_weight": "mixer.inner_mixer.residual_weight",
    "mixers.0.norm.weight": "mixer.act_norm.weight",
    "mixers.0.out_proj.weight": "mixer.out_proj.weight",
}
PLUS: Mapping[str, str] = {
    "mixer_norms.1.weight": "attn_norm.weight",
    "mlp_norm.weight": "ffn_norm.weight",
    "mlp.down_proj.weight": "ffn.out_proj.weight",
    **{f"mixers.1.{name}_proj.weight": f"attn.{name}_proj.weight" for name in ("q", "k", "v", "out")},
}


def first(w: Tensor) -> Tensor:
    return w.chunk(2)[0]


def second(w: Tensor) -> Tensor:
    return w.chunk(2)[1]


def stored(c: RodimusConfig) -> Mapping[str, Stored]:
    """The model's tensors that published checkpoints hold otherwise."""
    found = {
        EMBEDDING: Stored(("model.embeddings.weight",)),
        "norm.weight": Stored(("model.norm_f.weight",)),
        HEAD: Stored(("lm_head.weight",)),
    }
    plus = c.block_type == "rodimus_plus"
    for i in range(c.n_layer):
        own, theirs = f"layers.{i}", f"model.layers.{i}"
        found |= {f"{own}.{a}": Stored((f"{theirs}.{b}",)) for a, b in {**MIXER, **(PLUS if plus else {})}.items()}
        fc = (f"{theirs}.mixer.fc.weight",)
        found |= {
            f"{own}.mixers.0.x_proj.weight": Stored(fc, first),
            f"{own}.mixers.0.g_proj.weight": Stored(fc, second),
        }
        if plus:  # what is gated comes before the gate
            fc = (f"{theirs}.ffn.fc.weight",)
            found |= {f"{own}.mlp.up_proj.weight": Stored(fc, first), f"{own}.mlp.gate_proj.weight": Stored(fc, second)}
    return found
