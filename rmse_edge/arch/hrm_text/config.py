"""`HrmTextConfig`: the numbers of an HRM-Text model, by the names of its published config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rmse_edge.arch.common.recurrent import RecurrentConfig
from rmse_edge.errors import ConfigError
from rmse_edge.numbers import SEGMENT, Count, EndTokens, Loops, Positions, Positive, Token, VocabularySize
from rmse_edge.schema import check_fields

THETA = 10_000.0  # of the angles, where the file does not say
ROPE = {"rope_type": "default"}  # the only way of making angles


@dataclass(frozen=True)
class HrmTextConfig(RecurrentConfig):
    """Shape and behaviour of one HRM-Text model. The defaults are those of transformers 5.24.0.

    A published file counts layers twice. `num_layers_per_stack` is how many each of the two stacks has.
    `num_hidden_layers` counts calls of layers, num_layers_per_stack * H_cycles * (L_cycles + 1), unless the file lacks the
    other: then it is the number of each stack. Here both are always there, and must agree.
    """

    model_type: ClassVar[str] = "hrm_text"
    trained: ClassVar[str] = "H_cycles"
    architectures: ClassVar[tuple[str, ...]] = ("HrmTextForCausalLM",)
    passed_over: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
    }

    vocab_size: VocabularySize = 151_808
    hidden_size: Count = 1536
    intermediate_size: Count = 4096
    num_layers_per_stack: Count | None = None  # of L and of H; None: num_hidden_layers says it
    num_hidden_layers: Count | None = None  # calls of layers; None: as the other numbers say
    num_attention_heads: Count = 12  # of queries, keys and values alike
    head_dim: Count = 128
    H_cycles: Loops = 2  # the trained depth: iterations, each of them L_cycles calls of L and one of H
    L_cycles: Loops = 3
    L_bp_cycles: tuple[Count, ...] = (2,)  # through how many calls of L its training goes back; kept, not used
    max_position_embeddings: Positions = 2048  # positions of a text, at most
    rms_norm_eps: Positive = 1e-6
    initializer_range: Positive = 0.02
    embedding_scale: Positive | None = None  # None: 1 / initializer_range
    rope_parameters: dict[str, Any] | None = None  # rope_type and rope_theta; None: `THETA`
    prefix_lm: bool = True  # whether a prompt may be told apart, whose positions all see each other
    # Positions of the longest prefix that may be read: all of it is one call, so the model has calls of as many. More than
    # `SEGMENT` are a third size of calls. No key of published files.
    longest_prefix: Positions = SEGMENT
    tie_word_embeddings: bool = False
    bos_token_id: Token | None = None
    eos_token_id: EndTokens = None
    pad_token_id: Token | None = None

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        if self.embedding_scale is None:
            object.__setattr__(self, "embedding_scale", 1 / self.initializer_range)
        self._check_layers()
        self.require(self.head_dim % 2 == 0, "head_dim", "an even number")
        heads = self.num_attention_heads
        self.require(self.hidden_size % heads == 0, "hidden_size", f"a multiple of num_attention_heads ({heads})")
        object.__setattr__(self, "rope_parameters", {**ROPE, "rope_theta": self._theta()})
        self.require(
            self.longest_prefix == SEGMENT or self.prefix_lm, "longest_prefix", f"{SEGMENT}, since prefix_lm is off"
        )
        self.check_loops()
        self.check_tokens()

    def _check_layers(self) -> None:
        """Fail where the two numbers of layers contradict each other; fill in what is left out."""
        calls = self.H_cycles * (self.L_cycles + 1)
        if self.num_layers_per_stack is None:
            object.__setattr__(
                self, "num_layers_per_stack", 16 if self.num_hidden_layers is None else self.num_hidden_layers
            )
            object.__setattr__(self, "num_hidden_layers", None)
        count = self.layers * calls
        if self.num_hidden_layers is None:
            object.__setattr__(self, "num_hidden_layers", count)
        rule = "num_layers_per_stack * H_cycles * (L_cycles + 1)"
        self.require(self.num_hidden_layers == count, "num_hidden_layers", f"{rule} ({count})")

    def _theta(self) -> float:
        """The base of the angles; fail where they are made otherwise than here."""
        rope = {"rope_theta": THETA, **(self.rope_parameters or {})}
        theta = rope["rope_theta"]
        if (
            {**ROPE, **rope} != {**ROPE, "rope_theta": theta}
            or not isinstance(theta, (int, float))
            or isinstance(theta, bool)
            or not 0 < theta < float("inf")
        ):
            raise ConfigError(f"rope_parameters: got {str(rope)[:60]}, expected rope_type default and a rope_theta")
        return float(theta)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> HrmTextConfig:
        own = dict(values)
        heads = own.pop("num_key_value_heads", None)  # which transformers refuses, and other tools write
        if "rope_theta" in own:  # as older files have it
            theta, rope = own.pop("rope_theta"), own.get("rope_parameters")
            if isinstance(rope, dict) and rope.get("rope_theta", theta) != theta:
                raise ConfigError(f"{where}: rope_theta: got {theta!r}, rope_parameters says {rope['rope_theta']!r}")
            own["rope_parameters"] = {**(rope if isinstance(rope, dict) else {}), "rope_theta": theta}
        found = super().from_dict(own, where)
        if heads not in (None, found.num_attention_heads):
            raise ConfigError(
                f"{where}: num_key_value_heads: got {heads!r}, expected num_attention_heads ({found.num_attention_heads})"
            )
        return found

    @property
    def layers(self) -> int:
        """Of each of the two stacks."""
        assert self.num_layers_per_stack is not None
        return self.num_layers_per_stack

    @property
    def head_width(self) -> int:
        return self.head_dim

    @property
    def rope_theta(self) -> float:
        assert self.rope_parameters is not None
        return self.rope_parameters["rope_theta"]
