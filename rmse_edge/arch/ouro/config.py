"""`OuroConfig`: the numbers of an Ouro model, by the names of its published config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from rmse_edge.arch.common.published import PublishedConfig
from rmse_edge.errors import ConfigError
from rmse_edge.loop.dials import Dials
from rmse_edge.numbers import (
    MAX_LOOPS,
    Count,
    EndTokens,
    KvDtype,
    Loops,
    OffOr,
    Positions,
    Positive,
    Share,
    Some,
    Token,
    VocabularySize,
)
from rmse_edge.schema import Expected, check_fields

Threshold = Annotated[Positive, Expected("a positive number (1 or more disables the gate)")]


@dataclass(frozen=True)
class OuroConfig(PublishedConfig):
    """Shape and behaviour of one Ouro model. The defaults are those of Ouro-1.4B."""

    model_type: ClassVar[str] = "ouro"
    architectures: ClassVar[tuple[str, ...]] = ("OuroForCausalLM",)
    passed_over: ClassVar[frozenset[str]] = frozenset({"attention_dropout", "max_window_layers"})
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_sliding_window": (False,),
        "rope_scaling": (None,),
        # With these the published code picks another state than the gate's, or mixes all.
        "use_weighted_exit": (False, None),
        "exit_at_step": (None,),
    }

    vocab_size: VocabularySize = 49_152
    hidden_size: Count = 2048
    intermediate_size: Count = 5632
    num_hidden_layers: Count = 24  # of the block that is looped
    num_attention_heads: Count = 16
    num_key_value_heads: Count | None = None  # None: as many as there are heads
    head_dim: Count | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: Positions = 65_536  # positions of a text, at most
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 1_000_000.0
    total_ut_steps: Loops = 4  # the trained depth
    early_exit_threshold: Threshold = 1.0  # a position stops when 1 - survival >= this; 1 or more disables the gate
    tie_word_embeddings: bool = False
    bos_token_id: Token | None = None
    eos_token_id: EndTokens = None
    pad_token_id: Token | None = None
    # What published files do not have.
    untrained_loops: Some = 0  # iterations beyond the trained depth that may be asked for
    min_loops: Loops = 1
    exit_epsilon: OffOr = 0.0  # a position stops when |h' - h| < this * |h'|; 0 disables
    kv_policy: Literal["propagate", "repeat", "all"] = "propagate"  # rmse_edge/layers/stack.py
    kv_dtype: KvDtype = "float32"
    block_size: Positions | None = None  # positions of one training sequence, of models that were trained here
    dropout: Share = 0.0

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        heads = self.num_attention_heads
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", heads)
        if self.head_dim is None:
            self.require(
                self.hidden_size % heads == 0,
                "hidden_size",
                f"a multiple of num_attention_heads ({heads}), or a head_dim",
            )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        assert self.num_key_value_heads is not None and self.head_dim is not None
        self.require(
            heads % self.num_key_value_heads == 0, "num_key_value_heads", f"a divisor of num_attention_heads ({heads})"
        )
        self.require(self.head_dim % 2 == 0, "head_dim", "an even number")
        self.require(
            self.min_loops <= self.total_ut_steps, "min_loops", f"at most total_ut_steps ({self.total_ut_steps})"
        )
        most = MAX_LOOPS - self.total_ut_steps
        self.require(self.untrained_loops <= most, "untrained_loops", f"at most {most}, {MAX_LOOPS} loops in all")
        if self.block_size is not None:
            most = self.max_position_embeddings
            self.require(self.block_size <= most, "block_size", f"at most max_position_embeddings ({most})")
        self.check_tokens()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> OuroConfig:
        values = dict(values)
        layers, sliding = values.pop("layer_types", None), values.pop("sliding_window", None)
        if layers is not None:
            if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
                raise ConfigError(
                    f"{where}: layer_types: got {str(layers)[:60]}, expected full_attention for every layer"
                )
            if (count := values.get("num_hidden_layers", cls.num_hidden_layers)) != len(layers):
                raise ConfigError(f"{where}: layer_types: got {len(layers)} layers, num_hidden_layers says {count}")
        if sliding is not None and values.get("use_sliding_window", True):
            raise ConfigError(f"{where}: sliding_window: got {sliding!r}, expected null, or use_sliding_window false")
        rope = values.pop("rope_parameters", None)
        if rope is not None:
            kind = rope.get("rope_type", "default") if isinstance(rope, dict) else None
            if kind != "default" or set(rope) - {"rope_type", "rope_theta"}:
                raise ConfigError(
                    f"{where}: rope_parameters: got {str(rope)[:60]}, expected rope_type default and a theta"
                )
            stated = values.setdefault("rope_theta", rope.get("rope_theta", cls.rope_theta))
            if stated != rope.get("rope_theta", stated):
                raise ConfigError(f"{where}: rope_theta: got {stated!r}, rope_parameters says {rope['rope_theta']!r}")
        return super().from_dict(values, where)

    @property
    def max_loops(self) -> int:
        """Loops that may be asked for."""
        return self.total_ut_steps + self.untrained_loops

    @property
    def kv_heads(self) -> int:
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def head_width(self) -> int:
        assert self.head_dim is not None
        return self.head_dim

    @property
    def dials(self) -> Dials:
        """The settings of the file."""
        return Dials(self.total_ut_steps, self.min_loops, self.early_exit_threshold, self.exit_epsilon)
