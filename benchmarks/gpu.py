"""python -m benchmarks.gpu: the CUDA engine timed in one run, and one report with the tests. See docs/cuda.md.

Everything of one section is timed in turns, so that drift of the machine meets all alike; times are medians of rounds. On
`--device cpu` the same code runs, to see that it does: its numbers say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from rmse_edge.arch.common.identity import model_info
from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.cli.common import Parser, existing_file, existing_path, positive_int, random_model, verb
from rmse_edge.files import write_text
from rmse_edge.loop.dials import Dials
from rmse_edge.quantize import QuantizeRequest, Scheme, quantize
from rmse_edge.runtimes.cuda.batch import TextBatch
from rmse_edge.runtimes.cuda.dry import dry_run
from rmse_edge.runtimes.engines.cuda import CudaRuntime
from rmse_edge.runtimes.engines.torch import check_device
from rmse_edge.runtimes.measure.machine import copy_bandwidth, device_bandwidth

from .gpu_report import Report, read_tests

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
CONTEXT = 16  # tokens before those that are timed; calls of one row are recorded in them
EPSILON = 0.5  # of random weights, whose gates know nothing: at which some texts of a batch stop before others


@dataclass
class Timed:
    """One contestant of a section: seconds of every round, and what it did."""

    work: Callable[[], float]  # one round -> seconds
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


def in_turns(contestants: dict[str, Timed], rounds: int) -> dict[str, float]:
    """Median seconds of each, after one round that warms up."""
    for turn in range(rounds + 1):
        for timed in contestants.values():
            seconds = timed.work()
            if turn:
                timed.seconds.append(seconds)
    return {name: median(timed.seconds) for name, timed in contestants.items()}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.gpu", description="Time the CUDA engine and report.")
    parser.add_argument("models", type=existing_path, nargs="*", help="checkpoint folders of models of texts")
    parser.add_argument("--config", type=existing_file, action="append", default=[], help="random weights; repeatable")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to see that the code runs")
    parser.add_argument("--tokens", type=positive_int, default=64, help="decoded in a round")
    parser.add_argument("--batch", type=positive_int, default=64, help="texts at once")
    parser.add_argument("--rounds", type=positive_int, default=7, help="after one that warms up")
    parser.add_argument("--dry-run", action="store_true", help="build every recording from shapes alone, without a GPU")
    parser.add_argument(
        "--tests", type=Path, metavar="XML", help="what pytest --junitxml wrote; becomes part of the report"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the report for programs")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the report for people")
    return parser.parse_args(argv)


@verb("benchmarks.gpu")
def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse(argv)
    if not args.dry_run:
        check_device(args.device)
    report = Report(machine(args), read_tests(args.tests))
    for name, build in models_of(args):
        say(name)
        report.dry[name] = [len(dry_run(build())), build().spec(1).max_loops]
        if args.dry_run:
            continue
        bench = Model(name, build, args, report)
        bench.precisions()
        bench.exits()
        bench.batches()
    if args.device == "cuda" and not args.dry_run:
        from .gpu_kernels import sweep

        report.kernels = sweep(args.rounds, say)
    if args.json:
        write_text(args.json, json.dumps(report.document(), indent=1) + "\n")
    if args.markdown:
        write_text(args.markdown, report.markdown() + "\n")
    print(report.markdown())
    return 1 if report.failed_tests() else None


def models_of(args: argparse.Namespace) -> list[tuple[str, Callable[[], Any]]]:
    found: list[tuple[str, Callable[[], Any]]] = []
    for folder in args.models:
        found.append((folder.name, lambda folder=folder: load_checkpoint(folder).eval()))
    for config in args.config:
        found.append((f"{config.stem}, random weights", lambda config=config: random_model(config).eval()))
    return found


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers are from."""
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    if args.dry_run:
        return facts | {"device": "none: a dry run"}
    if args.device == "cpu":
        return facts | {"device": "cpu: to see that the code runs, not to be compared", "bandwidth": copy_bandwidth()}
    properties = torch.cuda.get_device_properties(0)
    return facts | {
        "device": properties.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "bandwidth": device_bandwidth(),
    }


