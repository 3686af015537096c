"""`HybridConfig`: a stack of mixers written out layer by layer.

    "layers": ["atlas", "mamba3", "mamba3", "gated_deltanet", "gated_attention"]
    "ratios": {"atlas": 1, "mamba3": 3.5, "gated_deltanet": 3.5, "gated_attention": 2}, "n_layers": 10

The second form fills the first: as many layers of each kind as its share of `n_layers` asks for, in the order of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from rmse_edge.arch.common.hybrid import MATRICES, HybridBase, LayerPlan, MixerPlan
from rmse_edge.errors import ConfigError
from rmse_edge.numbers import SEGMENT, Count, Positions, Positive, Some
from rmse_edge.schema import Expected, check_fields

MOST_LAYERS = 1024
TWO_HOP = "rodimus_plus"  # a layer of two mixers
KINDS = (*MATRICES, TWO_HOP)
Layers = Annotated[tuple[str, ...], Field(min_length=1, max_length=MOST_LAYERS), Expected("a list of layers")]
Degree = Annotated[int, Field(ge=1, le=3), Expected("1, 2 or 3")]
Segment = Annotated[int, Field(ge=2, le=SEGMENT), Expected(f"2 to {SEGMENT}")]


def filled(ratios: Mapping[str, float], n_layers: int) -> tuple[str, ...]:
    """Layers of each kind by their shares, those of one kind side by side; what is left over goes to the largest remainders, of
    equal ones to the first.
    """
    shares = {kind: share * n_layers / sum(ratios.values()) for kind, share in ratios.items()}
    counts = {kind: floor(share) for kind, share in shares.items()}
    rest = sorted(shares, key=lambda kind: counts[kind] - shares[kind])  # stable
    for kind in rest[: n_layers - sum(counts.values())]:
        counts[kind] += 1
    return tuple(kind for kind, count in counts.items() for _ in range(count))


@dataclass(frozen=True)
class HybridConfig(HybridBase):
    """Shape and behaviour of one hybrid."""

    model_type: ClassVar[str] = "hybrid"
    architectures: ClassVar[tuple[str, ...]] = ("HybridForCausalLM",)
    listed: ClassVar[tuple[str, ...]] = ("layers", "think")

    d_model: Count = 256
    layers: Layers = ("gated_deltanet", "gated_deltanet", "gated_deltanet", "gated_attention")  # of `KINDS`
    norm_eps: Positive = 1e-6
    # Layers that attend.
    n_heads: Count = 4
    n_kv_heads: Count = 2
    head_dim: Count = 64
    rotary_dims: Some = 16  # channels of a head that turn
    rope_theta: Positive = 10_000.0
    window: Positions | None = None  # positions that gated_attention sees, the own one included; None: all
    shared_key_window: Positions = 128  # positions that shared_key_attention sees, the own one included
    # Recurrences.
    taps: Count = 4  # positions that short convolutions read, the own one included
    deltanet_key_heads: Count = 4
    deltanet_value_heads: Count = 4
    deltanet_key_dim: Count = 64
    deltanet_value_dim: Count = 64
    mamba_heads: Count = 8
    mamba_head_dim: Count = 64
    mamba_state_dim: Count = 64
    mamba_angles: Some = 16  # pairs of channels that turn; 0: none do
    mamba_rank: Count = 1
    mamba_least_step: Positive = 1e-3  # dt of a head before training, at least
    mamba_most_step: Positive = 0.1
    mamba_activation: Literal["heavy_tail", "softplus"] = "heavy_tail"
    rodimus_channels: Count = 512
    rodimus_state_dim: Count = 64
    rodimus_gate_rank: Count = 16
    atlas_heads: Count = 4
    atlas_head_dim: Count = 16
    atlas_hidden: Count = 32
    atlas_degree: Degree = 2
    atlas_steps: Count = 1
    atlas_rule: Literal["muon", "sgd"] = "muon"
    atlas_segment: Segment = SEGMENT  # positions that a memory learns together
    # What follows the mixers of a layer: sparse experts and a shared one, or without experts a dense MLP, or nothing.
    n_experts: Some = 0
    top_k: Count = 10
    expert_width: Count = 32
    shared_width: Count = 64
    intermediate_size: Some = 0  # of a dense MLP
    block_size: Positions | None = None  # positions of one training sequence

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """
        Raises:
            ConfigError: as `PublishedConfig.from_dict`; or ratios and layers do not go together.
        """
        found = dict(values)
        ratios, count = found.pop("ratios", None), found.pop("n_layers", None)
        if ratios is not None:
            if "layers" in found:
                raise ConfigError(f"{where}: ratios: fill layers, and layers are there; keep one of them")
            numbers = isinstance(ratios, dict) and ratios and all(_share(share) for share in ratios.values())
            if not numbers or not any(ratios.values()):
                raise ConfigError(f"{where}: ratios: got {str(ratios)[:60]}, expected an object of positive numbers")
            if type(count) is not int or not 1 <= count <= MOST_LAYERS:
                raise ConfigError(f"{where}: n_layers: got {count!r}, expected 1..{MOST_LAYERS}, which ratios fill")
            found["layers"] = filled(ratios, count)
        elif count is not None:
            raise ConfigError(f"{where}: n_layers: is read with ratios; without them, layers says how many there are")
        return super().from_dict(found, where)

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        for i, kind in enumerate(self.layers):
            if kind not in KINDS:
                raise ConfigError(f"layers[{i}]: got {kind!r}, expected one of {', '.join(KINDS)}")
        if self.think is None:
            object.__setattr__(self, "think", self.looped)
        self.check_think(f"{self.count} layers")
        self.require(self.n_heads % self.n_kv_heads == 0, "n_kv_heads", f"a divisor of n_heads ({self.n_heads})")
        even = f"an even number, at most head_dim ({self.head_dim})"
        self.require(self.rotary_dims % 2 == 0 and self.rotary_dims <= self.head_dim, "rotary_dims", even)
        heads = self.deltanet_value_heads
        divisor = f"a divisor of deltanet_value_heads ({heads})"
        self.require(heads % self.deltanet_key_heads == 0, "deltanet_key_heads", divisor)
        half = self.mamba_state_dim // 2
        self.require(self.mamba_angles <= half, "mamba_angles", f"at most half of mamba_state_dim ({half})")
        least = f"at least mamba_least_step ({self.mamba_least_step})"
        self.require(self.mamba_least_step <= self.mamba_most_step, "mamba_most_step", least)
        if self.n_experts:
            self.require(self.top_k <= self.n_experts, "top_k", f"at most n_experts ({self.n_experts})")
            self.require(not self.intermediate_size, "intermediate_size", "0, since there are experts")
        elif TWO_HOP in self.layers:  # its second mixer would reach nothing
            self.require(self.intermediate_size > 0, "intermediate_size", f"above 0, or n_experts, for {TWO_HOP}")
        if self.block_size is not None:
            most = self.max_position_embeddings
            self.require(self.block_size <= most, "block_size", f"at most max_position_embeddings ({most})")
        self.check_hybrid()

    # ------------------------------------------------------------------------------------------------ HybridBase

    @property
    def width(self) -> int:
        return self.d_model

    @property
    def count(self) -> int:
        return len(self.layers)

    @property
    def turning(self) -> tuple[int, float]:
        attends = any(mixer.kind.endswith("attention") for mixer in self.mixers)
        return (self.rotary_dims if attends else 0), self.rope_theta

    @property
    def eps(self) -> float:
        return self.norm_eps

    @property
    def plan(self) -> tuple[LayerPlan, ...]:
        experts: dict[str, Any] = {}
        if self.n_experts:
            experts = {"n_experts": self.n_experts, "top_k": self.top_k, "expert_width": self.expert_width}
            experts |= {"shared_width": self.shared_width, "shared_gate": True}
        found = []
        for kind in self.layers:
            two_hop = kind == TWO_HOP
            kinds = ("rodimus", "shared_key_attention") if two_hop else (kind,)
            mixers = tuple(MixerPlan(name, self._sizes(name)) for name in kinds)
            found.append(LayerPlan(mixers, experts, self.intermediate_size, two_hop))
        return tuple(found)

    def _sizes(self, kind: str) -> dict[str, Any]:
        """The arguments of a mixer."""
        if kind == "gated_deltanet":
            sizes = {n: getattr(self, f"deltanet_{n}") for n in ("key_heads", "value_heads", "key_dim", "value_dim")}
            return sizes | {"taps": self.taps, "norm_eps": self.norm_eps}
        if kind == "mamba3":
            sizes = {
                name: getattr(self, f"mamba_{name}") for name in ("heads", "head_dim", "state_dim", "angles", "rank")
            }
            steps = (self.mamba_least_step, self.mamba_most_step)
            return sizes | {"a_activation": self.mamba_activation, "first_steps": steps, "norm_eps": self.norm_eps}
        if kind == "rodimus":
            sizes = {name: getattr(self, f"rodimus_{name}") for name in ("channels", "state_dim", "gate_rank")}
            return sizes | {"taps": self.taps, "norm_eps": self.norm_eps}
        if kind == "atlas":
            names = ("heads", "head_dim", "hidden", "degree", "steps", "rule", "segment")
            return {name: getattr(self, f"atlas_{name}") for name in names} | {"taps": self.taps}
        sizes = {name: getattr(self, name) for name in ("n_heads", "head_dim", "rotary_dims")}
        if kind == "shared_key_attention":
            return sizes | {"window": min(self.shared_key_window, self.max_position_embeddings)}
        window = None if self.window is None else min(self.window, self.max_position_embeddings)
        return sizes | {"n_kv_heads": self.n_kv_heads, "window": window, "norm_eps": self.norm_eps}


def _share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
