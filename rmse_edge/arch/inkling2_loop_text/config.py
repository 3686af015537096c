"""`InklingConfig`: the numbers of an Inkling 2 model, by the names of its published config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

from rmse_edge.arch.common.recurrent import RecurrentConfig
from rmse_edge.errors import ConfigError
from rmse_edge.numbers import Count, EndTokens, Loops, OffOr, Positions, Positive, Token, VocabularySize
from rmse_edge.schema import check_fields

LayerType = Literal["hybrid_sliding", "hybrid"]
FULL_EVERY = 6  # of layers whose kinds the file does not say, each sixth attends to everything
# Other names that transformers has for a field -> the field.
ALIASES: Mapping[str, str] = {
    "sliding_window": "sliding_window_size",
    "num_local_experts": "n_routed_experts",
    "sconv_kernel_size": "conv_kernel_size",
    "model_max_length": "max_position_embeddings",
    "intermediate_size": "moe_intermediate_size",
    "routed_scaling_factor": "route_scale",
}
# Keys of `loop_config`, which may say the loop instead of fields -> the field.
LOOP_KEYS: Mapping[str, str] = {
    "core_start": "loop_layer_index_start",
    "core_end": "loop_layer_index_end",
    "num_passes": "loop_num_passes",
    "gate_rank": "loop_gate_rank",
}


class HeadSizes(NamedTuple):
    """Of the attention of one kind of layers."""

    heads: int
    kv_heads: int
    dims: int
    extent: int  # distances that have a bias


@dataclass(frozen=True)
class InklingConfig(RecurrentConfig):
    """Shape and behaviour of one Inkling 2 model. The defaults are those of transformers 5.24.0."""

    model_type: ClassVar[str] = "inkling2_loop_text"
    trained: ClassVar[str] = "loop_num_passes"
    architectures: ClassVar[tuple[str, ...]] = ("Inkling2LoopForCausalLM",)
    passed_over: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "scoring_func": ("sigmoid",),
        "number_of_conv_states": (4,),
        "tie_word_embeddings": (False,),
    }

    vocab_size: VocabularySize = 201_024  # rows of the embedding
    unpadded_vocab_size: VocabularySize = 200_058  # tokens that are predicted
    hidden_size: Count = 2304
    num_hidden_layers: Count = 24
    num_attention_heads: Count = 24
    num_key_value_heads: Count = 8
    head_dim: Count = 128
    swa_num_attention_heads: Count = 24  # of layers with a window, as the two that follow
    swa_num_key_value_heads: Count = 8
    swa_head_dim: Count = 128
    sliding_window_size: Positions = 1024  # positions that sliding layers see, the own one included
    d_rel: Count = 16
    rel_extent: Positions = 1024  # distances that have a bias in full layers
    log_scaling_n_floor: Positions = 8192  # position from which queries of full layers grow
    log_scaling_alpha: OffOr = 0.1
    layer_types: tuple[LayerType, ...] | None = None
    max_position_embeddings: Positions = 1_048_576  # positions of a text, at most
    rms_norm_eps: Positive = 1e-6
    conv_kernel_size: Count = 4  # positions that a short convolution reads, the own one included
    moe_intermediate_size: Count = 1152  # hidden channels of an expert
    n_routed_experts: Count = 128
    num_experts_per_tok: Count = 8
    route_scale: Positive = 8.0
    qk_l2_clip_threshold: Positive = 22.627416997969522
    rel_l2_clip_threshold: Positive = 8.0
    n_layers_per_attn_res_block: Count = 6  # layers that are summed before the sum is a block to be read by itself
    mlp_gate_softcap: Positive = 4.0
    mlp_up_softcap: Positive = 25.0
    final_logit_softcapping: Positive = 30.0
    loop_layer_index_start: Count = 6  # the first layer that is looped
    loop_layer_index_end: Count = 18  # the one behind the last
    loop_num_passes: Loops = 3  # the trained depth
    loop_gate_rank: Count = 64
    bos_token_id: Token | None = None
    eos_token_id: EndTokens = 200_006
    pad_token_id: Token | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """
        Raises:
            ConfigError: as `PublishedConfig.from_dict`; or two keys say different things about one number.
        """
        found = dict(values)
        loop = found.pop("loop_config", None)
        if loop is not None and not (isinstance(loop, dict) and set(loop) <= set(LOOP_KEYS)):
            got, wanted = json.dumps(loop)[:60], ", ".join(LOOP_KEYS)
            raise ConfigError(f"{where}: loop_config: got {got}, expected an object with some of {wanted}")
        others = [(f"loop_config.{key}", LOOP_KEYS[key], value) for key, value in (loop or {}).items()]
        others += [(key, ALIASES[key], found.pop(key)) for key in ALIASES if key in found]
        for key, field, value in others:
            if found.setdefault(field, value) != value:
                raise ConfigError(f"{where}: {key}: got {value!r}, but {field} is {found[field]!r}; keep one of them")
        size = found.get("vocab_size")
        if isinstance(size, int) and "unpadded_vocab_size" not in found:  # a smaller table has no rows to leave out
            found["unpadded_vocab_size"] = min(size, cls.unpadded_vocab_size)
        return super().from_dict(found, where)

    def __post_init__(self) -> None:
        if self.layer_types is None:
            of_layer = (i % FULL_EVERY == FULL_EVERY - 1 for i in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", tuple("hybrid" if full else "hybrid_sliding" for full in of_layer))
        check_fields(self, ConfigError)
        for name, heads in (
            ("num_key_value_heads", self.num_attention_heads),
            ("swa_num_key_value_heads", self.swa_num_attention_heads),
        ):
            whole = name.replace("key_value", "attention")
            self.require(heads % getattr(self, name) == 0, name, f"a divisor of {whole} ({heads})")
        size = self.vocab_size
        self.require(self.unpadded_vocab_size <= size, "unpadded_vocab_size", f"at most vocab_size ({size})")
        most = self.n_routed_experts
        self.require(self.num_experts_per_tok <= most, "num_experts_per_tok", f"at most n_routed_experts ({most})")
        self.require(self.conv_kernel_size > 1, "conv_kernel_size", "at least 2")
        self._check_layers()
        policy = '"repeat" or "all": what a layer keeps is no projection of a state that positions stop with'
        self.require(self.kv_policy != "propagate", "kv_policy", policy)
        self.check_loops()
        self.check_tokens()

    def _check_layers(self) -> None:
        count, block = self.num_hidden_layers, self.n_layers_per_attn_res_block
        assert self.layer_types is not None
        if len(self.layer_types) != count:
            raise ConfigError(f"layer_types: got {len(self.layer_types)} layers, expected num_hidden_layers ({count})")
        for name in ("loop_layer_index_start", "loop_layer_index_end"):
            whole = f"a multiple of n_layers_per_attn_res_block ({block})"
            self.require(getattr(self, name) % block == 0, name, whole)
        start, end = self.loop_layer_index_start, self.loop_layer_index_end
        between = f"above loop_layer_index_start ({start}) and at most num_hidden_layers ({count})"
        self.require(start < end <= count, "loop_layer_index_end", between)

    def head_sizes(self, kind: LayerType) -> HeadSizes:
        """Of the attention of layers of one kind."""
        if kind == "hybrid":
            return HeadSizes(self.num_attention_heads, self.num_key_value_heads, self.head_dim, self.rel_extent)
        window = self.sliding_window_size
        return HeadSizes(self.swa_num_attention_heads, self.swa_num_key_value_heads, self.swa_head_dim, window)

    @property
    def sections(self) -> tuple[slice, slice, slice]:
        """Layers before, in and behind the loop."""
        start, end = self.loop_layer_index_start, self.loop_layer_index_end
        return slice(0, start), slice(start, end), slice(end, self.num_hidden_layers)

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks that the loop reads, that before the loop included; and blocks of one pass."""
        each = self.n_layers_per_attn_res_block
        start = self.loop_layer_index_start
        return start // each + 1, (self.loop_layer_index_end - start) // each

    @property
    def attends_to_all(self) -> bool:
        """Whether some layer has no window."""
        assert self.layer_types is not None
        return "hybrid" in self.layer_types
