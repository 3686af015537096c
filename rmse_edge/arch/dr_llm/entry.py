"""What the rest of the project asks Dr.LLM. Hosts of packages ask too, so PyTorch is imported where a model is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rmse_edge.arch.common import dense
from rmse_edge.arch.registry import Arch, Stored
from rmse_edge.info import PlanInfo

from .config import ONCE, DrLlmConfig

if TYPE_CHECKING:
    from rmse_edge.loop.course import Reader

    from .model import DrLlm

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROUTERS = "model.routers."  # how the names of all their tensors begin


def loop_weights(c: DrLlmConfig) -> int:
    """Weights of products in one iteration, which is one execution of one layer."""
    wide, kv = c.num_attention_heads * c.head_width, c.num_key_value_heads * c.head_width
    return c.hidden_size * (2 * wide + 2 * kv + 3 * c.intermediate_size)


def once_weights(c: DrLlmConfig) -> int:
    """Weights of products around the loop: the head. Those of routers are multiplied once per text."""
    return c.vocab_size * c.hidden_size


def router_parameters(c: DrLlmConfig) -> int:
    """Trained numbers of one router."""
    return c.hidden_size * c.router_hidden + c.router_hidden + 3 * c.router_hidden + 3


def parameters(c: DrLlmConfig) -> int:
    """Trained numbers of the model that `c` describes."""
    layer = loop_weights(c) + 2 * c.hidden_size + router_parameters(c)
    tables = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2)
    return c.num_hidden_layers * layer + c.hidden_size + tables


def parts(model: DrLlm) -> dict[str, Any]:
    c = model.config
    found = dense.parts(c, c.rope_theta, loop_weights(c), once_weights(c))
    return found | {"plan": PlanInfo(c.num_hidden_layers, c.prompt)}


def stated(c: DrLlmConfig) -> dict[str, Any]:
    found = dense.stated(c, c.rope_theta, c.hidden_size, parameters(c))
    found |= {"plan.layers": c.num_hidden_layers, "plan.prompt": c.prompt}
    found |= {f"state.past_plan.{name}": value for name, value in (("dtype", "int64"), ("kind", "replace"))}
    return found | {"dials.max_loops": c.max_loops, "dials.route": c.route}


def build(config: DrLlmConfig) -> DrLlm:
    from .model import DrLlm

    return DrLlm(config)


def reader(model: DrLlm) -> Reader:
    from rmse_edge.loop.dials import Dials

    from .model import LayerReader

    return LayerReader(model, Dials(model.config.max_loops), model.lm_head)


def stored(c: DrLlmConfig) -> Mapping[str, Stored]:
    """The routers of a checkpoint that has none: they run every layer once."""

    def zeros(*shape: int) -> Stored:
        import torch

        return Stored((), lambda: torch.zeros(shape))

    def once() -> Any:
        import torch

        return torch.tensor(ONCE)

    found: dict[str, Stored] = {}
    for index in range(c.num_hidden_layers):
        router = f"{ROUTERS}{index}"
        found[f"{router}.linear1.weight"] = zeros(c.router_hidden, c.hidden_size)
        found[f"{router}.linear1.bias"] = zeros(c.router_hidden)
        found[f"{router}.linear2.weight"] = zeros(3, c.router_hidden)
        found[f"{router}.linear2.bias"] = Stored((), once)
    return found


def tied(c: DrLlmConfig) -> Mapping[str, str]:
    return {HEAD: EMBEDDING} if c.tie_word_embeddings else {}


ARCH = Arch(
    DrLlmConfig,
    build,
    parts,
    settings=("route",),
    tied=tied,
    unread=("*.rotary_emb.inv_freq",),
    stored=stored,
    reader=reader,
    trains=True,
    planned=True,
    stated=stated,
)
