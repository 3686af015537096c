"""The layers of Inkling 2, and the model's parts by the names of transformers.

A layer reads mixtures of the blocks before it and of what its own block has added up so far, x (rmse_edge/layers/residual.py):

    a = conv(attention(norm(mix(blocks, x))));   x = x + a        at the first layer of a block x becomes a block, and x = a
    x = x + conv(experts(norm(mix(blocks, x))))

In the loop, from the second pass on, a message of the pass before is taken into each mixture. Attention has no angles: keys
and values pass a short convolution, scores have a bias by distance, and every query a sink. A full layer mixes queries, keys
and values each by themselves, and its queries grow with the text behind them.

Source of the equations: `modeling_inkling2_loop.py` of transformers 5.24.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rmse_edge.layers.attend import attend
from rmse_edge.layers.convolution import DynamicShortConvolution, ShortConvolution, ring_order
from rmse_edge.layers.experts import SparseExperts
from rmse_edge.layers.masks import causal_mask, distances, ring_positions, ring_slots_mask, slots_mask
from rmse_edge.layers.norm import RMSNorm, clipped, rms
from rmse_edge.layers.relative import RelativeBias, ScaledClip, bias_index, log_scale
from rmse_edge.layers.residual import BlockAttention, MessageGate
from rmse_edge.layers.rows import CallRows, Kept, KeptRows
from rmse_edge.layers.stack import Kind, KvPolicy
from rmse_edge.loop.contract import Tensors, TensorSpec
from rmse_edge.numbers import SLOTS

from .config import InklingConfig, LayerType

KINDS: dict[LayerType, Kind] = {"hybrid": Kind("full"), "hybrid_sliding": Kind("sliding")}
READS = ("q", "k", "v", "mlp")  # what a message is taken into, in the order of its queries
ORDER, LOG_SCALE = "ring_order", "log_scale"
CONVOLVED = "convolved"  # inputs of the convolutions behind attention and behind the experts


class Messages(NamedTuple):
    """Of the pass before, for the layers of the loop."""

    blocks: Sequence[Tensor]  # that it gave, normed, (B, C, d) each
    source: BlockAttention  # which mixes them for each layer
    there: Tensor  # scalar, 0 in the first pass, which has none; 1 from then on


def ring_of(c: InklingConfig) -> int:
    """Slots of a window's keys."""
    return min(c.sliding_window_size, c.max_position_embeddings)


def call_specs(c: InklingConfig, chunk: int) -> tuple[TensorSpec, ...]:
    """Of `of_call`."""
    found = []
    for kind in dict.fromkeys(c.layer_types or ()):
        name, full = KINDS[kind], kind == "hybrid"
        slots, axis = (c.max_position_embeddings, 2) if full else (ring_of(c), None)
        for what, masks, shape, dtype in (
            ("mask", ("slots_mask", "causal_mask"), (1, 1, chunk), torch.float32),
            ("index", ("slots_index", "causal_index"), (1, chunk), torch.int64),
        ):
            slots_axis = None if axis is None else axis + (what == "mask")
            found.append(TensorSpec(name(masks[0]), (*shape, slots), dtype, slots_axis=slots_axis))
            found.append(TensorSpec(name(masks[1]), (*shape, chunk), dtype))
    found.append(TensorSpec(ORDER, (1, c.conv_kernel_size - 1, c.conv_kernel_size - 1)))
    if c.attends_to_all:
        found.append(TensorSpec(LOG_SCALE, (1, chunk)))
    return tuple(found)


