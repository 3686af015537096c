"""The part of the parity gate that compares every method by itself, on made-up inputs."""

from __future__ import annotations

import numpy as np
import torch

from rmse_edge.errors import ParityError
from rmse_edge.export.program import LoopProgram, dial_specs, signature, stacked
from rmse_edge.info import State, dtype_name
from rmse_edge.loop.contract import Append, LoopSpec, Replace, Written
from rmse_edge.loop.steps import drive_steps
from rmse_edge.numbers import SLOTS
from rmse_edge.runtimes.engines.torch import TorchMethods
from rmse_edge.runtimes.host.base import Arrays, Methods

from .reference import vectors_moved

# What another order of rounding may change in a method is found by rounding its inputs once more, and the norms of all layers
# that they go through. Random weights may double a difference in every loop; so engines are allowed this many times what
# PyTorch itself is off by then, up to a limit.
ROUNDINGS, MOST = 4, 0.05
# Slots of appended states that grow, at most and at least: the most there are may be far more than this takes to compare.
EXAMPLE_SLOTS, FEWEST_SLOTS = 300, 64
EXAMPLE_STATE = 64 << 20  # bytes of such states: several copies are there at once
BLOCK = 1 << 20  # numbers that are compared at once


def example_feeds(spec: LoopSpec, methods: Methods, seed: int = 0, slots: int | None = None) -> Arrays:
    """Made-up but consistent inputs for every method of one call: valid ids, real prelude results, a filled state.

    Args:
        slots: of the appended state; None: all there are.
    """
    draw = np.random.default_rng(seed)
    feeds: Arrays = {}
    given = {t.name: t if slots is None else t.of_slots(slots) for t in (*spec.inputs, *spec.context, *spec.state)}
    for t in given.values():
        if t.name in {s.name for s in spec.written}:
            continue
        dtype = dtype_name(t.dtype)
        if dtype == "bool":
            feeds[t.name] = draw.random(t.shape) < 0.5
            feeds[t.name].flat[-1], feeds[t.name].flat[0] = False, True  # all alike, nobody would see who reads them
        elif t.name == SLOTS:
            feeds[t.name] = np.arange(t.shape[0])
        elif t.name in spec.examples:
            feeds[t.name] = np.asarray(spec.examples[t.name], dtype).reshape(t.shape)
        elif dtype == "int8":
            feeds[t.name] = draw.integers(-127, 128, t.shape).astype(np.int8)
        elif dtype == "int64":
            feeds[t.name] = draw.integers(0, spec.ids.get(t.name, 2), t.shape)
        else:
            feeds[t.name] = draw.standard_normal(t.shape).astype(dtype)
    feeds |= {k: v.copy() for k, v in methods.run("prelude", spec.chunk, feeds).items()}
    for s in spec.written:
        feeds[s.name] = (0.1 * np.abs(draw.standard_normal(s.shape))).astype(np.float32)
    for takes, _ in spec.extra.values():
        made = (t for t in takes if t.name not in feeds and t.name not in spec.dials)
        feeds |= {t.name: draw.standard_normal(t.shape).astype(np.float32) for t in made}
    return feeds


