"""What the configurations of recurrent-depth models (rmse_edge/arch/common/recurrent_model.py) have beyond their published keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from rmse_edge.loop.dials import DIALS, Dials
from rmse_edge.numbers import MAX_LOOPS, KvDtype, Loops, OffOr, Positive, Some

from . import dense
from .published import PublishedConfig

Rule = Literal["gate", "delta", "cosine", "kl", "entropy_change", "steady"]
UNTRAINED: tuple[Rule, ...] = tuple(rule for rule in get_args(Rule) if rule != "gate")  # that need no training


@dataclass(frozen=True)
class RecurrentConfig(PublishedConfig):
    """Loops, exit rules and the cache of one recurrent-depth model."""

    trained: ClassVar[str]  # the published key with the trained depth
    # Fields whose names begin like this change no weight's meaning (`Arch.settings`).
    settings: ClassVar[tuple[str, ...]] = (
        "exit_threshold",
        "exit_epsilon",
        "exit_cosine",
        "exit_kl",
        "exit_entropy_change",
        "exit_steady",
        "min_loops",
    )

    untrained_loops: Some = 0  # iterations beyond the trained depth that may be asked for
    # That are compiled in; those that read predictions evaluate the coda and the head in each loop. "gate" is no rule of the
    # published models: it adds a gate, which `rmse-train --stage gate` trains.
    exit_rules: tuple[Rule, ...] = ("delta", "cosine")
    min_loops: Loops = 1
    exit_threshold: Positive = 1.0  # gate: a position stops when the brake score reaches this; 1 disables
    exit_epsilon: OffOr = 0.0  # delta: a position stops when |h' - h| < this * |h'|
    exit_cosine: OffOr = 0.0  # cosine: when 1 - cos(h, h') is below
    exit_kl: OffOr = 0.0  # kl: when the divergence of its predictions, in nats, is below
    exit_entropy_change: OffOr = 0.0  # entropy_change: when that of its predictions, in nats, is below
    exit_steady: Some = 0  # steady: when its likeliest token has been the same for so many loops
    kv_policy: Literal["propagate", "repeat", "all"] = "repeat"  # rmse_edge/layers/stack.py
    kv_dtype: KvDtype = "float32"

    def check_loops(self) -> None:
        """Fail where loops and exit rules do not go together."""
        trained = self.trained_loops
        self.require(self.min_loops <= trained, "min_loops", f"at most {self.trained} ({trained})")
        most = MAX_LOOPS - trained
        self.require(self.untrained_loops <= most, "untrained_loops", f"at most {most}, {MAX_LOOPS} loops in all")
        self.require(len(set(self.exit_rules)) == len(self.exit_rules), "exit_rules", "each rule once")
        for name, dial in DIALS.items():
            if dial.rule and dial.rule not in self.exit_rules:
                off = getattr(self, name, dial.off) == dial.off
                self.require(off, name, f"it off, since exit_rules has no {dial.rule!r}")

    @property
    def trained_loops(self) -> int:
        return getattr(self, self.trained)

    @property
    def max_loops(self) -> int:
        """Loops that may be asked for."""
        return self.trained_loops + self.untrained_loops

    @property
    def gated(self) -> bool:
        """Whether it has an exit gate."""
        return "gate" in self.exit_rules

    @property
    def rules(self) -> tuple[str, ...]:
        """The dials of its exit rules."""
        return tuple(name for name, dial in DIALS.items() if dial.rule and dial.rule in self.exit_rules)

    @property
    def dials(self) -> Dials:
        """The settings of the file."""
        return Dials(self.trained_loops, self.min_loops, **{name: getattr(self, name) for name in self.rules})


GATE_BIAS = "exit_gate.bias"
ADDITIONS = ("exit_gate.",)  # `Arch.additions`


def gate_bias(c: RecurrentConfig) -> str | None:
    """`Arch.gate_bias`."""
    return GATE_BIAS if c.gated else None


def gate_weights(c: RecurrentConfig, width: int) -> int:
    """Weights of the exit gate, of a model whose states have `width` channels; its bias comes on top."""
    return width + 1 if c.gated else 0


def gate_parameters(c: RecurrentConfig, width: int) -> int:
    """Trained numbers of the exit gate: its weights and its bias."""
    return gate_weights(c, width) + 1 if c.gated else 0


def stated(
    c: Any, rope_theta: float, width: int, parameters: int, further_thetas: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """`Arch.stated`.

    Args:
        c: a `RecurrentConfig` that is a `DenseConfig` as well.
        parameters: without the exit gate's.
    """
    found = dense.stated(c, rope_theta, width, parameters + gate_parameters(c, width), further_thetas)
    return found | stated_exits(c)


def stated_exits(c: RecurrentConfig) -> dict[str, Any]:
    """The part of `Arch.stated` that is about exits."""
    dials = {f"dials.{name}": value for name, value in vars(c.dials).items()}
    return {"rules": ("max_loops", "min_loops", *c.rules), **dials}
