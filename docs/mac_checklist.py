"""What a Core ML package does on a Mac, as one Markdown report to attach to an issue. See docs/mac-checklist.md.

    pip install 'rmse-edge[coreml]'
    python docs/mac_checklist.py PACKAGE.rmse -o report.md

Everything comes from the package: its manifest says what each function takes and gives, the reference is the
interpreter of runtimes/mil/interpreter.py on the same file. No checkpoint is needed. Every check runs, whatever came of those ahead
of it; with -o the file is written after each one, so that a crash of the engine leaves what was found until then.

Exit codes: 0 all ok, 1 a check failed, 2 something given is wrong.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from rmse_edge.cli.common import Parser, positive_int, verb
from rmse_edge.errors import PackageError, UserError, quiet
from rmse_edge.files import write_text
from rmse_edge.loop.dials import Dials
from rmse_edge.numbers import SEGMENT
from rmse_edge.package import MANIFEST, Package
from rmse_edge.runtimes.engines.coreml import CoremlMethods, CoremlRuntime
from rmse_edge.runtimes.host.base import Arrays
from rmse_edge.runtimes.measure.bench import third

UNITS = {"cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ane": "CPU_AND_NE"}
DEVICES = {"cpu": "CPU", "gpu": "GPU", "ane": "NeuralEngine"}  # as coremltools' classes for them begin behind "ML"
LOOPS = {"host_loop": "driven by the host", "loop": "in the graph"}
LEAST_TOKENS = 12  # so that the prompt is one padded call of 64 rows, and single tokens follow
EXACT = 1e-3  # largest relative difference of a function of an fp32 package
ROUNDED = 3e-2  # of others, root mean square
# The same of step and loop: where two experts are nearly tied, rounding decides, and one row moves by a tenth or so.
ROUTED = 0.2
LEEWAY = 2  # tokens that may differ at least: 2 % of a short text would be none
EARLY = 0.8  # of the time at full depth, which the loop stopped at a third of it must stay below
WARM_UPS = 2


# ---------------------------------------------------------------------------------------------------- the report


@dataclass
class Outcome:
    """What a check found: Markdown, and what is wrong; nothing wrong is ok."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: str = ""  # why it did not run

    @property
    def verdict(self) -> str:
        if self.problems:
            return f"**FAILED**: {'; '.join(self.problems)}"
        return f"skipped: {self.skipped}" if self.skipped else "ok"


