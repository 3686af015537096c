"""`DrLlmConfig`: the numbers of a Llama with routers, by the names of a Llama's published config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from rmse_edge.arch.common.published import PublishedConfig
from rmse_edge.errors import ConfigError
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.plan import MOST_EXECUTIONS, ROUTERS
from rmse_edge.numbers import (
    MAX_LOOPS,
    SEGMENT,
    Count,
    EndTokens,
    Positions,
    Positive,
    Share,
    Token,
    VocabularySize,
)
from rmse_edge.schema import Expected, check_fields

Route = Annotated[
    float,
    Field(gt=-1, allow_inf_nan=False),
    Expected("a number above -1 (-0.5: as the routers say, 0.5: every layer once)"),
]


ONCE = (0.0, 4.0, 0.0)  # logits of a router that was not trained: the layer is run once


@dataclass(frozen=True)
class DrLlmConfig(PublishedConfig):
    """Shape and behaviour of one Dr.LLM. The defaults are those of Llama-3.2-1B."""

    model_type: ClassVar[str] = "dr_llm"
    architectures: ClassVar[tuple[str, ...]] = ("LlamaForCausalLM",)
    passed_over: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_scaling": (None,),
        "router_outputs": (["skip", "execute", "repeat"],),
    }

    vocab_size: VocabularySize = 128_256
    hidden_size: Count = 2048
    intermediate_size: Count = 8192
    num_hidden_layers: Count = 16
    num_attention_heads: Count = 32
    num_key_value_heads: Count = 8
    head_dim: Count | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: Positions = 131_072  # positions of a text, at most
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive = 500_000.0
    tie_word_embeddings: bool = True
    bos_token_id: Token | None = None
    eos_token_id: EndTokens = None
    pad_token_id: Token | None = None
    num_windows: Count = 8  # of a prompt, whose means a router reads
    router_hidden: Count = 128
    # What published files do not have.
    routed_positions: Positions = SEGMENT  # of a prompt that the routers read at most: all of one call
    route: Route = ROUTERS  # rmse_edge/loop/plan.py
    kv_dtype: Literal["float32", "float16"] = "float32"
    block_size: Positions | None = None  # positions of one training sequence, of models that were trained here
    dropout: Share = 0.0

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        heads = self.num_attention_heads
        if self.head_dim is None:
            self.require(
                self.hidden_size % heads == 0,
                "hidden_size",
                f"a multiple of num_attention_heads ({heads}), or a head_dim",
            )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        self.require(
            heads % self.num_key_value_heads == 0, "num_key_value_heads", f"a divisor of num_attention_heads ({heads})"
        )
        self.require(self.head_width % 2 == 0, "head_dim", "an even number")
        most = MAX_LOOPS // MOST_EXECUTIONS
        self.require(
            self.num_hidden_layers <= most,
            "num_hidden_layers",
            f"at most {most}: each may be run twice, {MAX_LOOPS} executions in all",
        )
        if self.block_size is not None:
            most = self.max_position_embeddings
            self.require(self.block_size <= most, "block_size", f"at most max_position_embeddings ({most})")
        self.check_tokens()

    @property
    def max_loops(self) -> int:
        """Executions of layers that a text may have."""
        return MOST_EXECUTIONS * self.num_hidden_layers

    @property
    def prompt(self) -> int:
        """Positions of a prompt that the routers read at most."""
        return min(self.routed_positions, self.max_position_embeddings)

    @property
    def head_width(self) -> int:
        assert self.head_dim is not None
        return self.head_dim

    @property
    def dials(self) -> Dials:
        """The settings of the file."""
        return Dials(self.max_loops, route=self.route)
