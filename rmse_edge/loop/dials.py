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

    def enables(self, value: Any) -> Any:
        """Whether the rule can stop anything at this value, or at each of a tensor's; never, where it is no rule."""
        if self.off is None:
            return value != value
        return value < self.off if self.exclusive else value > self.off

    def allows(self, value: float) -> bool:
        """Whether a rule may have this value; not for loops, whose largest number depends on the model."""
        return value > self.least if self.exclusive else value >= self.least


DIALS = {
    dial.name: dial
    for dial in (
        Dial("max_loops", "int64", "N", "iterations at most", 1),
        Dial("min_loops", "int64", "N", "iterations before a token may stop", 1),
        Dial(
            "exit_threshold", "float32", "P", "brake score to stop at; 1 disables", 0,
            exclusive=True, off=1.0, expected="a positive number (1 disables it)",
        ),
        Dial(
            "exit_epsilon", "float32", "E", "state change to stop at; 0 disables", 0,
            off=0.0, expected="0 (off) or more",
        ),
        Dial(
            "exit_entropy", "float32", "H", "entropy (nats) to stop at; 0 disables", 0,
            off=0.0, expected="0 (off) or more",
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

    @property
    def exits(self) -> bool:
        """Whether any rule can stop a position before `max_loops`."""
        return any(dial.enables(getattr(self, dial.name)) for dial in DIALS.values())

    def arrays(self) -> dict[str, np.ndarray]:
        """As the scalar inputs of `loop` and `step`."""
        return {name: np.array(value, DIALS[name].dtype) for name, value in vars(self).items()}

    def check(self, trained_depth: int) -> Dials:
        """Itself, if a model trained to `trained_depth` loops can run it.

        Raises:
            ArgumentError: naming the dial and its range.
        """
        for name, most, which in (
            ("max_loops", trained_depth, f"1..{trained_depth} (the depth the model was trained to)"),
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

    def changed(self, trained_depth: int, **changes: float | int | None) -> Dials:
        """These dials with those given (not None) replaced, checked. A `max_loops` alone lowers `min_loops` with it.

        Raises:
            ArgumentError: naming the dial and its range.
        """
        chosen = {name: value for name, value in changes.items() if value is not None}
        if "max_loops" in chosen and "min_loops" not in chosen:
            chosen["min_loops"] = min(self.min_loops, max(1, chosen["max_loops"]))
        return Dials(**(vars(self) | chosen)).check(trained_depth)