def of_call(c: InklingConfig, tensors: Tensors, count: int) -> Tensors:
    """What all layers are told of a call of `count` rows: masks, where biases are found, the order of rings, scales."""
    position = tensors["position"]
    found = of_rows(c, tensors, count)
    for kind in dict.fromkeys(c.layer_types or ()):
        name, extent = KINDS[kind], c.head_sizes(kind).extent
        if kind == "hybrid":
            held = tensors[SLOTS].unsqueeze(0)
            found[name("slots_mask")] = slots_mask(position, count, tensors[SLOTS])
        else:
            held = ring_positions(position, ring_of(c))
            found[name("slots_mask")] = ring_slots_mask(position, count, ring_of(c), c.sliding_window_size)
        found[name("slots_index")] = bias_index(distances(position, count, held), extent)
    return found | {ORDER: ring_order(position, c.conv_kernel_size - 1)}


def of_rows(c: InklingConfig, tensors: Tensors, count: int) -> Tensors:
    """What `of_call` says of the call itself: all that layers are told where there is nothing before it."""
    position, n_valid = tensors["position"], tensors["n_valid"]
    # From the position, which cancels: what does not depend on the call, a target would store for each kind of layers.
    here = position[:, None] + torch.arange(count, device=position.device)
    between = distances(position, count, here)  # (B, C, C)
    found: Tensors = {}
    for kind in dict.fromkeys(c.layer_types or ()):
        name, window = KINDS[kind], None if kind == "hybrid" else c.sliding_window_size
        found[name("causal_mask")] = causal_mask(n_valid, count, window)
        found[name("causal_index")] = bias_index(between, c.head_sizes(kind).extent)
    if c.attends_to_all:
        found[LOG_SCALE] = log_scale(position, count, c.log_scaling_n_floor, c.log_scaling_alpha)
    return found


class QueryProjection(nn.Module):
    """(B, C, d) -> queries (B, H, C, hd), of bounded length."""

    def __init__(self, c: InklingConfig, heads: int, dims: int) -> None:
        super().__init__()
        self.dims = dims
        self.linear = nn.Linear(c.hidden_size, heads * dims, bias=False)
        self.norm = ScaledClip(heads, dims, c.qk_l2_clip_threshold)

    def forward(self, x: Tensor, scale: Tensor | None) -> Tensor:
        return self.norm(self.linear(x).unflatten(-1, (-1, self.dims)), scale).transpose(1, 2)


class RowsProjection(nn.Module):
    """(B, C, d) -> what a short convolution makes keys or values of, and that convolution."""

    def __init__(self, c: InklingConfig, heads: int, dims: int, dynamic: bool) -> None:
        super().__init__()
        self.dims = dims
        self.linear = nn.Linear(c.hidden_size, heads * dims, bias=False)
        size, channels = c.conv_kernel_size, heads * dims
        self.sconv: nn.Module = (
            DynamicShortConvolution(channels, size, c.hidden_size, heads)
            if dynamic
            else ShortConvolution(channels, size)
        )

    def forward(self, x: Tensor, rows: CallRows, name: str) -> Tensor:
        """(B, G, C, hd); its inputs are kept as `name`."""
        own, past = rows.add(name, self.linear(x).unflatten(-1, (-1, self.dims)).transpose(1, 2))
        assert past is not None
        return self.sconv(own, past, x)


class GatedOutput(nn.Module):
    """What attention has found, gated by what its queries were made of."""

    def __init__(self, c: InklingConfig, heads: int, dims: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, heads * dims, bias=False)
        self.linear = nn.Linear(heads * dims, c.hidden_size, bias=False)

    def forward(self, seen: Tensor, x: Tensor) -> Tensor:
        return self.linear(seen * torch.sigmoid(self.gate_proj(x)))


