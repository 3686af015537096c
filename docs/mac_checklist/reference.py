"""What Core ML is held against: the interpreter of the same file, on inputs that are made up here and on a text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from rmse_edge.loop.dials import Dials
from rmse_edge.numbers import SEGMENT
from rmse_edge.package import Package
from rmse_edge.runtimes.engines.coreml import CoremlRuntime
from rmse_edge.runtimes.host.base import Arrays

LEEWAY = 2  # tokens that may differ at least: 2 % of a short text would be none


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
