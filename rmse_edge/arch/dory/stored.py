"""How checkpoints of Dory hold its tensors.

Released ones have an attention and an MLP as two layers, `backbone.layers.0.mixer.q_proj.weight` and
`backbone.layers.1.mixer.up_proj.weight`: these names are the model's own here. transformers 5.24.0 reads them, and writes
`backbone.layers.0.self_attn.q_proj.weight` and `backbone.layers.0.mlp.up_proj.weight` instead; within itself it says `model`
for `backbone`. All three are read.
"""

from __future__ import annotations

from collections.abc import Mapping

from rmse_edge.arch.registry import Stored

from .config import DoryConfig

EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"
ATTENTION = (*(f"{name}_proj.weight" for name in "qkvog"), "sqk", "s_gate")
MLP = (*(f"{name}_proj.weight" for name in ("gate", "up", "down")), "suv_gate", "suv_up")


def attention(i: int) -> str:
    """The block that is the attention of layer i."""
    return f"backbone.layers.{2 * i}"


def mlp(i: int) -> str:
    """The block that is the MLP of layer i."""
    return f"backbone.layers.{2 * i + 1}"


def stored(c: DoryConfig) -> list[Mapping[str, Stored]]:
    """The names that transformers writes, and those within itself."""
    return [_of(c, "backbone", "embeddings", "g_proj"), _of(c, "model", "embed_tokens", "gate_proj")]


def _of(c: DoryConfig, theirs: str, embeddings: str, gate: str) -> Mapping[str, Stored]:
    found = {EMBEDDING: f"{theirs}.{embeddings}.weight"}
    for i in range(len(c.attention)):
        layer = f"{theirs}.layers.{i}"
        found |= {
            f"{attention(i)}.mixer.{name}": f"{layer}.self_attn.{name.replace('g_proj', gate)}" for name in ATTENTION
        }
        found |= {f"{mlp(i)}.mixer.{name}": f"{layer}.mlp.{name}" for name in MLP}
        found |= {f"{attention(i)}.attn_alpha": f"{layer}.lambda_1", f"{mlp(i)}.mlp_alpha": f"{layer}.lambda_2"}
    return {own: Stored((name,)) for own, name in found.items()}
