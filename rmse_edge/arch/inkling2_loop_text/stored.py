"""How checkpoints of Inkling 2 hold its tensors.

Released ones say `model.llm.layers.0.attn.wq_du.weight` and have gate and up of the experts interleaved; transformers 5.24.0
reads these and writes them again. Within itself it says `model.layers.0.self_attn.q_proj.linear.weight`, with all gates of an
expert before all ups. A model that also sees has `model.language_model.` there in place of `model.`. All three are read; what
belongs to the eyes is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from rmse_edge.arch.registry import Stored

from .config import InklingConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UNREAD = ("model.visual.*", "model.vision_tower.*")
# Of a layer: the names of transformers -> those of released checkpoints.
RELEASED: Mapping[str, str] = {
    "self_attn.q_proj.linear.weight": "attn.wq_du.weight",
    "self_attn.q_proj.norm.scale": "attn.q_l2_clip.scale",
    "self_attn.k_proj.linear.weight": "attn.wk_dv.weight",
    "self_attn.k_proj.sconv.conv1d.weight": "attn.k_sconv.weight",
    "self_attn.k_proj.sconv.static_weight": "attn.k_sconv.static_w",
    "self_attn.k_proj.sconv.weight_proj.weight": "attn.k_sconv.weight_proj",
    "self_attn.v_proj.linear.weight": "attn.wv_dv.weight",
    "self_attn.v_proj.sconv.conv1d.weight": "attn.v_sconv.weight",
    "self_attn.v_proj.sconv.static_weight": "attn.v_sconv.static_w",
    "self_attn.v_proj.sconv.weight_proj.weight": "attn.v_sconv.weight_proj",
    "self_attn.o_proj.gate_proj.weight": "attn.gate_attn.weight",
    "self_attn.o_proj.linear.weight": "attn.wo_ud.weight",
    "self_attn.sink_proj.weight": "attn.attn_sink_proj.weight",
    "self_attn.relative_position_bias.proj": "attn.rel_logits_proj.proj",
    "self_attn.relative_position_bias.linear.weight": "attn.wr_du.weight",
    "self_attn.relative_position_bias.norm.scale": "attn.rel_l2_clip.scale",
    "mlp.gate_up_proj": "mlp.experts.w13_weight",
    "mlp.down_proj": "mlp.experts.w2_weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.balance_bias": "mlp.gate.bias",
    "input_layernorm.weight": "attn_norm.weight",
    **{f"{x}_input_layernorm.weight": f"{x}_input_norm.weight" for x in "qkv"},
    "post_attention_layernorm.weight": "mlp_norm.weight",
    "post_attention_convolution.conv1d.weight": "attn_sconv.weight",
    "post_mlp_convolution.conv1d.weight": "mlp_sconv.weight",
    **{
        f"{own}_message_gate.{part}.weight": f"controllers.{theirs}.{name}_weight"
        for own, theirs in (("q", "attn"), ("k", "k"), ("v", "v"), ("mlp", "mlp"))
        for part, name in (("down_proj", "down"), ("forget_gate_proj", "forget"), ("message_gate_proj", "gain"))
    },
}
# Those that the project's own experts have otherwise -> as transformers has them.
EXPERTS: Mapping[str, str] = {
    "mlp.gate_up_proj": "mlp.experts.gate_up_proj",
    "mlp.down_proj": "mlp.experts.down_proj",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.balance_bias": "mlp.gate.e_score_correction_bias",
}


def of_layer(c: InklingConfig, i: int) -> list[str]:
    """The names of the tensors of layer i, without its path."""
    assert c.layer_types is not None
    full, looped = c.layer_types[i] == "hybrid", c.loop_layer_index_start <= i < c.loop_layer_index_end
    found = []
    for name in RELEASED:
        if ".sconv." in name and name.endswith("conv1d.weight") == full:
            continue
        if name.endswith("input_layernorm.weight") and (name == "input_layernorm.weight") == full:
            continue
        if "_message_gate." not in name or looped:
            found.append(name)
    return [*found, *(("attention_input.query",) if i else ()), "mlp_input.query"]


def interleaved(gate_up: Tensor) -> Tensor:
    """All gates of an expert, then all ups, (E, 2f, d) -> gate and up by turns."""
    return gate_up.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def merged(queries: Tensor, of_rows: Tensor) -> Tensor:
    """Queries of messages as released ones have them, two of (2 * layers, d): of queries and experts, and of keys and values
    of each layer -> (layers, 4, d) in the order of `READS`.
    """
    import torch

    first, second = (t.unflatten(0, (-1, 2)) for t in (queries, of_rows))
    return torch.cat([first[:, :1], second, first[:, 1:]], 1)


def stored(c: InklingConfig) -> list[Mapping[str, Stored]]:
    """As released, and within transformers; alone and beside eyes."""
    return [_released(c), _within("model.", c), _within("model.language_model.", c)]


def _released(c: InklingConfig) -> Mapping[str, Stored]:
    size = c.unpadded_vocab_size

    def unpadded(head: Tensor) -> Tensor:
        return head[:size]

    root = "model.llm"
    found = {
        EMBEDDING: Stored((f"{root}.embed.weight",)),
        "model.embed_tokens.embed_norm.weight": Stored((f"{root}.embed_norm.weight",)),
        "model.norm.weight": Stored((f"{root}.norm.weight",)),
        "model.final_input.query": Stored((f"{root}.attn_res.output_query",)),
        "model.message_input.query": Stored(
            (f"{root}.middle_cycle_cross_pass_queries", f"{root}.middle_cycle_cross_pass_kv_queries"), merged
        ),
        HEAD: Stored((f"{root}.unembed.weight",), unpadded),
    }
    for i in range(c.num_hidden_layers):
        for name in of_layer(c, i):
            if name == "attention_input.query":
                theirs = f"attn_res.attn_queries.{i - 1}"
            elif name == "mlp_input.query":
                theirs = f"attn_res.mlp_queries.{i}"
            else:
                theirs = f"layers.{i}.{RELEASED[name]}"
            found[f"model.layers.{i}.{name}"] = Stored((f"{root}.{theirs}",))
    return found


def _within(root: str, c: InklingConfig) -> Mapping[str, Stored]:
    makes: Mapping[str, Callable[[Tensor], Tensor]] = {"mlp.gate_up_proj": interleaved}
    names = [f"layers.{i}.{name}" for i in range(c.num_hidden_layers) for name in of_layer(c, i)]
    names += ["embed_tokens.weight", "embed_tokens.embed_norm.weight", "norm.weight", "final_input.query"]
    found = {}
    for name in (*names, "message_input.query"):
        own = name.split(".", 2)[-1] if name.startswith("layers.") else name
        theirs = name.removesuffix(own) + EXPERTS.get(own, own)
        found[f"model.{name}"] = Stored((f"{root}{theirs}",), makes.get(own))
    return found
