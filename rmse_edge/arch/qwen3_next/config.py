"""`Qwen3NextConfig`: the numbers of a Qwen3-Next model, by the names of its published config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from rmse_edge.arch.common.hybrid import HybridBase, LayerPlan, MixerPlan
from rmse_edge.errors import ConfigError
from rmse_edge.numbers import Count, Positions, Positive, Some, VocabularySize
from rmse_edge.schema import Expected, check_fields

LayerType = Literal["linear_attention", "full_attention"]
Portion = Annotated[float, Field(gt=0, le=1), Expected("a number above 0, at most 1")]
ROPE_KEYS = ("rope_theta", "partial_rotary_factor")


@dataclass(frozen=True)
class Qwen3NextConfig(HybridBase):
    """Shape and behaviour of one Qwen3-Next model. The defaults are those of transformers 5.24.0."""

    model_type: ClassVar[str] = "qwen3_next"
    architectures: ClassVar[tuple[str, ...]] = ("Qwen3NextForCausalLM",)
    listed: ClassVar[tuple[str, ...]] = ("layer_types", "mlp_only_layers", "think")
    passed_over: ClassVar[frozenset[str]] = frozenset(
        "attention_dropout output_router_logits router_aux_loss_coef max_window_layers".split()
    )
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "norm_topk_prob": (True,),
        "rope_scaling": (None,),
        "use_sliding_window": (False,),
        "sliding_window": (None,),
    }

    vocab_size: VocabularySize = 151_936
    hidden_size: Count = 2048
    intermediate_size: Count = 5632  # of layers without experts
    num_hidden_layers: Count = 48
    num_attention_heads: Count = 16
    num_key_value_heads: Count = 2
    head_dim: Count = 256
    max_position_embeddings: Positions = 32_768
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 10_000.0
    partial_rotary_factor: Portion = 0.25
    linear_conv_kernel_dim: Count = 4
    linear_key_head_dim: Count = 128
    linear_value_head_dim: Count = 128
    linear_num_key_heads: Count = 16
    linear_num_value_heads: Count = 32
    decoder_sparse_step: Count = 1
    mlp_only_layers: tuple[Some, ...] = ()
    moe_intermediate_size: Count = 512
    shared_expert_intermediate_size: Count = 512
    num_experts_per_tok: Count = 10
    num_experts: Some = 512
    layer_types: tuple[LayerType, ...] | None = None  # None: every `full_attention_interval`th attends
    full_attention_interval: Count = 4

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """
        Raises:
            ConfigError: as `PublishedConfig.from_dict`; or `rope_parameters` says something else than the other keys.
        """
        found = dict(values)
        rope = found.pop("rope_parameters", None)
        if rope is not None:
            kind = rope.get("rope_type", "default") if isinstance(rope, dict) else None
            if kind != "default" or set(rope) - {"rope_type", *ROPE_KEYS}:
                raise ConfigError(
                    f"{where}: rope_parameters: got {str(rope)[:60]}, expected rope_type default, a theta and a share"
                )
            for key in ROPE_KEYS:
                if key in rope and found.setdefault(key, rope[key]) != rope[key]:
                    raise ConfigError(f"{where}: {key}: got {found[key]!r}, rope_parameters says {rope[key]!r}")
        if found.get("mlp_only_layers", ()) is None:
            found["mlp_only_layers"] = ()
        return super().from_dict(found, where)

    def __post_init__(self) -> None:
        if self.layer_types is None:
            full = (bool((i + 1) % self.full_attention_interval) for i in range(self.num_hidden_layers))
            object.__setattr__(
                self, "layer_types", tuple("linear_attention" if linear else "full_attention" for linear in full)
            )
        check_fields(self, ConfigError)
        count = self.num_hidden_layers
        assert self.layer_types is not None
        if len(self.layer_types) != count:
            raise ConfigError(f"layer_types: got {len(self.layer_types)} layers, expected num_hidden_layers ({count})")
        self.check_think(f"num_hidden_layers ({count})")
        heads = self.num_attention_heads
        divisor = f"a divisor of num_attention_heads ({heads})"
        self.require(heads % self.num_key_value_heads == 0, "num_key_value_heads", divisor)
        values = self.linear_num_value_heads
        divisor = f"a divisor of linear_num_value_heads ({values})"
        self.require(values % self.linear_num_key_heads == 0, "linear_num_key_heads", divisor)
        even = f"a share of head_dim ({self.head_dim}) that is an even number of channels"
        self.require(self.turning[0] % 2 == 0, "partial_rotary_factor", even)
        if self.num_experts:
            most = f"at most num_experts ({self.num_experts})"
            self.require(self.num_experts_per_tok <= self.num_experts, "num_experts_per_tok", most)
        self.check_hybrid()

    # ------------------------------------------------------------------------------------------------ HybridBase

    @property
    def width(self) -> int:
        return self.hidden_size

    @property
    def count(self) -> int:
        return self.num_hidden_layers

    @property
    def turning(self) -> tuple[int, float]:
        assert self.layer_types is not None
        attends = "full_attention" in self.layer_types
        return (int(self.head_dim * self.partial_rotary_factor) if attends else 0), self.rope_theta

    @property
    def eps(self) -> float:
        return self.rms_norm_eps

    def is_sparse(self, i: int) -> bool:
        """Whether layer i has experts."""
        return self.num_experts > 0 and i not in self.mlp_only_layers and (i + 1) % self.decoder_sparse_step == 0

    @property
    def plan(self) -> tuple[LayerPlan, ...]:
        deltanet = {
            "key_heads": self.linear_num_key_heads,
            "value_heads": self.linear_num_value_heads,
            "key_dim": self.linear_key_head_dim,
            "value_dim": self.linear_value_head_dim,
            "taps": self.linear_conv_kernel_dim,
            "norm_eps": self.rms_norm_eps,
        }
        attention = {
            "n_heads": self.num_attention_heads,
            "n_kv_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "rotary_dims": int(self.head_dim * self.partial_rotary_factor),
            "window": None,
            "norm_eps": self.rms_norm_eps,
        }
        experts = {
            "n_experts": self.num_experts,
            "top_k": self.num_experts_per_tok,
            "expert_width": self.moe_intermediate_size,
            "shared_width": self.shared_expert_intermediate_size,
            "shared_gate": True,
        }
        found = []
        for i, kind in enumerate(self.layer_types or ()):
            linear = kind == "linear_attention"
            mixer = MixerPlan("gated_deltanet", deltanet) if linear else MixerPlan("gated_attention", attention)
            sparse = self.is_sparse(i)
            found.append(LayerPlan((mixer,), experts if sparse else {}, 0 if sparse else self.intermediate_size))
        return tuple(found)
