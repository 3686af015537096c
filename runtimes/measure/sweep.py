"""The price of stopping early: loss against mean loops over values of an exit rule's dial, beside fixed depths.

Every point is a measurement of the same text. Values are placed where the mean depth changes: the largest gap between
neighbours is halved until the points are used up. Those of a dial that counts loops are spread evenly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from rmse_edge.errors import ArgumentError, UserError
from rmse_edge.files import check_file, new_file
from rmse_edge.loop.dials import DIALS, Dials

from .evaluate import Evaluation

GATE = "exit_threshold"
# Values are moved on a scale on which a larger x stops positions later. Of the gate these are log-odds, 0.018 to 0.99988;
# of changes that stop a position when they are smaller, logarithms, 20 down to 8e-7.
GATE_SCALE, CHANGE_SCALE = (-4.0, 9.0), (-3.0, 14.0)
CLOSEST = 0.02  # on the scale, between two values worth telling apart

REFINE = 3  # measurements spent on the proposal

Measure = Callable[[Dials], Evaluation]


@dataclass(frozen=True)
class Point:
    """One setting and what it gave."""

    mode: str  # "fixed" or "adaptive"
    max_loops: int
    value: float | None  # of the rule's dial; None for a fixed depth
    loss: float
    mean_loops: float
    depth_sd: float

    @classmethod
    def of(cls, mode: str, evaluation: Evaluation, rule: str) -> Point:
        dials = evaluation.dials
        value = getattr(dials, rule) if mode == "adaptive" else None
        depth_sd = float(evaluation.depth.std())
        return cls(mode, dials.max_loops, value, evaluation.loss, evaluation.mean_loops, depth_sd)


@dataclass(frozen=True)
class Sweep:
    """The frontier, and the value it proposes."""

    fixed: list[Point]  # depth 1..K
    adaptive: list[Point]  # those that stop positions soonest first
    budget: float  # percent of loss over full depth
    rule: str = GATE  # the dial that is varied

    @property
    def full(self) -> Point:
        return self.fixed[-1]

    @property
    def proposal(self) -> Point | None:
        """The fewest loops measured within the budget; None if no value stays within it."""
        return min((p for p in self.adaptive if self.within(p)), key=lambda p: p.mean_loops, default=None)

    def over_full(self, point: Point) -> float:
        """Loss over full depth, percent."""
        return 100 * (point.loss / self.full.loss - 1)

    def within(self, point: Point) -> bool:
        return self.over_full(point) <= self.budget

    def fixed_loss_at(self, mean_loops: float) -> float:
        """What a fixed depth of that mean costs, interpolated between the two nearest depths."""
        return float(np.interp(mean_loops, [p.mean_loops for p in self.fixed], [p.loss for p in self.fixed]))

    def row(self, point: Point) -> dict[str, Any]:
        """A point with its comparisons, under stable names."""
        own = {self.rule if name == "value" else name: value for name, value in vars(point).items()}
        return own | {
            "over_full_percent": self.over_full(point),
            "iterations_saved": 1 - point.mean_loops / self.full.max_loops,
            "fixed_loss_at_mean": self.fixed_loss_at(point.mean_loops),
        }

    def summary(self) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "fixed": [self.row(p) for p in self.fixed],
            "adaptive": [self.row(p) for p in self.adaptive],
            "budget_percent": self.budget,
            "proposal": self.row(self.proposal) if self.proposal else None,
        }


def label(rule: str) -> str:
    """What a dial is called beside its values."""
    return rule.removeprefix("exit_").replace("_", " ")


def values_of(rule: str, full_depth: int, points: int) -> tuple[float, ...]:
    """Values of a dial that counts loops, and of routers; none of others, which are placed by what is measured."""
    # From next to nothing to every layer once: no measurement says where routers change their minds.
    if rule == "route":
        return tuple(round(float(value), 3) for value in np.linspace(-0.7, 0.5, max(points, 2)))
    if DIALS[rule].dtype != "int64":
        return ()
    most = max(1, full_depth - 1)
    return tuple(dict.fromkeys(round(float(n)) for n in np.linspace(1, most, min(max(points, 2), most))))


def passes(full_depth: int, points: int, refine: int = REFINE, rule: str = GATE, values: Sequence[float] = ()) -> int:
    """Measurements a sweep makes at most."""
    return full_depth + (len(values or values_of(rule, full_depth, points)) or max(points, 2) + refine)


def sweep(
    measure: Measure,
    full_depth: int,
    dials: Dials,
    budget: float = 1.0,
    points: int = 10,
    refine: int = REFINE,
    rule: str = GATE,
    values: Sequence[float] = (),
) -> Sweep:
    """Measure fixed depths 1..`full_depth` and values of a rule's dial.

    Args:
        measure: evaluates the text at a setting.
        dials: what the values are combined with; their own value of the rule is not used.
        budget: percent of loss over full depth that the proposed value may cost.
        points: values that map the frontier, at least 2.
        refine: further ones between the proposed value and the next that stops sooner.
        rule: the dial, a name in `DIALS`.
        values: measure these, and no others.
    """
    fixed = [Point.of("fixed", measure(Dials(k)), rule) for k in range(1, full_depth + 1)]

    def at(value: float) -> Point:
        changed: dict[str, Any] = {rule: value}
        return Point.of("adaptive", measure(replace(dials, **changed)), rule)

    if listed := tuple(values) or values_of(rule, full_depth, points):
        later = DIALS[rule].dtype == "int64" or rule in (GATE, "route")  # whether larger values stop positions later
        return Sweep(fixed, [at(value) for value in sorted(set(listed), reverse=not later)], budget, rule)

    def placed(x: float) -> Point:
        return at(float(1 / (1 + np.exp(-x)) if rule == GATE else np.exp(-x)))

    measured = {x: placed(x) for x in (GATE_SCALE if rule == GATE else CHANGE_SCALE)}
    for _ in range(points - 2):
        x = widest_gap(measured)
        if x is None:
            break
        measured[x] = placed(x)
    for _ in range(refine):
        result = Sweep(fixed, [measured[x] for x in sorted(measured)], budget, rule)
        best = next((x for x in sorted(measured) if measured[x] is result.proposal), None)
        below = max((x for x in measured if best is not None and x < best), default=None)
        if best is None or below is None or best - below < CLOSEST:
            break
        if measured[below].mean_loops == measured[best].mean_loops:
            break
        measured[(best + below) / 2] = placed((best + below) / 2)
    return Sweep(fixed, [measured[x] for x in sorted(measured)], budget, rule)


def widest_gap(measured: dict[float, Point]) -> float | None:
    """The middle of the neighbours whose mean loops differ most; None when no gap is worth a measurement."""
    ordered = sorted(measured)
    gaps = [
        (abs(measured[b].mean_loops - measured[a].mean_loops), (a + b) / 2)
        for a, b in pairwise(ordered)
        if b - a >= CLOSEST
    ]
    width, middle = max(gaps, default=(0.0, 0.0))
    return middle if width > 0 else None


def check_plot(path: Path) -> None:
    """Fail before the measurements, not after them, where `draw` could not write `path`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a plot needs matplotlib; install it with: pip install 'rmse-edge[train]'") from None
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise ArgumentError("path", f"got {path.name}, expected a file ending in one of .{', .'.join(sorted(known))}")
    check_file(path)


def draw(result: Sweep, path: Path, title: str) -> None:
    """Write the frontier as a picture; the ending of `path` chooses the format."""
    from matplotlib.figure import Figure  # not pyplot: no window system is asked for

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for points, name, style in (
        (result.fixed, "fixed depth", "o--"),
        (sorted(result.adaptive, key=lambda p: p.mean_loops), f"adaptive, by {label(result.rule)}", "s-"),
    ):
        axes.plot([p.mean_loops for p in points], [p.loss for p in points], style, label=name, ms=5)
    limit = result.full.loss * (1 + result.budget / 100)
    axes.axhline(limit, color="grey", lw=1, ls=":", label=f"full depth + {result.budget:g} %")
    chosen = result.proposal
    if chosen:
        name = f"{label(result.rule)} {chosen.value:.4g}"
        axes.plot([chosen.mean_loops], [chosen.loss], "*", ms=15, label=name)
    axes.set(xlabel="mean loops per token", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with new_file(path) as part:
        figure.savefig(part, dpi=150)