class Model:
    """The sections of one model."""

    def __init__(self, name: str, build: Callable[[], Any], args: argparse.Namespace, report: Report) -> None:
        self.name, self.build, self.args, self.report = name, build, args, report
        info = model_info(build(), name, 0)
        self.full = info.full_depth
        self.third = Dials(max(1, self.full.max_loops // 3))
        # Of a trained model its own exits; random ones stop by how little the state changes.
        self.adaptive = info.dials if info.dials.exits else Dials(self.full.max_loops, exit_epsilon=EPSILON)
        ids = np.random.default_rng(0).integers(0, info.vocab_size, (args.batch, CONTEXT + args.tokens))
        self.ids = ids

    def runtime(self, precision: str, ahead: int = 2, exits: str = "flags") -> CudaRuntime:
        device = self.args.device
        if precision in ("int8", "int4"):
            q = quantize(self.build(), QuantizeRequest(Scheme(precision), method="rtn"))
            return CudaRuntime(
                q.model, self.name, 0, device, tensors=q.tensors, quant=precision, ahead=ahead, exits=exits
            )
        return CudaRuntime(self.build(), self.name, 0, device, precision, ahead=ahead, exits=exits)

    def decoding(self, runtime: CudaRuntime, dials: Dials, counted: bool = True) -> Timed:
        """Single tokens behind a context.

        Args:
            counted: give the bytes that a token reads.
        """
        facts: dict[str, Any] = {}

        def work() -> float:
            runtime.reset()
            for token in self.ids[0, :CONTEXT]:
                runtime.feed([int(token)], dials, "last")
            start = perf_counter()
            fed = [runtime.feed([int(token)], dials, "last") for token in self.ids[0, CONTEXT:]]
            seconds = perf_counter() - start
            facts["mean_iterations"] = float(np.mean([f.iterations[0] for f in fed]))
            if counted:
                facts["bytes"] = runtime.traffic.of_call(1, facts["mean_iterations"])
            return seconds / len(fed)

        return Timed(work, facts)

    def precisions(self) -> None:
        """Decoding at batch 1, in every precision: full depth and a third of it."""
        section: dict[str, Timed] = {}
        for precision in PRECISIONS:
            runtime = self.runtime(precision)
            section[f"{precision}, all {self.full.max_loops}"] = self.decoding(runtime, self.full)
            section[f"{precision}, {self.third.max_loops} of {self.full.max_loops}"] = self.decoding(
                runtime, self.third
            )
        self.report.add(self.name, "decoding, batch 1", in_turns(section, self.args.rounds), section)

    def exits(self) -> None:
        """Who says that the loop is over, beside computing all iterations and selecting afterwards."""
        loops = self.full.max_loops
        ways = {f"flags, {m} on their way": (m, "flags") for m in (1, 2, 4, 8) if m <= loops}
        ways |= {"the device, by conditions": (1, "cond"), "all, then select": (loops + 1, "flags")}
        section = {}
        for name, (ahead, exits) in ways.items():
            section[name] = self.decoding(self.runtime("fp32", ahead, exits), self.adaptive, counted=False)
        times = in_turns(section, self.args.rounds)
        self.report.add(self.name, "exit, adaptive, fp32", times, section)

    def batches(self) -> None:
        """Texts side by side that stop at different depths."""
        model = self.build().to(self.args.device)
        info, device = model_info(model, self.name, 0), self.args.device
        section = {}
        for name, dials in (("all iterations", self.full), ("adaptive", self.adaptive)):
            batch, facts = TextBatch(model, info, len(self.ids), device), {}  # type: tuple[TextBatch, dict[str, Any]]

            def work(batch: TextBatch = batch, dials: Dials = dials, facts: dict[str, Any] = facts) -> float:
                batch.reset()
                batch.feed(self.ids[:, :CONTEXT], dials)
                count = min(16, self.args.tokens)
                start, depths = perf_counter(), []
                for column in self.ids[:, CONTEXT : CONTEXT + count].T:
                    depths += [fed.depth[0] for fed in batch.feed(column[:, None], dials)]
                facts["mean_depth"] = float(np.mean(depths))
                return (perf_counter() - start) / count

            section[name] = Timed(work, facts)
        self.report.add(self.name, f"batch of {len(self.ids)}, fp32", in_turns(section, self.args.rounds), section)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
