"""What the rest of the project asks HRM-Text. Hosts of packages ask too, so PyTorch is imported where a model is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rmse_edge.arch.common import dense, recurrent
from rmse_edge.arch.common.quantization import QuantTable
from rmse_edge.arch.registry import Arch

from .config import HrmTextConfig
from .stored import EMBEDDING, HEAD, layers, stored

if TYPE_CHECKING:
    from .model import HrmText


def layer_weights(c: HrmTextConfig) -> int:
    """Weights of products in one layer."""
    return c.hidden_size * (5 * c.num_attention_heads * c.head_dim + 3 * c.intermediate_size)


def calls(c: HrmTextConfig) -> int:
    """Of layers in one iteration."""
    return (c.L_cycles + 1) * c.layers


def loop_weights(c: HrmTextConfig) -> int:
    """Weights of products in one iteration: those of L once for each of its calls."""
    from rmse_edge.loop.predictions import compares

    head = c.vocab_size * c.hidden_size if compares(c.rules) else 0
    return calls(c) * layer_weights(c) + recurrent.gate_weights(c, c.hidden_size) + head


def once_weights(c: HrmTextConfig) -> int:
    """Weights of products around the loop: the head, and what supplies keys and values to loops that did not run."""
    propagated = calls(c) * 2 * c.hidden_size * c.num_attention_heads * c.head_dim
    return c.vocab_size * c.hidden_size + (propagated if c.kv_policy == "propagate" else 0)


def parameters(c: HrmTextConfig) -> int:
    """Trained numbers of the model that `c` describes, the exit gate left out."""
    tables = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    return 2 * c.layers * layer_weights(c) + tables


def parts(model: HrmText) -> dict[str, Any]:
    c = model.config
    return dense.parts(c, c.rope_theta, loop_weights(c), once_weights(c), prefix=c.prefix_lm)


def stated(c: HrmTextConfig) -> dict[str, Any]:
    return recurrent.stated(c, c.rope_theta, c.hidden_size, parameters(c)) | {"text.prefix": c.prefix_lm}


def build(config: HrmTextConfig) -> HrmText:
    from .model import HrmText

    return HrmText(config)


def table(c: HrmTextConfig) -> QuantTable:
    """Layer by layer, in the order of the data flow. What z_L begins from stays float."""
    stages: list[tuple[str, ...]] = [(EMBEDDING,)]
    for layer in layers(c):
        reads, *rest = dense.layer_stages(layer, "self_attn")
        stages += [(*reads, f"{layer}.self_attn.gate_proj.weight"), *rest]
    stages.append((HEAD,))
    return QuantTable(
        stages=tuple(stages),
        float=("model.z_L_init", "model.cache.kv_scales", "exit_gate.*"),
        embedding=EMBEDDING,
        head=HEAD,
    )


def tied(c: HrmTextConfig) -> Mapping[str, str]:
    return {HEAD: EMBEDDING} if c.tie_word_embeddings else {}


ARCH = Arch(
    HrmTextConfig,
    build,
    parts,
    additions=recurrent.ADDITIONS,
    settings=(*HrmTextConfig.settings, "L_bp_cycles", "longest_prefix"),
    tied=tied,
    stored=stored,
    unread=("*.rotary_emb.inv_freq",),
    quantization=table,
    trains=True,
    gate_bias=recurrent.gate_bias,
    stated=stated,
)