def example_slots(spec: LoopSpec) -> int | None:
    """Of the appended state in examples; None: nothing is appended."""
    if spec.capacity is None:
        return None
    states = [State.of(s) for s in spec.state if isinstance(s.update, Append)]
    each = sum(s.nbytes(2) - s.nbytes(1) for s in states)
    return min(spec.capacity, max(FEWEST_SLOTS, min(EXAMPLE_SLOTS, EXAMPLE_STATE // each)))


def rounded_once_more(feeds: Arrays) -> Arrays:
    """`feeds` with every float32 number a rounding of itself away, up or down as its last bit has it."""
    return {
        name: (np.ascontiguousarray(a).view(np.int32) ^ 1).view(np.float32).reshape(a.shape)
        if a.dtype == np.float32
        else a
        for name, a in feeds.items()
    }


def host_loop(
    methods: Methods, spec: LoopSpec, first: Arrays, feeds: Arrays, dials: Arrays
) -> tuple[Arrays, Arrays, int]:
    """The loop as a host owns it, around `step`: the last carry, the stacked emits (K, ...), and the iterations."""
    rows = {s.name: feeds[s.name] for s in spec.rows}
    stacks = {t.name: np.zeros(t.shape, dtype_name(t.dtype)) for t in stacked(spec)}

    def step(arrays: Arrays, k: int) -> Arrays:
        given = feeds | {name: np.ascontiguousarray(array) for name, array in arrays.items()} | dials
        return {
            n: np.array(v) for n, v in methods.run("step", spec.chunk, given | {"k": np.array(k, np.int64)}).items()
        }

    carry, iterations = drive_steps(step, first, rows, stacks, int(dials["max_loops"]))
    return carry, stacks, iterations


def compare_methods(
    program: LoopProgram,
    candidate: Methods,
    dial_values: dict[str, float],
    tolerance: float,
    mean_square: bool = False,
) -> dict[str, float]:
    """Difference of every method and chunk between PyTorch and the package, relative to the values' size: the largest, or
    with `mean_square` its root mean square.

    Args:
        tolerance: of a difference; more where rounding once more changes PyTorch's own results by more.
    Raises:
        ParityError: naming the method, the tensor and the difference.
    """
    worst: dict[str, float] = {}

    def note(label: str, name: str, a: np.ndarray, b: np.ndarray, own: float = 0.0) -> None:
        """`own`: what rounding once more changes in `a`."""
        difference, allowed = differ(a, b, mean_square), max(tolerance, min(ROUNDINGS * own, MOST))
        worst[label] = max(worst.get(label, 0.0), difference)
        if not difference <= allowed:
            raise ParityError(f"{label}: {name} differs by {difference:.1e} (allowed {allowed:.0e})")

    for chunk, spec in program.specs.items():
        reference = TorchMethods(program.model, heads=program.heads)
        dials = {t.name: np.array(dial_values[t.name], dtype_name(t.dtype)) for t in dial_specs(spec)}
        slots = example_slots(spec) if program.grows else None
        feeds = example_feeds(spec, reference, slots=slots)
        results: dict[str, Arrays] = {}
        own: dict[tuple[str, str], float] = {}  # by method and tensor
        stacks = {t.name for t in stacked(spec)}
        for name in spec.methods:
            given = feeds | results.get("loop", {}) | results.get("coda", {}) | dials
            expected = {k: v.copy() for k, v in reference.run(name, chunk, given).items()}
            with vectors_moved(program.model):
                moved = reference.run(name, chunk, rounded_once_more(given) | dials)
            for t in signature(spec, name)[1]:
                a, b = (_ran(r, t.name, expected, stacks) for r in (expected, moved))
                own[name, t.name] = differ(a, b, mean_square)
            del moved  # of a large model what a loop gives is much, and the package's comes now
            got = {k: np.array(v) for k, v in candidate.run(name, chunk, given).items()}
            if name == "commit" and getattr(candidate, "rings", None):
                # What the engine keeps is compared as a whole: what was to be written, and what was not.
                held = {k: np.array(v) for k, v in candidate.read_states().items()}  # type: ignore[attr-defined]
                for ring, whole in committed(spec, given | expected).items():
                    if ring in held:
                        note(f"{name}_{chunk}", ring, whole, held[ring])
            for t in signature(spec, name)[1]:
                if t.name not in got:  # the engine keeps it
                    continue
                a, b = (_ran(r, t.name, expected, stacks) for r in (expected, got))
                note(f"{name}_{chunk}", t.name, a, b, own[name, t.name])
            results[name] = expected
        tensors = {k: torch.from_numpy(np.asarray(v)) for k, v in feeds.items()}
        with torch.no_grad():
            carry, invariants = ({k: v.numpy() for k, v in part.items()} for part in program.model.begin(tensors))
        got = candidate.run("begin", chunk, feeds)
        begun = {f"first_{k}": v for k, v in carry.items()} | invariants
        for key in got:
            note(f"begin_{chunk}", key, begun[key], got[key])
        if spec.layers:  # the host has driven `loop` already, by the layers' own methods
            continue
        carry["depth"] = np.zeros(spec.active.shape, np.int64)
        last, emits, iterations = host_loop(candidate, spec, carry, feeds | invariants, dials)
        for name in ("h", "depth"):
            note(f"step_{chunk}", name, results["loop"][name], last[name], own.get(("loop", name), 0.0))
        for t in spec.emits:
            a, b = (found[t.name][:iterations] for found in (results["loop"], emits))
            note(f"step_{chunk}", t.name, a, b, own.get(("loop", t.name), 0.0))
    return worst


def _ran(found: Arrays, name: str, expected: Arrays, stacks: set[str]) -> np.ndarray:
    """A tensor that a method gave; of the loop's stacks the iterations that it ran."""
    ran = slice(int(expected["iterations"])) if name in stacks and "iterations" in expected else slice(None)
    return np.atleast_1d(found[name])[ran]


def differ(a: np.ndarray, b: np.ndarray, mean_square: bool) -> float:
    """The largest difference of two arrays relative to the first's largest value, or with `mean_square` the root of the mean
    square relative to that of the first.
    """
    a, b = np.asarray(a).reshape(-1), np.asarray(b).reshape(-1)
    if a.shape != b.shape:
        return np.inf
    largest = size = squares = own = 0.0
    for start in range(0, a.size, BLOCK):  # in float64 only a part of them
        x, y = (part[start : start + BLOCK].astype(np.float64) for part in (a, b))
        if mean_square:
            squares, own = squares + np.square(x - y).sum(), own + np.square(x).sum()
        else:
            largest, size = np.maximum(largest, np.abs(x - y).max()), np.maximum(size, np.abs(x).max())  # NaN stays
    if mean_square:
        return float(np.sqrt(squares / max(1e-6 * a.size, own))) if a.size else 0.0
    return float(largest / max(1.0, size))


def committed(spec: LoopSpec, found: Arrays) -> Arrays:
    """The state in `found` with what the call gave for its valid rows put where it belongs, but for what is written
    once per segment.
    """
    position = int(found["position"][0])
    n = int(found["n_valid"][0]) if "n_valid" in found else spec.chunk
    after = {s.name: found[s.name].copy() for s in spec.state if not isinstance(s.update, Written)}
    for s in spec.state:
        if isinstance(s.update, Written):
            continue
        given = found[s.update.source]
        if isinstance(s.update, Replace):
            after[s.name] = given.copy()
        else:
            slots = (position + np.arange(n)) % after[s.name].shape[-2]
            after[s.name][..., slots, :] = given[..., :n, :]
    return after
