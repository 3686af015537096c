"""What the rest of the project asks Inkling 2. Hosts of packages ask too, so PyTorch is imported where a model is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rmse_edge.arch.common import recurrent
from rmse_edge.arch.common.quantization import QuantTable
from rmse_edge.arch.registry import Arch
from rmse_edge.info import TextInfo
from rmse_edge.numbers import token_ids

from .config import InklingConfig
from .stored import EMBEDDING, HEAD, UNREAD, stored

if TYPE_CHECKING:
    from .model import Inkling

GATES = 4  # of messages, in a looped layer


def layer_weights(c: InklingConfig, i: int, experts: int) -> int:
    """Weights of products in layer i, of which so many experts are read."""
    assert c.layer_types is not None
    heads, kv_heads, dims, _ = c.head_sizes(c.layer_types[i])
    rows = 3 * heads * dims + 2 * kv_heads * dims + heads * (c.d_rel + 1) + c.n_routed_experts
    if c.layer_types[i] == "hybrid":
        rows += 2 * kv_heads * c.conv_kernel_size
    found = c.hidden_size * (rows + 3 * c.moe_intermediate_size * experts)
    looped = c.loop_layer_index_start <= i < c.loop_layer_index_end
    return found + (GATES * 4 * c.hidden_size * c.loop_gate_rank if looped else 0)


def _of_section(c: InklingConfig, which: int) -> int:
    layers = range(c.num_hidden_layers)[c.sections[which]]
    return sum(layer_weights(c, i, c.num_experts_per_tok) for i in layers)


def behind(c: InklingConfig) -> int:
    """Weights that a position reads of the layers behind the loop and the head."""
    return _of_section(c, 2) + c.unpadded_vocab_size * c.hidden_size


def loop_weights(c: InklingConfig) -> int:
    """Weights that a position reads in one iteration."""
    from rmse_edge.loop.predictions import compares

    gate = recurrent.gate_weights(c, width(c))
    return _of_section(c, 1) + gate + (behind(c) if compares(c.rules) else 0)


def width(c: InklingConfig) -> int:
    """Channels of a state: the blocks of a pass side by side."""
    return c.blocks[1] * c.hidden_size


def once_weights(c: InklingConfig) -> int:
    """Weights that a position reads around the loop."""
    return _of_section(c, 0) + behind(c)


def parameters(c: InklingConfig) -> int:
    """Trained numbers of the model that `c` describes, the exit gate left out."""
    assert c.layer_types is not None
    d, size = c.hidden_size, c.conv_kernel_size
    found = (c.vocab_size + c.unpadded_vocab_size) * d + 3 * d  # the tables, two norms, the last mixture
    found += 4 * d * (c.loop_layer_index_end - c.loop_layer_index_start)
    for i, kind in enumerate(c.layer_types):
        heads, kv_heads, dims, extent = c.head_sizes(kind)
        full = kind == "hybrid"
        found += layer_weights(c, i, c.n_routed_experts)
        found += (
            heads * (dims + c.d_rel) + c.d_rel * extent + 2 * kv_heads * dims * size
        )  # scales, profiles, convolutions
        found += 2 * d * size + 2 * d + (3 if full else 1) * (d if i == 0 else 2 * d)  # mixtures and norms
    return found


def parts(model: Inkling) -> dict[str, Any]:
    c = model.config
    return {
        "dials": c.dials,
        "text": TextInfo(c.unpadded_vocab_size, eos_token_ids=token_ids(c.eos_token_id, "eos_token_id")),
        "loop_weights": loop_weights(c),
        "once_weights": once_weights(c),
    }


def stated(c: InklingConfig) -> dict[str, Any]:
    found: dict[str, Any] = {
        "max_loops": c.max_loops,
        "width": width(c),
        "parameters": parameters(c) + recurrent.gate_parameters(c, width(c)),
        "rules": ("max_loops", "min_loops", *c.rules),
        "text.vocab_size": c.unpadded_vocab_size,
        "text.rotary_dims": 0,
    }
    assert c.layer_types is not None
    for kind in dict.fromkeys(c.layer_types[c.sections[1]]):
        ending, update = ("full", "append") if kind == "hybrid" else ("sliding", "ring")
        for name in ("keys", "values"):
            source = f"{name}_{ending}"
            kept = {"dtype": c.kv_dtype, "kind": update, "source": source, "per_loop": True}
            found |= {f"state.past_{source}.{field}": value for field, value in kept.items()}
    return found | {f"dials.{name}": value for name, value in vars(c.dials).items()}


def build(config: InklingConfig) -> Inkling:
    from .model import Inkling

    return Inkling(config)


def table(c: InklingConfig) -> QuantTable:
    """Layer by layer, in the order of the data flow. What decides, mixes or scales stays float: routers, sinks, biases by
    distance, convolutions, and the gates of messages, which are small.
    """
    stages: list[tuple[str, ...]] = [(EMBEDDING,)]
    for i in range(c.num_hidden_layers):
        layer = f"model.layers.{i}"
        reads = tuple(f"{layer}.self_attn.{name}.weight" for name in ("q_proj.linear", "o_proj.gate_proj"))
        stages += [
            (*reads, *(f"{layer}.self_attn.{x}_proj.linear.weight" for x in "kv")),
            (f"{layer}.self_attn.o_proj.linear.weight",),
            (f"{layer}.mlp.gate_up_proj",),
            (f"{layer}.mlp.down_proj",),
        ]
    stages.append((HEAD,))
    return QuantTable(
        stages=tuple(stages),
        float=(
            "*norm.weight",
            "*_input.query",
            "*.norm.scale",
            "*.sconv.*",
            "*_convolution.*",
            "*.sink_proj.weight",
            "*.relative_position_bias.*",
            "*_message_gate.*",
            "*.mlp.router.weight",
            "*.mlp.balance_bias",
            "*.kv_scales",
            "exit_gate.*",
        ),
        experts=("*.mlp.gate_up_proj", "*.mlp.down_proj"),
        once=tuple(f"model.layers.{i}.*" for i in range(c.loop_layer_index_start)),
        embedding=EMBEDDING,
        head=HEAD,
    )


ARCH = Arch(
    InklingConfig,
    build,
    parts,
    additions=recurrent.ADDITIONS,
    settings=InklingConfig.settings,
    stored=stored,
    unread=UNREAD,
    quantization=table,
    trains=True,
    gate_bias=recurrent.gate_bias,
    stated=stated,
)
