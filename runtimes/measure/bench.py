"""Speed of a runtime at fixed depths and with its own exits, all rows interleaved in one run.

pp  prefill: tokens of a prompt per second
tg  decode: tokens per second one by one, teacher-forced, so that every repetition does the same work
gen, spec  greedy text behind the context: tokens per second plain, and by speculative decoding
loop1, loop64  the `loop` method alone: milliseconds per call of 1 and of 64 rows
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from statistics import mean, median, stdev
from time import perf_counter
from typing import Any

import numpy as np

from rmse_edge.errors import UserError
from rmse_edge.info import ModelInfo
from rmse_edge.loop.dials import Dials
from rmse_edge.runtimes.host.text import LoopRuntime
from rmse_edge.runtimes.text.generate import Generation
from rmse_edge.runtimes.text.sampling import Sampler, Sampling
from rmse_edge.runtimes.text.speculation import Speculation
from rmse_edge.text import TokenNumbers

CONTEXT = 64  # tokens fed before decoding is timed, if the model has room for them
LOOP_SECONDS = 0.02  # time of one repetition of a loop row at least: single calls are too short for the clock
# Of a weight in memory, by how it is stored: fp16 is widened when loaded, scales of groups of 32 count as part of int4.
WEIGHT_BYTES = {"fp32": 4.0, "fp16": 4.0, "int8": 1.0, "int4": 0.625}


@dataclass(frozen=True)
class BenchSettings:
    """What to time."""

    prompt: int = 512  # tokens of the pp rows; 0: none
    generate: int = 128  # tokens of the tg rows; 0: none
    depths: tuple[int, ...] = ()  # fixed depths; by default full, a half and a third of it
    adaptive: Dials | None = None  # of the adaptive rows; None: there are none
    repetitions: int = 5  # after one warm-up of every row
    context: int = CONTEXT  # tokens in front of those of the tg rows
    speculation: Speculation | None = None  # of the spec rows; None: there are none, nor gen rows

    def fitting(self, room: int | None) -> BenchSettings:
        """The same for models that take texts of `room` tokens; None: of any number.

        Decoding keeps its tokens, as far as half the room goes, and what is in front of them takes the rest.
        """
        if room is None:
            return self
        generate = min(self.generate, max(1, room - min(self.context, room // 2)))
        return replace(
            self, prompt=min(self.prompt, room), generate=generate, context=min(self.context, room - generate)
        )

    def tokens_needed(self, info: ModelInfo) -> int:
        """Tokens that the longest row reads."""
        return max(self.prompt, self.context + self.generate if self.generate else 0, *info.chunks)


@dataclass
class Row:
    """One line of the table: what is timed, and the speed of each repetition."""

    test: str  # "pp512", "tg128", "loop1", ...
    mode: str  # "fixed" or "adaptive"
    dials: Dials
    work: Callable[[Row], float]  # one repetition: tokens/s, or ms for the loop rows
    speeds: list[float] = field(default_factory=list)
    depth: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # of the timed positions
    iterations: list[int] = field(default_factory=list)  # of the timed calls
    expert_ram: dict[str, Any] | None = None  # of the last repetition, see `Runtime.expert_figures`
    speculation: dict[str, Any] | None = None  # of the last repetition, see `Speculator.statistics`

    def summary(self) -> dict[str, Any]:
        """Under stable names; `mean_iterations` is per call, where the deepest position decides."""
        spread = stdev(self.speeds) if len(self.speeds) > 1 else 0.0
        speed = {"mean": mean(self.speeds), "sd": spread, "median": median(self.speeds)}
        known = {"test": self.test, "mode": self.mode, "max_loops": self.dials.max_loops}
        if not len(self.depth):
            return known | {"ms": speed}
        known |= {"mean_loops": float(self.depth.mean()), "mean_iterations": float(np.mean(self.iterations))}
        budget = {} if self.expert_ram is None else {"expert_ram": self.expert_ram}
        drafts = {} if self.speculation is None else {"speculation": self.speculation}
        return known | {"tok_per_s": speed} | budget | drafts


def third(full: int) -> int:
    """A third of full depth: 4 of 12."""
    return max(1, full // 3)


def default_depths(full: int) -> list[int]:
    """Full depth, a half and a third of it."""
    return sorted({full, max(1, full // 2), third(full)}, reverse=True)


def histogram(depth: np.ndarray, full: int) -> list[int]:
    """How many positions have depth 1..`full`."""
    return np.bincount(depth, minlength=full + 1)[1:].tolist()


def weight_bytes_per_token(info: ModelInfo, loops: float) -> float:
    """Bytes of weights that decoding one token multiplies with, an estimate.

    Every weight of the active experts and of the dense parts counts once per loop that ran, whether it came from memory
    or, in later loops, from a cache; what is outside the loop counts once. Keys and values are left out.
    """
    return WEIGHT_BYTES.get(info.quant, 4.0) * (loops * info.loop_weights + info.once_weights)


class Bench:
    """Times one runtime on one text.

    Raises:
        UserError: the text is shorter than the longest row, or a depth is beyond the trained one.
    """

    def __init__(self, runtime: LoopRuntime, ids: np.ndarray, settings: BenchSettings) -> None:
        needed = settings.tokens_needed(runtime.info)
        if len(ids) < needed:
            raise UserError(f"the text has {len(ids)} tokens, this bench needs {needed}; lower -p or -n")
        self.runtime = runtime
        self.ids = ids
        self.settings = settings
        self.full = runtime.info.max_loops
        self.depths = list(dict.fromkeys(settings.depths)) or default_depths(self.full)
        dials = [("fixed", runtime.info.check(Dials(d))) for d in self.depths]
        if settings.adaptive:
            dials.append(("adaptive", settings.adaptive))
        tests = (("pp", settings.prompt, self._prefill), ("tg", settings.generate, self._decode))
        self.rows = [Row(f"{kind}{n}", mode, d, work) for kind, n, work in tests if n for mode, d in dials]
        if settings.speculation is not None and settings.generate:
            settings.speculation.check(runtime)
            written = [d for d in dials if d[0] == "adaptive" or d[1].max_loops == self.full]
            for kind, speculation in (("gen", None), ("spec", settings.speculation)):
                work = partial(self._write, speculation)
                self.rows += [Row(f"{kind}{settings.generate}", mode, d, work) for mode, d in written]
        # Full depth and a third are always among them: their ratio says what stopping early saves.
        depths = sorted({*self.depths, self.full, third(self.full)}, reverse=True)
        self.loop_rows = [
            Row(f"loop{chunk}", "fixed", Dials(d), partial(self._loop, chunk))
            for chunk in runtime.info.chunks
            for d in depths
        ]

    def run(self, progress: Callable[[int], object] = lambda _: None) -> None:
        """One warm-up and then the repetitions, round robin over all rows: drift of the machine meets all alike."""
        run_together([self], progress)

    @property
    def passes(self) -> int:
        """How often `run` reports progress."""
        return (self.settings.repetitions + 1) * len(self.rows + self.loop_rows)

    def _prefill(self, row: Row) -> float:
        """Tokens per second of one prompt."""
        self.runtime.reset()
        self.runtime.clear_expert_figures()
        start = perf_counter()
        fed = self.runtime.feed(self.ids[: self.settings.prompt], row.dials, logits="last")
        seconds = perf_counter() - start
        row.depth, row.iterations = fed.depth, fed.iterations
        row.expert_ram = self.runtime.expert_figures(self.settings.prompt)
        return self.settings.prompt / seconds

    def _decode(self, row: Row) -> float:
        """Tokens per second after `context` tokens, a prompt that is not timed."""
        self.runtime.reset()
        context = self.settings.context
        if context:
            self.runtime.feed(self.ids[:context], row.dials, logits="last")
        tokens = self.ids[context : context + self.settings.generate]
        self.runtime.clear_expert_figures()
        start = perf_counter()
        fed = [self.runtime.feed(tokens[i : i + 1], row.dials, logits="last") for i in range(len(tokens))]
        seconds = perf_counter() - start
        row.depth = np.concatenate([f.depth for f in fed])
        row.iterations = [f.iterations[0] for f in fed]
        row.expert_ram = self.runtime.expert_figures(len(tokens))
        return len(tokens) / seconds

    def _write(self, speculation: Speculation | None, row: Row) -> float:
        """Tokens per second of greedy text after `context` tokens, which are not timed."""
        self.runtime.reset()
        self.runtime.clear_expert_figures()
        made = Generation(
            self.runtime, TokenNumbers(), self.ids[: max(1, self.settings.context)].tolist(), row.dials,
            Sampler(Sampling(temperature=0)), self.settings.generate + 1, speculation=speculation,
        )  # fmt: skip
        for _ in made.steps():
            pass
        row.depth, row.iterations = np.array(made.depth[1:]), made.iterations
        row.expert_ram = self.runtime.expert_figures(self.settings.generate)
        found = made.statistics()
        row.speculation = found.get("speculation")
        return found["tokens_per_s"]

    def _loop(self, chunk: int, row: Row) -> float:
        """Milliseconds of one `loop` call, averaged over as many as fill `LOOP_SECONDS`."""
        methods = self.runtime.methods
        self.runtime.reset()
        around = self.runtime.context(chunk, chunk) | self.runtime.state | self.runtime.memory
        feeds = methods.run("prelude", chunk, self.runtime.inputs(chunk, self.ids[:chunk]) | around)
        feeds = feeds | around | row.dials.arrays()
        calls, seconds, start = 0, 0.0, perf_counter()
        while seconds < LOOP_SECONDS:
            int(methods.run("loop", chunk, feeds)["iterations"])  # which a GPU says when it is done
            calls, seconds = calls + 1, perf_counter() - start
        return 1000 * seconds / calls

    def _bytes_per_token(self, iterations: float, loops: float) -> float:
        """Bytes that decoding a token reads: counted, where the engine counts them, otherwise an estimate."""
        counted = getattr(self.runtime, "traffic", None)
        if counted is None:
            return weight_bytes_per_token(self.runtime.info, loops)
        return float(counted.of_call(1, iterations))

    def summary(self) -> dict[str, Any]:
        """All results under stable names.

        `speculative_speedup` compares the spec rows with the gen rows, by medians, at fixed and adaptive depth.
        `loop_time_ratio` compares the loop stopped at a third of the depth with full depth, `adaptive_speedup` the
        adaptive rows with those at full depth, both by medians. `histogram` and `work_skipped` belong to the adaptive row
        with the most positions; null without one.
        """
        rows = [row.summary() for row in self.rows]
        for row in rows:
            # Prefill calls share the weights they fetch among 64 rows: only decoding has one figure per token.
            moved = self._bytes_per_token(row["mean_iterations"], row["mean_loops"])
            speed = moved * row["tok_per_s"]["median"]
            row["gb_per_s"] = speed / 1e9 if row["test"].startswith(("tg", "gen")) else None
        loops = [row.summary() for row in self.loop_rows]
        ms = {(row["test"], row["max_loops"]): row["ms"]["median"] for row in loops}
        median_of = {(row["test"], row["mode"], row["max_loops"]): row["tok_per_s"]["median"] for row in rows}
        speedup = {
            test: value / median_of[test, "fixed", self.full]
            for (test, mode, _), value in median_of.items()
            if mode == "adaptive" and (test, "fixed", self.full) in median_of
        }
        drafted = {
            row["mode"]: row["tok_per_s"]["median"]
            / median_of[f"gen{self.settings.generate}", row["mode"], row["max_loops"]]
            for row in rows
            if "speculation" in row
        }
        adaptive = max((r for r in self.rows if r.mode == "adaptive"), key=lambda r: len(r.depth), default=None)
        return {
            "repetitions": self.settings.repetitions,
            "rows": rows,
            "loop_rows": loops,
            "loop_time_ratio": {
                "max_loops": third(self.full),
                "of": self.full,
                **{row.test: ms[row.test, third(self.full)] / ms[row.test, self.full] for row in self.loop_rows},
            },
            "adaptive_speedup": speedup,
            **({"speculative_speedup": drafted} if drafted else {}),
            "histogram": histogram(adaptive.depth, self.full) if adaptive else None,
            "work_skipped": 1 - float(adaptive.depth.mean()) / self.full if adaptive else None,
        }


def run_together(benches: Sequence[Bench], progress: Callable[[int], object] = lambda _: None) -> None:
    """Run benches of the same settings side by side: every row of one is followed by the same row of the others.

    Args:
        progress: called with 1 after every row; there are the `passes` of all benches.
    """
    lists = [[*bench.rows, *bench.loop_rows] for bench in benches]
    for repetition in range(benches[0].settings.repetitions + 1):
        for row in (row for side in zip_longest(*lists) for row in side if row is not None):
            speed = row.work(row)
            if repetition:
                row.speeds.append(speed)
            progress(1)


def ratios(first: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    """How many times as fast `other` was, row by row, by medians; both are summaries of benches run together."""
    found = []
    for kind, unit in (("rows", "tok_per_s"), ("loop_rows", "ms")):
        known = {(r["test"], r["mode"], r["max_loops"]): r[unit]["median"] for r in first[kind]}
        for r in other[kind]:
            key = (r["test"], r["mode"], r["max_loops"])
            if key in known:
                speedup = r[unit]["median"] / known[key] if unit == "tok_per_s" else known[key] / r[unit]["median"]
                found.append(dict(zip(("test", "mode", "max_loops"), key)) | {"speedup": speedup})
    return found
