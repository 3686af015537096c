"""What the rest of the project asks Huginn. Hosts of packages ask too, so PyTorch is imported where a model is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rmse_edge.arch.common import dense, recurrent
from rmse_edge.arch.common.quantization import QuantTable
from rmse_edge.arch.registry import Arch

from .config import HuginnConfig
from .stored import STACKS, stored

if TYPE_CHECKING:
    from .model import Huginn

EMBEDDING, HEAD, ADAPTER = "transformer.wte.weight", "lm_head.weight", "transformer.adapter.weight"


def layer_weights(c: HuginnConfig) -> int:
    """Weights of products in one layer."""
    return 4 * c.n_embd**2 + 3 * c.n_embd * c.intermediate_size


def behind(c: HuginnConfig) -> int:
    """Weights of products in the coda and the head."""
    return c.n_layers_in_coda * layer_weights(c) + c.vocab_size * c.n_embd


def loop_weights(c: HuginnConfig) -> int:
    """Weights of products in one iteration."""
    from rmse_edge.loop.predictions import compares

    core = 2 * c.n_embd**2 + c.n_layers_in_recurrent_block * layer_weights(c) + recurrent.gate_weights(c, c.n_embd)
    return core + (behind(c) if compares(c.rules) else 0)


def once_weights(c: HuginnConfig) -> int:
    """Weights of products around the loop, with what supplies keys and values to loops that did not run."""
    propagated = 2 * c.n_embd**2 * (1 + c.n_layers_in_recurrent_block) if c.kv_policy == "propagate" else 0
    return c.n_layers_in_prelude * layer_weights(c) + behind(c) + propagated


def parameters(c: HuginnConfig) -> int:
    """Trained numbers of the model that `c` describes, the exit gate left out."""
    layer = layer_weights(c) + 4 * c.n_embd + (2 * c.n_embd if c.qk_bias else 0)
    tables = c.vocab_size * c.n_embd * (1 if c.tie_embeddings else 2)
    return c.n_layers * layer + 2 * c.n_embd**2 + c.n_embd + tables


def parts(model: Huginn) -> dict[str, Any]:
    c = model.config
    return dense.parts(c, c.rope_base, loop_weights(c), once_weights(c))


def stated(c: HuginnConfig) -> dict[str, Any]:
    return recurrent.stated(c, c.rope_base, c.n_embd, parameters(c))


def build(config: HuginnConfig) -> Huginn:
    from .model import Huginn

    return Huginn(config)


def table(c: HuginnConfig) -> QuantTable:
    """Layer by layer, in the order of the data flow."""
    stages: list[tuple[str, ...]] = [(EMBEDDING,)]
    for stack, count in STACKS.items():
        if stack == "core_block":
            stages.append((ADAPTER,))
        for i in range(getattr(c, count)):
            stages += dense.layer_stages(f"transformer.{stack}.layers.{i}", "attn")
    stages.append((HEAD,))
    return QuantTable(
        stages=tuple(stages),
        float=("*norm_?.weight", "*.ln_f.weight", "*.attn.?_bias", "*.cache.kv_scales", "exit_gate.*"),
        once=("transformer.prelude.*",),
        embedding=EMBEDDING,
        head=HEAD,
    )


def tied(c: HuginnConfig) -> Mapping[str, str]:
    return {HEAD: EMBEDDING} if c.tie_embeddings else {}


ARCH = Arch(
    HuginnConfig,
    build,
    parts,
    additions=recurrent.ADDITIONS,
    settings=HuginnConfig.settings,
    tied=tied,
    stored=stored,
    unread=("*freqs_cis",),
    quantization=table,
    trains=True,
    gate_bias=recurrent.gate_bias,
    stated=stated,
)