class Report:
    """Collects outcomes and writes them down."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.sections: list[str] = []
        self.verdicts: list[tuple[str, Outcome]] = []

    def section(self, title: str, lines: Iterable[str]) -> None:
        self.sections += [f"## {title}", "", *lines, ""]
        if self.path is not None:
            write_text(self.path, self.text())

    def check(self, title: str, run: Callable[[], Outcome]) -> None:
        """Run a check; an exception is what is wrong with it, in one line."""
        print(f"mac_checklist: {title} ...", file=sys.stderr, flush=True)
        try:
            outcome = run()
        except Exception as error:
            outcome = Outcome(problems=[one_line(error)])
        self.verdicts.append((title, outcome))
        self.section(title, [f"Verdict: {outcome.verdict}", "", *outcome.lines])

    @property
    def failed(self) -> bool:
        return any(outcome.problems for _, outcome in self.verdicts)

    def text(self) -> str:
        summary = table(("check", "verdict"), ((title, cell(o.verdict)) for title, o in self.verdicts))
        return "\n".join(["# rmse-edge on Core ML", "", *summary, "", *self.sections]).rstrip() + "\n"


def one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return message if isinstance(error, UserError) else f"{type(error).__name__}: {message}"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def bullets(values: dict[str, Any]) -> list[str]:
    return [f"- {name}: {value}" for name, value in values.items()]


def sysctl(name: str) -> str:
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed (run from a folder)"


def machine() -> dict[str, str]:
    memory = sysctl("hw.memsize")
    return {
        "macOS": platform.mac_ver()[0],
        "chip": sysctl("machdep.cpu.brand_string") or platform.machine(),
        "memory": f"{int(memory) / 2**30:.0f} GiB" if memory.isdigit() else "unknown",
        "Python": platform.python_version(),
        **{name: installed(name) for name in ("coremltools", "numpy", "rmse-edge")},
    }


def described(package: Package) -> dict[str, Any]:
    model, lowering = package.manifest["model"], package.manifest["lowering"]
    weights = [package.path(name).stat().st_size for name in package.digests if name.endswith("weight.bin")]
    return {
        "name": f"{model['name']}, {model['parameters']:,} parameters, {model['max_loops']} loops",
        "target": package.target,
        "quant": model["quant"],
        "laid out for": lowering["compute"],
        "bytes": f"{package.nbytes:,}, of which weights {sum(weights):,}",
        "fingerprint": model["fingerprint"],
        "sha256 of the manifest": package.digests[MANIFEST],
        "states": ", ".join(f"{name} {ring['shape']}" for name, ring in lowering["rings"].items()) or "none",
        "structure": lowering.get("structure", "not counted"),
        "functions": ", ".join(package.manifest["methods"]),
        "made with": ", ".join(f"{k} {v}" for k, v in package.manifest["versions"].items()),
    }


# ------------------------------------------------------------------------------------------------- the reference


@dataclass(frozen=True)
class Example:
    """Inputs of a function, what the states hold before, and what the interpreter makes of it."""

    feeds: Arrays
    rings: Arrays
    gives: Arrays
    after: Arrays


@dataclass(frozen=True)
class Course:
    """What feeding a prompt and single tokens gave: logits (n, V), depth (n,)."""

    logits: np.ndarray
    depth: np.ndarray

    def compared(self, other: Course, part: slice) -> dict[str, float]:
        """How much `other` is like this one."""
        a, b = (course.logits[part].astype(np.float64) for course in (self, other))
        p, q = (x - x.max(-1, keepdims=True) for x in (a, b))
        p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
        return {
            "same top token": float((a.argmax(-1) == b.argmax(-1)).mean()),
            "same depth": float((self.depth[part] == other.depth[part]).mean()),
            "largest logit difference": float(np.abs(a - b).max()),
            "KL": float((np.exp(p) * (p - q)).sum(-1).mean()),
            "mean depth here": float(other.depth[part].mean()),
            "mean depth there": float(self.depth[part].mean()),
        }

    def problems(self, other: Course) -> list[str]:
        """By the rounded rule of the parity gate, with some leeway."""
        from rmse_edge.export.gate.compare import KL, MEAN_DEPTH, SAME_DEPTH, SAME_TOKEN

        found, least = self.compared(other, slice(None)), LEEWAY / len(self.depth)
        here, there = found["mean depth here"], found["mean depth there"]
        rules = {  # false for NaN
            f"same top token {found['same top token']:.1%}": 1 - found["same top token"] <= max(least, 1 - SAME_TOKEN),
            f"same depth {found['same depth']:.1%}": 1 - found["same depth"] <= max(least, 1 - SAME_DEPTH),
            f"mean depth {here:.3f}, not {there:.3f}": abs(here - there) <= max(least, MEAN_DEPTH * there),
            f"KL {found['KL']:.1e}": found["KL"] <= KL,
        }
        return [message for message, ok in rules.items() if not ok]


class Reference:
    """The interpreter on the package: made-up inputs for every function, and texts to compare with."""

    def __init__(self, package: Package, count: int) -> None:
        self.package, self.count = package, count
        self._courses: dict[str, Course] = {}

    @cached_property
    def runtime(self) -> CoremlRuntime:
        return CoremlRuntime(self.package, engine="interpreter")

    @cached_property
    def tokens(self) -> np.ndarray:
        """(count,) of the package's sample text, or drawn."""
        text = self.package.manifest["text"]
        ids: list[int] = []
        if "sample" in text and "tokenizer" in text:
            from rmse_edge.text import Tokenizer

            sample = self.package.path(text["sample"]).read_text(encoding="utf-8")
            ids = Tokenizer(self.package.path(text["tokenizer"])).encode(sample)
        if len(ids) < self.count:
            return np.random.default_rng(3).integers(0, self.runtime.info.vocab_size, self.count)
        return np.array(ids[: self.count], np.int64)

    @property
    def program(self) -> Path:
        return self.package.folder / self.package.manifest["lowering"]["program"]

    @property
    def prompt(self) -> int:
        """Tokens that are fed at once; the others follow one by one."""
        return min(SEGMENT, 2 * self.count // 3)

    @cached_property
    def settings(self) -> dict[str, Dials]:
        """Full depth, and the model's own exit rule or the one its export was proved at."""
        info, own = self.runtime.info, self.runtime.info.dials
        if not own.exits:
            own = Dials(**self.package.manifest["parity"]["settings"]["gate"]["dials"])
        return {"full depth": info.full_depth, "adaptive": own}

    def course(self, setting: str) -> Course:
        if setting not in self._courses:
            self._courses[setting] = self.walk(self.runtime, setting)
        return self._courses[setting]

    def walk(self, runtime: CoremlRuntime, setting: str) -> Course:
        """Teacher-forced: the prompt in one call of 64 rows, then single tokens."""
        dials, pieces = self.settings[setting], [self.tokens[: self.prompt], *self.tokens[self.prompt :, None]]
        runtime.reset()
        fed = [runtime.feed(piece, dials) for piece in pieces]
        return Course(np.concatenate([f.logits for f in fed]), np.concatenate([f.depth for f in fed]))

    @cached_property
    def examples(self) -> dict[str, Example]:
        """Of every function. Consistent: what comes from another function is what that one gave."""
        methods, found = self.runtime.methods, {}
        for chunk in self.runtime.info.chunks:
            known = self.made_up(chunk)
            rings = {name: known[name] for name in methods.rings}
            for function, side in methods.functions.items():
                if function.rpartition("_")[2] != str(chunk):
                    continue
                # Of rings that are given, `step` takes the row of its own loop.
                shapes = {t["name"]: t["shape"] for t in side["inputs"] if t["name"] in known}
                feeds = {k: known[k][known["k"]] if known[k].ndim > len(s) else known[k] for k, s in shapes.items()}
                found[function] = self._run(function, feeds, rings)
                gives = found[function].gives
                if function.startswith(("prelude_", "loop_")):
                    known |= gives
                elif function.startswith("begin_"):
                    known |= {name.removeprefix("first_"): value for name, value in gives.items()}
                    known["depth"] = np.zeros(known["active"].shape, np.int64)
        return found

    def _run(self, function: str, feeds: Arrays, rings: Arrays) -> Example:
        methods = self.runtime.methods
        methods.write_states(rings)
        gives = {k: np.array(v) for k, v in methods.call(function, feeds).items()}
        return Example(feeds, rings, gives, {k: np.array(v) for k, v in methods.read_states().items()})

    def made_up(self, chunk: int) -> Arrays:
        """What no function gives: tokens, hits, rings that are full, a memory. Calls of 64 rows have padding."""
        runtime, draw = self.runtime, np.random.default_rng(chunk)
        info, hits = runtime.info, runtime.retrieved
        known: Arrays = {"tokens": draw.integers(0, info.vocab_size, (1, chunk))}
        known["k"] = np.array(min(1, info.max_loops - 1))
        known |= {name: draw.standard_normal(v.shape).astype(v.dtype) for name, v in hits.items() if v.dtype != bool}
        known |= {name: draw.random(v.shape) < 0.5 for name, v in hits.items() if v.dtype == bool}
        for name, s in info.state.items():
            values = draw.standard_normal(s.shape)
            known[name] = (np.abs(0.1 * values) if s.kind == "written" else values).astype(s.dtype)
        known["segment"] = draw.standard_normal((1, chunk, info.width)).astype(np.float32)
        position = 2 * SEGMENT + (5 if chunk == 1 else 0)
        return known | runtime.context(chunk, chunk - chunk // 8, position) | info.full_depth.arrays()


def difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """(largest, root mean square) difference, relative to the size of `ours`; NaN where there is one."""
    a, b = (np.atleast_1d(x).astype(np.float64) for x in (ours, theirs))
    with np.errstate(invalid="ignore"):
        apart = np.where(a == b, 0, a - b)  # masks may hold infinities
    a = np.where(np.isfinite(a), a, 0)
    mean_square = np.sqrt(np.square(apart).mean() / max(1e-6, np.square(a).mean()))
    return float(np.abs(apart).max() / max(1, np.abs(a).max())), float(mean_square)


# ---------------------------------------------------------------------------------------------------- the checks


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


@dataclass
class Placement:
    """What Core ML plans for a function, nested blocks included."""

    operations: Counter[str] = field(default_factory=Counter)  # by the device that is preferred
    cost: dict[str, float] = field(default_factory=lambda: dict.fromkeys(DEVICES.values(), 0.0))  # share of all work
    # By operator, the device that is preferred, and those that could run it.
    kinds: Counter[tuple[str, str, frozenset[str]]] = field(default_factory=Counter)

    def off(self, wanted: str, most: int = 12) -> list[str]:
        """Operators that are not on a device, the most frequent first: `topk 2 (cannot)`."""
        found: Counter[tuple[str, bool]] = Counter()
        for (kind, device, able), count in self.kinds.items():
            if device != wanted:
                found[kind, wanted in able] += count
        return [f"{kind} {count}{'' if able else ' (cannot)'}" for (kind, able), count in found.most_common(most)]


def load_plan(compiled: Path, compute: str) -> Any:
    """Core ML's plan for a `.mlmodelc`."""
    from coremltools.models.compute_plan import MLComputePlan

    return MLComputePlan.load_from_path(str(compiled), coremltools().ComputeUnit[UNITS[compute]])


def placement(plan: Any, function: str) -> Placement:
    """What a plan says about a function; nothing, where Core ML did not plan that one.

    Raises:
        ValueError: the plan does not know the function.
    """
    program = plan.model_structure.program
    if program is None or function not in program.functions:
        raise ValueError(f"the plan has no function {function}")
    placed = Placement()
    for operation in nested(program.functions[function].block):
        usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
        if usage is None:  # constants
            continue
        device = device_name(usage.preferred_compute_device)
        cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
        placed.operations[device] += 1
        placed.cost[device] = placed.cost.get(device, 0.0) + (cost.weight if cost is not None else 0.0)
        able = frozenset(device_name(d) for d in usage.supported_compute_devices)
        placed.kinds[operation.operator_name.rpartition(".")[2], device, able] += 1
    return placed


def nested(block: Any) -> Iterator[Any]:
    """Every operation of a block and of those inside it."""
    for operation in block.operations:
        yield operation
        for inner in operation.blocks:
            yield from nested(inner)


def device_name(device: Any) -> str:
    return type(device).__name__.removeprefix("ML").removesuffix("ComputeDevice")


def compiled_for(program: Path, function: str, folder: Path) -> Path:
    """The package compiled with another default function, in `folder`; once for all compute units."""
    from coremltools.proto import Model_pb2

    copy, target = folder / f"{function}.mlpackage", folder / f"{function}.mlmodelc"
    if not target.exists():
        shutil.copytree(program, copy)
        (file,) = copy.rglob("*.mlmodel")
        spec = Model_pb2.Model.FromString(file.read_bytes())
        spec.description.defaultFunctionName = function
        file.write_bytes(spec.SerializeToString())
        coremltools().models.utils.compile_model(str(copy), str(target))
        shutil.rmtree(copy)
    return target


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` calls, after some that are not timed."""
    ms = []
    for _ in range(WARM_UPS + repeats):
        start = perf_counter()
        call()
        ms.append(1000 * (perf_counter() - start))
    return ms[WARM_UPS:]


# ------------------------------------------------------------------------------------------------------ the script


def coremltools() -> Any:
    """
    Raises:
        UserError: it is not installed.
    """
    try:
        with quiet():
            import coremltools as ct
    except ImportError:
        raise UserError("coremltools is not installed; install it with: pip install 'rmse-edge[coreml]'") from None
    return ct


def units(value: str) -> list[str]:
    chosen = list(dict.fromkeys(part.strip() for part in value.split(",")))
    if unknown := [part for part in chosen if part not in UNITS]:
        raise argparse.ArgumentTypeError(f"got {unknown[0]!r}, expected some of {', '.join(UNITS)}, with commas")
    return chosen


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="mac_checklist", description="Check a Core ML package on this Mac. The report goes to stdout.")
    parser.add_argument("package", type=Path, help="made with rmse-export --target coreml")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the report there, too")
    parser.add_argument("--compute", type=units, default="cpu,gpu,ane", metavar="LIST", help="compute units to check")
    parser.add_argument("--tokens", type=positive_int, default=96, metavar="N", help="of the texts that are compared")
    parser.add_argument("--repeats", type=positive_int, default=20, metavar="N", help="timed calls of each function")
    return parser.parse_args(argv)


def checked(args: argparse.Namespace) -> Package:
    """The package, if all is as it must be; a `UserError` otherwise."""
    if platform.system() != "Darwin":
        raise UserError(
            f"needs macOS 15 or later, this is {platform.system()}; here rmse-run and rmse-export use the interpreter"
        )
    system = platform.mac_ver()[0]
    if int(system.partition(".")[0] or 0) < 15:
        raise UserError(f"needs macOS 15 or later, this is {system or 'unknown'}; functions and states came with it")
    if args.tokens < LEAST_TOKENS:
        raise UserError(f"--tokens: got {args.tokens}, expected at least {LEAST_TOKENS}")
    if args.output is not None and (args.output.is_dir() or not args.output.absolute().parent.is_dir()):
        raise UserError(f"-o: {args.output} cannot be written; give a file name in a folder that exists")
    package = Package.open(args.package)
    if package.target != "coreml":
        raise PackageError(f"{args.package}: made for {package.target}; make one with rmse-export --target coreml")
    limit = package.manifest["model"]["text"]["max_seq_len"]
    if limit is not None and args.tokens > limit:
        raise UserError(f"--tokens: got {args.tokens}, the package takes at most {limit}")
    return package


@verb("mac_checklist")
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    package = checked(args)
    ct = coremltools()
    report = Report(args.output)
    report.section("machine", bullets(machine()))
    report.section("package", bullets(described(package)))
    reference = Reference(package, args.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        compiled = Path(scratch) / "model.mlmodelc"

        def compile_it() -> Outcome:
            start = perf_counter()
            ct.models.utils.compile_model(str(reference.program), str(compiled))
            return Outcome([f"{perf_counter() - start:.2f} s"])

        report.check("compiling", compile_it)
        for compute in args.compute:
            unit = Unit(reference, compute, compiled, args.repeats)
            for name, check in unit.checks().items():
                report.check(f"{compute}: {name}", check)
    print(report.text(), end="")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
