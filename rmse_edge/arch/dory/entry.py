"""What the rest of the project asks Dory. Hosts of packages ask too, so PyTorch is imported where a model is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rmse_edge.arch.common import dense, recurrent
from rmse_edge.arch.common.quantization import QuantTable
from rmse_edge.arch.registry import Arch

from .config import DoryConfig
from .stored import EMBEDDING, HEAD, attention, mlp, stored

if TYPE_CHECKING:
    from .model import Dory


def layer_weights(c: DoryConfig) -> int:
    """Weights of products in one layer."""
    heads = 3 * c.num_attention_heads + 2 * c.num_key_value_heads
    return c.hidden_size * (heads * c.head_dim + 3 * c.intermediate_size)


def behind(c: DoryConfig) -> int:
    """Weights of products in the output layers and the head."""
    return c.sections[2] * layer_weights(c) + c.vocab_size * c.hidden_size


def loop_weights(c: DoryConfig) -> int:
    """Weights of products in one iteration."""
    from rmse_edge.loop.predictions import compares

    core = c.sections[1] * layer_weights(c) + recurrent.gate_weights(c, c.hidden_size)
    return core + (behind(c) if compares(c.rules) else 0)


def once_weights(c: DoryConfig) -> int:
    """Weights of products around the loop, with what supplies keys and values to loops that did not run."""
    pair = 2 * c.hidden_size * c.num_key_value_heads * c.head_dim
    propagated = c.sections[1] * pair if c.kv_policy == "propagate" else 0
    return c.sections[0] * layer_weights(c) + behind(c) + propagated


def parameters(c: DoryConfig) -> int:
    """Trained numbers of the model that `c` describes, the exit gate left out."""
    scales = 2 * (c.num_attention_heads * c.head_dim + c.intermediate_size + c.hidden_size)
    tables = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    return len(c.attention) * (layer_weights(c) + scales) + tables + c.vocab_size


def parts(model: Dory) -> dict[str, Any]:
    c = model.config
    return dense.parts(c, c.rope_theta, loop_weights(c), once_weights(c), c.further_thetas)


def stated(c: DoryConfig) -> dict[str, Any]:
    found = recurrent.stated(c, c.rope_theta, c.hidden_size, parameters(c), c.further_thetas)
    if c.shares_slots:
        found |= {f"state.past_{name}.per_loop": False for name in ("keys", "values")}
    return found


def build(config: DoryConfig) -> Dory:
    from .model import Dory

    return Dory(config)


def table(c: DoryConfig) -> QuantTable:
    """Layer by layer, in the order of the data flow. All that scales stays float."""
    stages: list[tuple[str, ...]] = [(EMBEDDING,)]
    for i in range(len(c.attention)):
        reads, rests = f"{attention(i)}.mixer", f"{mlp(i)}.mixer"
        stages += [
            tuple(f"{reads}.{name}_proj.weight" for name in "qkvg"),
            (f"{reads}.o_proj.weight",),
            (f"{rests}.gate_proj.weight", f"{rests}.up_proj.weight"),
            (f"{rests}.down_proj.weight",),
        ]
    stages.append((HEAD,))
    return QuantTable(
        stages=tuple(stages),
        float=("*.mixer.s*", "*_alpha", "*.logit_scale", "*_cache.kv_scales", "exit_gate.*"),
        once=tuple(f"{block(i)}.*" for i in range(c.sections[0]) for block in (attention, mlp)),
        embedding=EMBEDDING,
        head=HEAD,
    )


def tied(c: DoryConfig) -> Mapping[str, str]:
    return {HEAD: EMBEDDING} if c.tie_word_embeddings else {}


ARCH = Arch(
    DoryConfig,
    build,
    parts,
    additions=recurrent.ADDITIONS,
    settings=DoryConfig.settings,
    tied=tied,
    stored=stored,
    unread=("*.rotary_emb.*inv_freq",),
    quantization=table,
    trains=True,
    gate_bias=recurrent.gate_bias,
    stated=stated,
)
