"""The quality dial: how many loops a model may take, and when a position stops sooner.

Its settings are scalar inputs of `loop` and `step`, so that turning the dial needs no re-export. `DIALS` is what there is
to know about each: runtimes, exporters, command lines and Hugging Face classes read it there. What the rules do is in
rmse_edge/loop/stop.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rmse_edge.errors import ArgumentError
from rmse_edge.numbers import Loops
from rmse_edge.schema import Finite


@dataclass(frozen=True)
class Dial:
    """One setting of the quality dial."""

    name: str
    dtype: Literal["int64", "float32"]  # of the scalar that graphs take
    symbol: str  # of its value, in help
    help: str
    least: int | float
    exclusive: bool = False  # `least` itself is no value
    off: float | None = None  # the value that disables the rule; None: it is no rule
    expected: str = ""  # of a rule: what values it has, in words
    rule: str = ""  # of a rule: its name, as configurations and the parity gate say it

    def enables(self, value: Any) -> Any:
        """Whether the rule can stop anything at this value, or at each of a tensor's; never, where it is no rule."""
        if self.off is None:
            return value != value
        return value < self.off if self.exclusive else value > self.off

    def allows(self, value: float) -> bool:
        """Whether a rule may have this value; not for loops, whose largest number depends on the model."""
        whole = self.dtype != "int64" or value % 1 == 0
        return whole and (value > self.least if self.exclusive else value >= self.least)


DIALS = {
    dial.name: dial
    for dial in (
        Dial("max_loops", "int64", "N", "iterations at most", 1),
        Dial("min_loops", "int64", "N", "iterations before a token may stop", 1),
        Dial(
            "exit_threshold", "float32", "P", "brake score to stop at; 1 disables", 0,
            exclusive=True, off=1.0, expected="a positive number (1 disables it)", rule="gate",
        ),
        Dial(
            "exit_epsilon", "float32", "E", "state change to stop at; 0 disables", 0,
            off=0.0, expected="0 (off) or more", rule="delta",
        ),
        Dial(
            "exit_entropy", "float32", "H", "entropy (nats) to stop at; 0 disables", 0,
            off=0.0, expected="0 (off) or more", rule="entropy",
        ),
        Dial(
            "exit_cosine", "float32", "C", "1 - cosine of two loops' states to stop at; 0 disables", 0,
            off=0.0, expected="0 (off) or more", rule="cosine",
        ),
        Dial(
            "exit_kl", "float32", "D", "KL divergence (nats) of two loops' predictions to stop at; 0 disables", 0,
            off=0.0, expected="0 (off) or more", rule="kl",
        ),
        Dial(
            "exit_entropy_change", "float32", "H", "entropy change (nats) to stop at; 0 disables", 0,
            off=0.0, expected="0 (off) or more", rule="entropy_change",
        ),
        Dial(
            "exit_steady", "int64", "N", "loops without another likeliest token to stop at; 0 disables", 0,
            off=0, expected="0 (off) or a whole number", rule="steady",
        ),
        Dial(
            "exit_gap", "float32", "G", "mean lead (logits) at which a block is filled in whole; 0 disables", 0,
            off=0.0, expected="0 (off) or more", rule="gap",
        ),
        Dial(
            "route", "float32", "P", "layers that a prompt is run through: -0.5 as routers say, less skips more; 0.5 disables", -1,
            exclusive=True, off=0.5, expected="a number above -1 (0.5 runs every layer once)", rule="route",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Dials:
    """The quality dial of one call. Loops are 1-based."""

    max_loops: Loops
    min_loops: Loops = 1
    exit_threshold: Finite = 1.0  # >= 1 disables the gate
    exit_epsilon: Finite = 0.0  # 0 disables the delta rule
    exit_entropy: Finite = 0.0  # 0 disables the entropy rule
    exit_cosine: Finite = 0.0  # of these, too
    exit_kl: Finite = 0.0
    exit_entropy_change: Finite = 0.0
    exit_steady: int = 0
    exit_gap: Finite = 0.0
    route: Finite = 0.5  # of a model with routers before its layers: 0.5 or more asks none

    @property
    def exits(self) -> bool:
        """Whether any rule can stop a position before `max_loops`."""
        return any(dial.enables(getattr(self, dial.name)) for dial in DIALS.values())

    def arrays(self) -> dict[str, np.ndarray]:
        """As the scalar inputs of `loop` and `step`."""
        return {name: np.array(value, DIALS[name].dtype) for name, value in vars(self).items()}

    def check(self, deepest: int, untrained: int | None = None) -> Dials:
        """Itself, if a model that runs `deepest` loops at most can run it.

        Args:
            untrained: how many of them are beyond the depth that it was trained to, where its configuration says so.
        Raises:
            ArgumentError: naming the dial and its range.
        """
        for name, most, which in (
            ("max_loops", deepest, f"1..{deepest} ({_depth_text(untrained)})"),
            ("min_loops", self.max_loops, f"1..{self.max_loops} (max_loops)"),
        ):
            value = getattr(self, name)
            if value % 1 != 0:
                raise ArgumentError(name, f"got {value}, expected a whole number in {which}")
            if not 1 <= value <= most:
                raise ArgumentError(name, f"got {value}, expected {which}")
        for dial in DIALS.values():
            if dial.off is not None and not dial.allows(value := getattr(self, dial.name)):  # NaN fails, too
                raise ArgumentError(dial.name, f"got {value}, expected {dial.expected}")
        return self

    def changed(self, deepest: int, untrained: int | None = None, **changes: float | int | None) -> Dials:
        """These dials with those given (not None) replaced, checked as in `check`. A `max_loops` alone lowers `min_loops`.

        Raises:
            ArgumentError: naming the dial and its range.
        """
        chosen = {name: value for name, value in changes.items() if value is not None}
        if "max_loops" in chosen and "min_loops" not in chosen:
            chosen["min_loops"] = min(self.min_loops, max(1, chosen["max_loops"]))
        return Dials(**(vars(self) | chosen)).check(deepest, untrained)


def _depth_text(untrained: int | None) -> str:
    if untrained is None:
        return "the depth the model was trained to"
    if untrained == 0:
        return "the depth the model was trained to; untrained_loops in its config.json allows more"
    return f"{untrained} of them beyond the depth the model was trained to, by untrained_loops in its config.json"
