"""`HuginnConfig`: the numbers of a Huginn model, by the names of its published config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isclose
from typing import Any, ClassVar, Literal

from rmse_edge.arch.common.recurrent import RecurrentConfig
from rmse_edge.errors import ConfigError
from rmse_edge.numbers import Count, EndTokens, Loops, Positions, Positive, Token, VocabularySize
from rmse_edge.schema import check_fields

# What a published file may say once more in other words: key -> what it must be, of the other fields.
DERIVED = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_heads",
    "padded_vocab_size": "vocab_size",
    "tie_word_embeddings": "tie_embeddings",
    "head_dim": "head_width",
    "n_layers": "n_layers",
    "num_hidden_layers": "n_layers",
}


@dataclass(frozen=True)
class HuginnConfig(RecurrentConfig):
    """Shape and behaviour of one Huginn model. The defaults are those of Huginn-0125."""

    model_type: ClassVar[str] = "huginn_raven"
    trained: ClassVar[str] = "mean_recurrence"
    architectures: ClassVar[tuple[str, ...]] = ("RavenForCausalLM",)
    # How it was trained, and how its published code computes the same.
    passed_over: ClassVar[frozenset[str]] = frozenset(
        "padding_multiple init_strategy init_orthogonal init_values sampling_scheme mean_backprop_depth "
        "activation_checkpoint_impl effective_expected_depth test_time_noise_type use_fused_head".split()
    )
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "architecture_class_name": ("RecurrentGPT",),
        "block_class_name": ("SandwichBlock",),
        "norm_class_name": ("RMSNorm_llama",),
        "mlp_class_name": ("GatedMLP",),
        "nonlin_name": ("SiLU",),
        "injection_type": ("linear",),
        "bias": (False,),
        "test_time_noise": (0, None),
    }

    vocab_size: VocabularySize = 65_536
    n_embd: Count = 5280
    n_heads: Count = 55
    intermediate_size: Count = 17_920
    n_layers_in_prelude: Count = 2
    n_layers_in_recurrent_block: Count = 4
    n_layers_in_coda: Count = 2
    mean_recurrence: Loops = 32  # the trained depth: what the published code runs unless told otherwise
    block_size: Positions = 4096  # positions of a text, at most
    norm_eps: Positive = 1e-6
    rope_base: Positive = 50_000.0
    qk_bias: bool = True
    tie_embeddings: bool = True
    state_init: Literal["like-init", "zero"] = "like-init"  # what the loop begins from: noise, or zeros
    bos_token_id: Token | None = None
    eos_token_id: EndTokens = None
    pad_token_id: Token | None = None

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        self.require(self.n_embd % (2 * self.n_heads) == 0, "n_embd", f"a multiple of 2 * n_heads ({2 * self.n_heads})")
        self.check_loops()
        self.check_tokens()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> HuginnConfig:
        own = {key: value for key, value in values.items() if key not in DERIVED}
        found = super().from_dict(own, where)
        for key, name in DERIVED.items():
            if key in values and values[key] != getattr(found, name):
                raise ConfigError(f"{where}: {key}: got {values[key]!r}, expected {getattr(found, name)!r}, as the other "
                                  "keys say")  # fmt: skip
        scale = values["init_values"].get("embed_scale") if isinstance(values.get("init_values"), dict) else None
        if scale is not None and not (
            isinstance(scale, (int, float)) and isclose(scale, found.n_embd**0.5, rel_tol=1e-6)
        ):
            raise ConfigError(
                f"{where}: init_values.embed_scale: got {scale!r}, expected sqrt(n_embd), {found.n_embd**0.5!r}"
            )
        return found

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_heads

    @property
    def n_layers(self) -> int:
        """That the model has, each counted once."""
        return self.n_layers_in_prelude + self.n_layers_in_recurrent_block + self.n_layers_in_coda