class InklingAttention(nn.Module):
    """Attention with a bias by distance and a sink, over keys and values behind short convolutions."""

    def __init__(self, c: InklingConfig, kind: LayerType) -> None:
        super().__init__()
        heads, kv_heads, dims, extent = c.head_sizes(kind)
        self.kind, self.full = KINDS[kind], kind == "hybrid"
        self.attention_operator = False  # in graphs; a target that has one of its own sets it to True
        self.longest, self.eps = c.qk_l2_clip_threshold, c.rms_norm_eps
        self.q_proj = QueryProjection(c, heads, dims)
        self.k_proj = RowsProjection(c, kv_heads, dims, self.full)
        self.v_proj = RowsProjection(c, kv_heads, dims, self.full)
        self.o_proj = GatedOutput(c, heads, dims)
        self.sink_proj = nn.Linear(c.hidden_size, heads, bias=False)
        self.relative_position_bias = RelativeBias(c.hidden_size, heads, c.d_rel, extent, c.rel_l2_clip_threshold)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, rows: CallRows, fixed: Tensors) -> Tensor:
        """Of what queries, keys and values are made of, (B, C, d) each: (B, C, d)."""
        kind, scale = self.kind, fixed[LOG_SCALE] if self.full else None
        keys = clipped(self.k_proj(key, rows, kind("inputs")), self.longest)
        values = rms(self.v_proj(value, rows, kind("inputs")), self.eps)
        keys, past_keys = rows.add(kind("keys"), keys)
        values, past_values = rows.add(kind("values"), values)
        past = None if past_keys is None or past_values is None else (past_keys, past_values)
        sides = ("causal",) if past is None else ("slots", "causal")
        masks = [fixed[kind(f"{side}_mask")] for side in sides]
        biases = self.relative_position_bias(query, tuple(fixed[kind(f"{side}_index")] for side in sides), scale)
        seen = attend(
            self.q_proj(query, scale),
            (keys, values),
            past,
            (masks[0], masks[-1]),  # without a past the first of them is read by none
            (biases[0], biases[-1]),
            self.sink_proj(query).transpose(1, 2).unsqueeze(-1),
            operator=self.attention_operator,
        )
        return self.o_proj(seen.transpose(1, 2).flatten(2), query)


