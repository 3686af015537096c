"""What the configurations of hybrids (rmse_edge/arch/common/hybrid_model.py) have in common: layers of mixers, some of them looped.

Layers run once before the loop, up to K times in it, and once behind it ("encode, think, decode"; Koishekenov et al. 2025,
arXiv 2510.07358): `think` says which ones loop. With all of them looped once the model is a plain stack.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from rmse_edge.errors import ConfigError
from rmse_edge.numbers import EndTokens, Loops, Positions, Some, Token, VocabularySize

from .recurrent import RecurrentConfig

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
# That read the state alone: a prediction within the loop would ask for the layers behind it, with states of every loop.
RULES = ("gate", "delta", "cosine")
# The matrices of each mixer, in the order of the data flow. All else of a mixer stays float: what decides, decays or scales.
MATRICES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gated_deltanet": (("qkv_proj", "z_proj"), ("out_proj",)),
    "mamba3": (("x_proj", "b_proj", "z_proj", "c_proj"), ("out_proj",)),
    "rodimus": (("x_proj", "g_proj"), ("rk_proj",), ("out_proj",)),
    "atlas": (("qkv_proj", "gate_proj"), ("out_proj",)),
    "gated_attention": (("q_proj", "k_proj", "v_proj", "gate_proj"), ("o_proj",)),
    "shared_key_attention": (("q_proj", "k_proj", "v_proj"), ("out_proj",)),
}


@dataclass(frozen=True)
class MixerPlan:
    """A mixer, and the arguments of its class but for the width of states."""

    kind: str  # of `MATRICES`
    sizes: Mapping[str, Any]


@dataclass(frozen=True)
class LayerPlan:
    """What one layer is made of."""

    mixers: tuple[MixerPlan, ...]
    experts: Mapping[str, Any] = field(default_factory=dict)  # arguments of `SparseExperts`; empty: no sparse ones
    dense: int = 0  # hidden channels of a gated MLP; 0: none
    two_hop: bool = False  # see rmse_edge/layers/mixers/stack.py


@dataclass(frozen=True)
class HybridBase(RecurrentConfig, ABC):
    """A configuration of such a model."""

    trained: ClassVar[str] = "think_loops"
    listed: ClassVar[tuple[str, ...]] = ("think",)  # fields that are lists in a file, and tuples here

    vocab_size: VocabularySize = 256
    bos_token_id: Token | None = None
    eos_token_id: EndTokens = None
    pad_token_id: Token | None = None
    max_position_embeddings: Positions = 65_536  # positions of a text, at most, where a layer attends to all of them
    tie_word_embeddings: bool = False  # the head is the embedding
    think: tuple[Some, Some] | None = None  # the first layer that is looped, and the one behind the last; None: all
    think_loops: Loops = 1  # the trained depth

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """
        Raises:
            ConfigError: as `PublishedConfig.from_dict`.
        """
        lists = {name: tuple(values[name]) for name in cls.listed if isinstance(values.get(name), list)}
        return super().from_dict({**values, **lists}, where)

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of a state, d."""

    @property
    @abstractmethod
    def plan(self) -> tuple[LayerPlan, ...]:
        """The layers."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Layers."""

    @property
    @abstractmethod
    def turning(self) -> tuple[int, float]:
        """Channels of a head that turn with the position, and the base of their angles; 0: no layer attends."""

    @property
    @abstractmethod
    def eps(self) -> float:
        """Of the norms before mixers, before MLPs, and before the head."""

    @property
    def looped(self) -> tuple[int, int]:
        """The first layer that is looped, and the one behind the last."""
        return self.think or (0, self.count)

    @property
    def sections(self) -> tuple[slice, slice, slice]:
        """Layers before, in and behind the loop."""
        first, end = self.looped
        return slice(0, first), slice(first, end), slice(end, self.count)

    @property
    def mixers(self) -> tuple[MixerPlan, ...]:
        """Of all layers, in order."""
        return tuple(mixer for layer in self.plan for mixer in layer.mixers)

    @property
    def segment(self) -> int | None:
        """Positions of which no call crosses a multiple: those that ATLAS layers learn together."""
        return next((m.sizes["segment"] for m in self.mixers if m.kind == "atlas"), None)

    @property
    def attends_to_all(self) -> bool:
        """Whether some layer keeps keys and values of the whole text."""
        return any(mixer.kind == "gated_attention" and mixer.sizes["window"] is None for mixer in self.mixers)

    def check_think(self, layers: str) -> None:
        """Fail where `think` is no range of the layers, which messages call so."""
        first, end = self.looped
        self.require(0 <= first < end <= self.count, "think", f"0 <= first < end <= {layers}")

    def check_hybrid(self) -> None:
        """Fail where loops, exit rules and layers do not go together."""
        self.check_loops()
        for rule in self.exit_rules:
            if rule not in RULES:
                raise ConfigError(
                    f"exit_rules: got {rule!r}, expected some of {', '.join(RULES)}: rules that read predictions would need "
                    "the layers behind the loop in every iteration"
                )
        policy = '"repeat" or "all": what a layer keeps is no projection of a state that positions stop with'
        self.require(self.kv_policy != "propagate", "kv_policy", policy)
        self.check_tokens()
