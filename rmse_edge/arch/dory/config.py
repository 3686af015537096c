"""`DoryConfig`: the numbers of a Dory model, by the names of its published config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rmse_edge.arch.common.recurrent import RecurrentConfig
from rmse_edge.errors import ConfigError
from rmse_edge.numbers import Count, EndTokens, Loops, Positions, Positive, Token, VocabularySize
from rmse_edge.schema import check_fields

Attention = Literal["sliding_attention", "full_attention"]
Block = Literal["sliding_attention", "full_attention", "mlp"]
THETAS: Mapping[Attention, float] = {"sliding_attention": 10_000.0, "full_attention": 10_000_000.0}
FULL_EVERY = 4  # of layers whose kinds the file does not say, each fourth attends to everything
DEFAULT = {"rope_type": "default"}  # the only way of making angles
SECTIONS = ("n_input_layers", "n_recurrent_layers", "n_output_layers")


@dataclass(frozen=True)
class DoryConfig(RecurrentConfig):
    """Shape and behaviour of one Dory model. The defaults are those of transformers 5.24.0, of the 4B model.

    A published file counts an attention and an MLP as two layers, and names both in `layer_types`; a file without "mlp" there
    counts the two as one. The fields keep what the file says, so that it is written as it was read; `sections` and
    `attention` count layers of an attention and an MLP.
    """

    model_type: ClassVar[str] = "dory"
    trained: ClassVar[str] = "n_recurrent_loops"
    architectures: ClassVar[tuple[str, ...]] = ("DoryForCausalLM",)
    passed_over: ClassVar[frozenset[str]] = frozenset({"attention_dropout"})
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
    }

    vocab_size: VocabularySize = 131_072
    hidden_size: Count = 2560
    intermediate_size: Count = 7168
    num_hidden_layers: Count = 36
    n_input_layers: Count = 8
    n_recurrent_layers: Count | None = None  # None: those that are left
    n_output_layers: Count = 8
    n_recurrent_loops: Loops = 2  # the trained depth
    num_attention_heads: Count = 16
    num_key_value_heads: Count = 4
    head_dim: Count = 256
    layer_types: tuple[Block, ...] | None = None
    sliding_window: Positions | None = 1024  # positions that sliding layers see, the own one included
    rope_parameters: dict[str, Any] | None = None  # by kind of attention: rope_type and rope_theta; None: `THETAS`
    max_position_embeddings: Positions = 8192  # positions of a text, at most
    # Learned scales are stored as multiples of numbers that these two give, see rmse_edge/arch/dory/layers.py.
    initializer_range: Positive = 0.0177
    ngpt_alpha_init: Positive = 0.05
    # "last_loop": all loops read one set of keys and values, which holds those of the last loop.
    recurrent_kv_cache_mode: Literal["per_loop", "last_loop"] = "per_loop"
    tie_word_embeddings: bool = False
    bos_token_id: Token | None = None
    eos_token_id: EndTokens = None
    pad_token_id: Token | None = None

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        heads = self.num_attention_heads
        self.require(
            heads % self.num_key_value_heads == 0, "num_key_value_heads", f"a divisor of num_attention_heads ({heads})"
        )
        self.require(self.head_dim % 2 == 0, "head_dim", "an even number")
        self._check_layers()
        if "sliding_attention" in self.attention:
            self.require(self.sliding_window is not None, "sliding_window", "a number, since some layers have a window")
        self._check_rope()
        self.check_loops()
        if self.shares_slots:
            self.require(self.kv_policy == "repeat", "kv_policy", '"repeat": recurrent_kv_cache_mode is "last_loop"')
        self.check_tokens()

    def _check_layers(self) -> None:
        """Fail where the kinds of layers and their numbers do not go together."""
        count, kinds = self.num_hidden_layers, self.layer_types
        if kinds is not None:
            if len(kinds) != count:
                raise ConfigError(f"layer_types: got {len(kinds)} layers, expected num_hidden_layers ({count})")
            if self.paired and (set(kinds[1::2]) != {"mlp"} or "mlp" in kinds[::2]):
                raise ConfigError("layer_types: expected an attention and an mlp by turns, or no mlp at all")
        if self.paired:
            for name in ("num_hidden_layers", *SECTIONS):
                self.require((getattr(self, name) or 0) % 2 == 0, name, "an even number: layer_types names mlps")
        first, last, core = self.n_input_layers, self.n_output_layers, self.n_recurrent_layers
        if core is None:
            least = "more than n_input_layers and n_output_layers together"
            self.require(count > first + last, "num_hidden_layers", f"{least} ({first + last})")
        else:
            whole = first + core + last
            self.require(count == whole, "num_hidden_layers", f"{' + '.join(SECTIONS)} ({whole})")

    def _check_rope(self) -> None:
        """Fail where the angles are made otherwise than here, or not said; fill in what is left out."""
        given, found = self.rope_parameters, {}
        for kind in sorted(set(self.attention)):
            rope = {"rope_theta": THETAS[kind]} if given is None else given.get(kind)
            theta = None
            if isinstance(rope, dict) and DEFAULT | rope == {"rope_theta": rope.get("rope_theta"), **DEFAULT}:
                theta = rope.get("rope_theta")
            if not isinstance(theta, (int, float)) or isinstance(theta, bool) or not 0 < theta < float("inf"):
                raise ConfigError(f"rope_parameters: got {str(rope)[:60]} for {kind}, expected rope_type default and a "
                                  "rope_theta")  # fmt: skip
            found[kind] = {**DEFAULT, "rope_theta": float(theta)}
        object.__setattr__(self, "rope_parameters", found)

    @property
    def paired(self) -> bool:
        """Whether the file counts an attention and its MLP as two layers."""
        return self.layer_types is not None and "mlp" in self.layer_types

    @property
    def sections(self) -> tuple[int, int, int]:
        """Layers before, in and behind the loop."""
        counted = 2 if self.paired else 1
        count, first, last = (n // counted for n in (self.num_hidden_layers, self.n_input_layers, self.n_output_layers))
        return first, count - first - last, last

    @property
    def attention(self) -> tuple[Attention, ...]:
        """The kind of attention of every layer."""
        if self.layer_types is None:
            count = range(1, self.num_hidden_layers + 1)
            return tuple("sliding_attention" if i % FULL_EVERY else "full_attention" for i in count)
        return tuple(kind for kind in self.layer_types if kind != "mlp")

    @property
    def thetas(self) -> dict[Attention, float]:
        """The base of the angles of each kind of attention that there is."""
        assert self.rope_parameters is not None
        return {kind: self.rope_parameters[kind]["rope_theta"] for kind in THETAS if kind in self.attention}

    @property
    def rope_theta(self) -> float:
        """Of the layers that see everything, where there are any."""
        thetas = self.thetas
        return thetas["full_attention"] if "full_attention" in thetas else thetas["sliding_attention"]

    @property
    def further_thetas(self) -> dict[str, float]:
        """Of the other layers, by the ending of their angles' names."""
        return {"sliding": self.thetas["sliding_attention"]} if len(self.thetas) > 1 else {}

    @property
    def shares_slots(self) -> bool:
        """Whether the loops have one set of keys and values. With a single loop that is the same."""
        return self.recurrent_kv_cache_mode == "last_loop"

    @property
    def head_width(self) -> int:
        return self.head_dim

    @property
    def alpha_scale(self) -> float:
        """Of the rates at which layers move a state, as they are stored."""
        return self.ngpt_alpha_init / self.initializer_range
