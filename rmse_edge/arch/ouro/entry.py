"""What the rest of the project asks Ouro. Hosts of packages ask too, so PyTorch is imported where a model is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rmse_edge.arch.common import dense
from rmse_edge.arch.common.quantization import QuantTable
from rmse_edge.arch.registry import Arch

from .config import OuroConfig

if TYPE_CHECKING:
    from rmse_edge.loop.course import Reader

    from .model import Ouro

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GATE_BIAS = "model.early_exit_gate.bias"


def loop_weights(c: OuroConfig) -> int:
    """Weights of products in one iteration."""
    wide, kv = c.num_attention_heads * c.head_width, c.kv_heads * c.head_width
    layer = c.hidden_size * (2 * wide + 2 * kv + 3 * c.intermediate_size)
    return c.num_hidden_layers * layer + c.hidden_size


def once_weights(c: OuroConfig) -> int:
    """Weights of products around the loop: the head, and what supplies keys and values to loops that did not run."""
    propagated = c.num_hidden_layers * 2 * c.hidden_size * c.kv_heads * c.head_width
    return c.vocab_size * c.hidden_size + (propagated if c.kv_policy == "propagate" else 0)


def parameters(c: OuroConfig) -> int:
    """Trained numbers of the model that `c` describes."""
    norms = (4 * c.num_hidden_layers + 1) * c.hidden_size
    tables = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    return loop_weights(c) + 1 + norms + tables  # 1: the gate's bias


def parts(model: Ouro) -> dict[str, Any]:
    c = model.config
    return dense.parts(c, c.rope_theta, loop_weights(c), once_weights(c))


def stated(c: OuroConfig) -> dict[str, Any]:
    found = dense.stated(c, c.rope_theta, c.hidden_size, parameters(c))
    return found | {f"dials.{name}": value for name, value in vars(c.dials).items() if name != "exit_entropy"}


def build(config: OuroConfig) -> Ouro:
    from .model import Ouro

    return Ouro(config)


def table(c: OuroConfig) -> QuantTable:
    """Layer by layer, in the order of the data flow. What decides, the gate, stays float."""
    stages: list[tuple[str, ...]] = [(EMBEDDING,)]
    for i in range(c.num_hidden_layers):
        stages += dense.layer_stages(f"model.layers.{i}", "self_attn")
    stages.append((HEAD,))
    return QuantTable(
        stages=tuple(stages),
        float=("*norm.weight", "*layernorm_2.weight", "model.early_exit_gate.*", "model.cache.kv_scales"),
        embedding=EMBEDDING,
        head=HEAD,
    )


def reader(model: Ouro) -> Reader:
    from rmse_edge.loop.reading import TrajectoryReader

    return TrajectoryReader(model, model.config.dials, model.lm_head)


def tied(c: OuroConfig) -> Mapping[str, str]:
    return {HEAD: EMBEDDING} if c.tie_word_embeddings else {}


ARCH = Arch(
    OuroConfig,
    build,
    parts,
    settings=("early_exit_threshold", "exit_", "min_loops"),
    tied=tied,
    unread=("*.rotary_emb.inv_freq",),
    quantization=table,
    reader=reader,
    trains=True,
    gate_bias=lambda config: GATE_BIAS,
    stated=stated,
)
