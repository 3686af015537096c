"""`RodimusConfig`: the numbers of a Rodimus or Rodimus+ model, by the names of its published config.json.

Published files have the numbers of a layer's two parts in objects of their own, `mixer_cfg` and `attn_cfg`; here they are fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from rmse_edge.arch.common.hybrid import HybridBase, LayerPlan, MixerPlan
from rmse_edge.errors import ConfigError
from rmse_edge.numbers import Count, EndTokens, Positions, Positive, Token, VocabularySize
from rmse_edge.schema import check_fields

# Keys of the objects -> the field, or None: how the published code computes the same.
MIXER_KEYS: Mapping[str, str | None] = {
    "d_conv": "d_conv",
    "expand_ratio": "expand_ratio",
    "mem_size": "mem_size",
    "input_gate_low_rank": "input_gate_low_rank",
    "mode": None,
}
ATTENTION_KEYS: Mapping[str, str | None] = {
    "num_heads": "num_heads",
    "window_size": "window_size",
    "ffn_expand_ratio": "ffn_expand_ratio",
    "num_heads_k": None,  # checked by itself
    "num_heads_v": None,
}


def aligned(width: float) -> int:
    """Channels as the published code rounds them, up to a multiple of 8."""
    return -(-int(width) // 8) * 8


@dataclass(frozen=True)
class RodimusConfig(HybridBase):
    """Shape and behaviour of one Rodimus model. The defaults are those of the published code."""

    model_type: ClassVar[str] = "rodimus"
    architectures: ClassVar[tuple[str, ...]] = ("RodimusForCausalLM",)
    passed_over: ClassVar[frozenset[str]] = frozenset(
        "rescale_prenorm_residual residual_in_fp32 use_fast_path use_fused_cross_entropy use_fused_swiglu dropout "
        "activation_dropout attention_dropout no_weight_decay_on_bias no_weight_decay_on_norm "
        "no_weight_decay_on_embedding".split()
    )
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "use_scale_embedding": (False,),
        "use_norm_embedding": (False,),
    }

    block_type: Literal["rodimus", "rodimus_plus"] = "rodimus"
    d_model: Count = 2048
    n_layer: Count = 24
    vocab_size: VocabularySize = 50_277
    norm_epsilon: Positive = 1e-5
    max_position_embeddings: Positions = 2048
    d_conv: Count = 4
    expand_ratio: Positive = 2.0
    mem_size: Count = 64
    input_gate_low_rank: Count | None = None  # None: d_model / 64, at least 16
    num_heads: Count | None = None  # of Rodimus+, as the two that follow
    window_size: Count | None = None  # twice the positions that are seen before the own one
    ffn_expand_ratio: Positive = 4 / 3
    bos_token_id: Token | None = 0
    eos_token_id: EndTokens = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """
        Raises:
            ConfigError: as `PublishedConfig.from_dict`; or a key of `mixer_cfg` or `attn_cfg` is not known here.
        """
        found = dict(values)
        for section, keys in (("mixer_cfg", MIXER_KEYS), ("attn_cfg", ATTENTION_KEYS)):
            given = found.pop(section, None)
            if given is None:
                continue
            if not isinstance(given, dict) or set(given) - set(keys):
                wanted = ", ".join(keys)
                raise ConfigError(
                    f"{where}: {section}: got {str(given)[:60]}, expected an object with some of {wanted}"
                )
            for key, field in keys.items():
                if field is None or key not in given:
                    continue
                value = None if given[key] == "auto" else given[key]
                if isinstance(value, int) and field in ("expand_ratio", "ffn_expand_ratio"):
                    value = float(value)
                if found.setdefault(field, value) != value:
                    raise ConfigError(
                        f"{where}: {section}.{key}: got {value!r}, but {field} is {found[field]!r}; keep one of them"
                    )
            heads = given.get("num_heads")
            for key, expected in (("num_heads_k", 1), ("num_heads_v", heads)):
                if given.get(key, expected) != expected:
                    raise ConfigError(f"{where}: {section}.{key}: got {given[key]!r}, expected {expected!r}")
        return super().from_dict(found, where)

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        self.check_think(f"n_layer ({self.n_layer})")
        if self.block_type == "rodimus_plus":
            for name in ("num_heads", "window_size"):
                self.require(getattr(self, name) is not None, name, "a number, since block_type is rodimus_plus")
            even = f"a divisor of d_model ({self.d_model}) that leaves each head an even number of channels"
            self.require(self.d_model % (2 * (self.num_heads or 1)) == 0, "num_heads", even)
        self.check_hybrid()

    # ------------------------------------------------------------------------------------------------ HybridBase

    @property
    def width(self) -> int:
        return self.d_model

    @property
    def count(self) -> int:
        return self.n_layer

    @property
    def turning(self) -> tuple[int, float]:
        plus = self.block_type == "rodimus_plus"
        return (self.d_model // (self.num_heads or 1) if plus else 0), 10_000.0

    @property
    def eps(self) -> float:
        return self.norm_epsilon

    @property
    def plan(self) -> tuple[LayerPlan, ...]:
        rodimus = MixerPlan(
            "rodimus",
            {
                "channels": aligned(self.d_model * self.expand_ratio),
                "state_dim": self.mem_size,
                "gate_rank": self.input_gate_low_rank or max(self.d_model // 64, 16),
                "taps": self.d_conv,
                "norm_eps": self.norm_epsilon,
            },
        )
        if self.block_type == "rodimus":
            return (LayerPlan((rodimus,)),) * self.n_layer
        dims, _ = self.turning
        assert self.num_heads is not None and self.window_size is not None
        sizes = {"n_heads": self.num_heads, "head_dim": dims, "rotary_dims": dims, "window": self.window_size // 2 + 1}
        layer = LayerPlan(
            (rodimus, MixerPlan("shared_key_attention", sizes)),
            dense=aligned(self.d_model * self.ffn_expand_ratio),
            two_hop=True,
        )
        return (layer,) * self.n_layer