class InklingLayer(nn.Module):
    """One layer. Where it mixes queries, keys and values by themselves, it has a norm for each of them."""

    def __init__(self, c: InklingConfig, index: int) -> None:
        super().__init__()
        assert c.layer_types is not None
        kind, width, eps = c.layer_types[index], c.hidden_size, c.rms_norm_eps
        self.opens_block = index % c.n_layers_per_attn_res_block == 0
        self.place = index - c.loop_layer_index_start  # in the loop
        self.norms = tuple(f"{x}_input_layernorm" for x in "qkv") if kind == "hybrid" else ("input_layernorm",)
        # The first layer of all reads the embedding: there is nothing to mix.
        shape = (width,) if len(self.norms) == 1 else (len(self.norms), width)
        self.attention_input = BlockAttention(*shape) if index else None
        self.mlp_input = BlockAttention(width)
        self.self_attn = InklingAttention(c, kind)
        self.mlp = SparseExperts(
            width,
            n_experts=c.n_routed_experts,
            top_k=c.num_experts_per_tok,
            expert_width=c.moe_intermediate_size,
            scoring="sigmoid",
            scale=c.route_scale,
            caps=(c.mlp_gate_softcap, c.mlp_up_softcap),
        )
        for name in self.norms:
            self.add_module(name, RMSNorm(width, eps))
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.post_attention_convolution = ShortConvolution(width, c.conv_kernel_size)
        self.post_mlp_convolution = ShortConvolution(width, c.conv_kernel_size)
        if c.loop_layer_index_start <= index < c.loop_layer_index_end:
            for name in READS:
                self.add_module(f"{name}_message_gate", MessageGate(width, c.loop_gate_rank, eps))

    def forward(
        self,
        x: Tensor | None,
        sources: list[Tensor],
        k: int | Tensor,
        rows: CallRows,
        fixed: Tensors,
        messages: Messages | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """
        Args:
            x: what the block has added up, (B, C, d); None: the layer opens a block, and nothing asks for it.
            sources: the blocks before and x, normed.
            messages: in the loop.
        Returns:
            x and the sources behind the layer.
        """
        if self.attention_input is None:
            assert x is not None
            mixed = [x] * len(self.norms)
        else:
            mixed = self.attention_input(sources)
        norms, taken = self.norms, None
        if messages is not None:  # which makes three of one mixture
            taken = messages.source(messages.blocks, self.place)
            mixed, norms = mixed * (3 // len(mixed)), norms * (3 // len(norms))
            mixed = [self._with_message(n, m, taken[i], messages) for i, (n, m) in enumerate(zip("qkv", mixed))]
        reads = [self.get_submodule(name)(m) for name, m in zip(norms, mixed)]
        query, key, value = reads * (3 // len(reads))
        seen = self._convolved(self.post_attention_convolution, self.self_attn(query, key, value, rows, fixed), rows)
        if self.opens_block:
            blocks, x = sources, seen
        else:
            assert x is not None
            blocks, x = sources[:-1], x + seen
        entering = self.mlp_input([*blocks, rms(x)])[0]
        if messages is not None and taken is not None:
            entering = self._with_message("mlp", entering, taken[3], messages)
        computed = self.mlp(self.post_attention_layernorm(entering), k, rows.active)
        x = x + self._convolved(self.post_mlp_convolution, computed, rows)
        return x, [*blocks, rms(x)]

    def _with_message(self, name: str, x: Tensor, message: Tensor, messages: Messages) -> Tensor:
        return self.get_submodule(f"{name}_message_gate")(x, message, messages.there)

    def _convolved(self, convolution: ShortConvolution, x: Tensor, rows: CallRows) -> Tensor:
        own, past = rows.add(CONVOLVED, x.unsqueeze(1))
        assert past is not None
        return convolution(own, past, x).squeeze(1)


class InklingStack(nn.Module):
    """Layers one after the other, and what they keep. They are registered where checkpoints have them."""

    def __init__(
        self, c: InklingConfig, layers: Sequence[InklingLayer], kinds: Sequence[LayerType], max_loops: int | None = None
    ) -> None:
        super().__init__()
        self.layers, self.config = tuple(layers), c  # a tuple is not registered
        kept, ring = [], c.conv_kernel_size - 1
        for kind in dict.fromkeys(kinds):
            _, groups, dims, _ = c.head_sizes(kind)
            name, heads = KINDS[kind], groups * list(kinds).count(kind)
            slots = None if kind == "hybrid" else ring_of(c)
            kept += [
                Kept(name("keys"), heads, dims, slots, cache=name.name, which=0),
                Kept(name("values"), heads, dims, slots, cache=name.name, which=1),
                Kept(name("inputs"), 2 * heads, dims, ring, ordered=True),
            ]
        if kinds:
            kept.append(Kept(CONVOLVED, 2 * len(kinds), c.hidden_size, ring, ordered=True))
        policy: KvPolicy = c.kv_policy if max_loops else "all"
        self.rows = KeptRows(tuple(kept), max_loops, policy, c.kv_dtype)

    def forward(
        self,
        x: Tensor | None,
        sources: list[Tensor],
        k: int | Tensor,
        past: Tensors | None,
        fixed: Tensors,
        messages: Messages | None = None,
        active: Tensor | None = None,
        held: Tensors | None = None,
    ) -> tuple[list[Tensor], Tensors]:
        """Through all layers.

        Args:
            x, sources, messages: as in `InklingLayer.forward`.
            k: the loop, from 0; 0 outside loops.
            past: what is kept of the positions before the call, by name; None: there are none.
            fixed: `of_call`; without a past `of_rows`.
            active: (B, C) bool, positions that have not stopped; None: all.
            held: by name, of which stopped positions keep theirs.
        Returns:
            (sources behind the last layer, the rows of the call by name).
        """
        order = {} if past is None else {self.config.conv_kernel_size - 1: fixed[ORDER]}
        rows = self.rows.of_call(k, past, order, active, held)
        for layer in self.layers:
            x, sources = layer(x, sources, k, rows, fixed, messages)
        return sources, rows.rows("")
