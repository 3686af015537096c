"""The checks on one compute unit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from time import perf_counter

import numpy as np
from plan import DEVICES, UNITS, compiled_for, coremltools, load_plan, placement
from reference import Reference, difference
from report import Outcome, one_line, table

from rmse_edge.loop.dials import Dials
from rmse_edge.runtimes.engines.coreml import CoremlMethods, CoremlRuntime
from rmse_edge.runtimes.measure.bench import third

LOOPS = {"host_loop": "driven by the host", "loop": "in the graph"}
EXACT = 1e-3  # largest relative difference of a function of an fp32 package
ROUNDED = 3e-2  # of others, root mean square
# The same of step and loop: where two experts are nearly tied, rounding decides, and one row moves by a tenth or so.
ROUTED = 0.2
EARLY = 0.8  # of the time at full depth, which the loop stopped at a third of it must stay below
WARM_UPS = 2


class Unit:
    """The checks on one compute unit."""

    def __init__(self, reference: Reference, compute: str, compiled: Path, repeats: int) -> None:
        """`compiled`: the `.mlmodelc` of the package."""
        self.reference, self.compute, self.compiled, self.repeats = reference, compute, compiled, repeats
        self.exact = reference.package.manifest["model"]["quant"] == "fp32"

    def checks(self) -> dict[str, Callable[[], Outcome]]:
        return {
            "loading": self.loading,
            "functions against the interpreter": self.functions,
            "states": self.states,
            "text against the interpreter": self.text,
            "latency": self.latency,
            "greedy decoding": self.decoding,
            "compute plan": self.plan,
        }

    @cached_property
    def runtime(self) -> CoremlRuntime:
        """The package on Core ML; laid out as it is, but run on this unit."""
        return CoremlRuntime(self.reference.package, engine="coreml", compute=self.compute)

    @property
    def methods(self) -> CoremlMethods:
        return self.runtime.methods

    def loading(self) -> Outcome:
        """Every function alone, twice: Core ML prepares a model for a device once and keeps that."""
        ct = coremltools()
        outcome, rows = Outcome(), []
        for name in self.reference.package.manifest["methods"]:
            ms: list[float] = []
            try:
                for _ in range(2):
                    start = perf_counter()
                    ct.models.CompiledMLModel(str(self.compiled), ct.ComputeUnit[UNITS[self.compute]], name)
                    ms.append(1000 * (perf_counter() - start))
            except Exception as error:
                outcome.problems.append(f"{name}: {one_line(error)}")
            rows.append((name, *(f"{value:.1f}" for value in ms), *["FAILED"] * (2 - len(ms))))
        outcome.lines = table(("function", "first load, ms", "second load, ms"), rows)
        return outcome

    def functions(self) -> Outcome:
        """Each function alone, on the same inputs and states."""
        outcome, rows, methods = Outcome(), [], self.methods
        for name, example in self.reference.examples.items():
            try:
                methods.write_states(example.rings)
                gives = methods.call(name, example.feeds) | methods.read_states()
                found = {k: (v, *difference(v, gives[k])) for k, v in (example.gives | example.after).items()}
            except Exception as error:
                outcome.problems.append(f"{name}: {one_line(error)}")
                rows.append((name, "FAILED", "", ""))
                continue
            worst = max(found, key=lambda key: np.nan_to_num(found[key][1], nan=np.inf))
            rows.append((name, f"{found[worst][1]:.1e}", f"{max(f[2] for f in found.values()):.1e}", worst))
            wrong = [key for key, (value, *sizes) in found.items() if not self.agrees(name, value, *sizes)]
            outcome.problems += [f"{name}: {key} differs by {found[key][1]:.1e}" for key in wrong]
        rounded = f"root mean square at most {ROUNDED:.0e}, of step and loop {ROUTED}"
        rule = f"largest at most {EXACT:.0e}" if self.exact else rounded
        head = ("function", "largest relative difference", "root mean square", "largest at")
        outcome.lines = [*table(head, rows), "", f"Allowed: {rule}; flags and whole numbers are equal."]
        return outcome

    def agrees(self, function: str, value: np.ndarray, largest: float, mean_square: float) -> bool:
        if value.dtype.kind != "f":
            return largest == 0
        allowed = ROUTED if function.startswith(("step_", "loop_")) else ROUNDED
        return largest <= EXACT if self.exact else mean_square <= allowed  # NaN is wrong

    def states(self) -> Outcome:
        """Read back as written, also after calls that only read; what one function writes, another sees."""
        if not self.methods.rings:
            return Outcome(skipped="the package keeps no states: rings are given and returned")
        outcome, ours, theirs = Outcome(), self.methods, self.reference.runtime.methods
        step = self.reference.examples["step_1"]

        def same(what: str) -> None:
            for name, value in ours.read_states().items():
                if not np.array_equal(value, step.rings[name]):
                    outcome.problems.append(f"{what}: {name} is not what was written")

        ours.write_states(step.rings)
        same("read back")
        for _ in range(2):
            ours.call("step_1", step.feeds)
        same("after two calls of step_1")
        rows = []
        for commit in (name for name in ours.functions if name.startswith("commit_")):
            effects = []
            for methods in (theirs, ours):
                methods.write_states({name: np.zeros_like(value) for name, value in step.rings.items()})
                before = np.array(methods.call("step_1", step.feeds)["next_h"])
                # For the positions just before: others may be out of its sight.
                written = self.reference.examples[commit].feeds
                methods.call(commit, written | {"position": step.feeds["position"] - written["n_valid"]})
                held = {name: np.array(value) for name, value in methods.read_states().items()}
                after = np.array(methods.call("step_1", step.feeds)["next_h"])
                effects.append((before, after, held))
            (_, expected, wanted), (before, after, held) = effects
            effect, apart = difference(before, after)[1], difference(expected, after)
            rows.append((commit, f"{effect:.1e}", f"{apart[1]:.1e}"))
            if effect == 0:
                outcome.problems.append(f"step_1 does not see what {commit} wrote")
            if not self.agrees("step_1", expected, *apart):
                outcome.problems.append(f"step_1 after {commit} differs by {apart[0]:.1e}")
            lost = [k for k in held if not self.agrees(commit, wanted[k], *difference(wanted[k], held[k]))]
            outcome.problems += [f"{name} after {commit} is not what the interpreter holds" for name in lost]
        outcome.lines = table(("written by", "changes step_1 by", "step_1 differs from the interpreter by"), rows)
        return outcome

    def text(self) -> Outcome:
        """Teacher-forced, with both loops."""
        outcome, rows, prompt = Outcome(), [], self.reference.prompt
        for setting in self.reference.settings:
            theirs = self.reference.course(setting)
            for loop, label in LOOPS.items():
                self.runtime.calls.loop = loop
                ours = self.reference.walk(self.runtime, setting)
                for part, what in ((slice(prompt), "prompt"), (slice(prompt, None), "single tokens")):
                    found = theirs.compared(ours, part)
                    cells = [f"{v:.1%}" if "same" in k else f"{v:.3g}" for k, v in found.items()]
                    rows.append((setting, label, f"{len(ours.depth[part])}, {what}", *cells))
                outcome.problems += [f"{setting}, loop {label}: {p}" for p in theirs.problems(ours)]
        outcome.lines = table(("setting", "loop", "tokens", *found), rows)
        return outcome

    def latency(self) -> Outcome:
        """Calls as a host makes them, arrays converted; a loop in the graph that stops early has to take less time."""
        outcome, rows, full = Outcome(), [], self.runtime.info.max_loops
        early = third(full)
        for name, example in self.reference.examples.items():
            medians = []
            for depth in (full, early) if name.startswith("loop_") and early < full else (full,):
                feeds = example.feeds | ({"max_loops": np.array(depth)} if "max_loops" in example.feeds else {})
                try:
                    self.methods.write_states(example.rings)
                    ms = timed(lambda name=name, feeds=feeds: self.methods.call(name, feeds), self.repeats)
                except Exception as error:
                    outcome.problems.append(f"{name}: {one_line(error)}")
                    continue
                medians.append(float(np.median(ms)))
                label = f"{name}, {depth} of {full} loops" if name.startswith("loop_") else name
                rows.append((label, f"{medians[-1]:.3f}", f"{np.percentile(ms, 90):.3f}"))
            if len(medians) == 2:
                ratio = medians[1] / medians[0]
                message = f"{name} stopped at {early} of {full} loops takes {ratio:.2f} of the full time"
                outcome.lines += [f"- {message}"]
                outcome.problems += [] if ratio < EARLY else [message]
        outcome.lines = [*table(("function", "median, ms", "p90, ms"), rows), "", *outcome.lines]
        return outcome

    def decoding(self) -> Outcome:
        """Greedy, after a prompt that is not timed."""
        outcome, rows, full = Outcome(), [], self.runtime.info.max_loops
        for loop, label in LOOPS.items():
            self.runtime.calls.loop = loop
            (fast, _), (adaptive, loops) = (self.greedy(dials) for dials in self.reference.settings.values())
            rows.append((label, "full depth", f"{fast:.1f}", full, ""))
            rows.append((label, "adaptive", f"{adaptive:.1f}", f"{loops:.2f}", f"{adaptive / fast:.2f} x"))
            if loops <= full / 2 and adaptive <= fast:
                outcome.problems.append(f"loop {label}: {loops:.2f} of {full} loops are no faster than all of them")
        outcome.lines = table(("loop", "setting", "tokens/s", "mean depth", "as fast as full depth"), rows)
        return outcome

    def greedy(self, dials: Dials) -> tuple[float, float]:
        """Tokens per second and mean depth of decoding."""
        count, depths = self.reference.count - self.reference.prompt, []
        self.runtime.reset()
        fed = self.runtime.feed(self.reference.tokens[: self.reference.prompt], dials, "last")
        start = perf_counter()
        for _ in range(count):
            fed = self.runtime.feed([int(fed.logits[-1].argmax())], dials, "last")
            depths.append(fed.depth[0])
        return count / (perf_counter() - start), float(np.mean(depths))

    def plan(self) -> Outcome:
        """Where Core ML means to run every operation."""
        outcome, rows, wanted = Outcome(), [], DEVICES[self.compute]
        whole = load_plan(self.compiled, self.compute)
        for name in self.reference.package.manifest["methods"]:
            try:
                placed = placement(whole, name)
                if not placed.operations:  # a plan is that of the package's default function
                    alone = compiled_for(self.reference.program, name, self.compiled.parent)
                    placed = placement(load_plan(alone, self.compute), name)
            except Exception as error:
                outcome.problems.append(f"{name}: {one_line(error)}")
                continue
            if not placed.operations:
                outcome.problems.append(f"{name}: Core ML places none of its operations")
            counts = [f"{placed.operations[d]} ({placed.cost[d]:.0%})" for d in DEVICES.values()]
            rows.append((name, *counts, ", ".join(placed.off(wanted)) or "none"))
        head = ("function", *(f"{d}: operations (cost)" for d in DEVICES.values()), f"not on the {wanted}")
        note = "Operators with `cannot` have no form there; Core ML prefers another device for the others."
        outcome.lines = [*table(head, rows), "", note]
        return outcome


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` calls, after some that are not timed."""
    ms = []
    for _ in range(WARM_UPS + repeats):
        start = perf_counter()
        call()
        ms.append(1000 * (perf_counter() - start))
    return ms[WARM_UPS:]
