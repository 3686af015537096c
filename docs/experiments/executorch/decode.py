"""The native runner against ONNX Runtime from Python on the same int4 model: decoding and prefill, in turns.

    make runner
    python docs/experiments/executorch/decode.py --runner build/native/rmse-runner [--config docs/benchmarks/d768.json]

Both packages are made of the same random weights. Every round times one after the other, one thread each, at full depth and
at a third of it; the table has medians over the rounds. Then the runner's memory, and that of the same model with 16 experts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
from tqdm import tqdm

from rmse_edge.cli.bench import export_random
from rmse_edge.package import Package
from rmse_edge.runtimes.engines.onnx import OnnxRuntime
from rmse_edge.runtimes.measure.bench import Bench, BenchSettings

PROMPT, GENERATE = 128, 32
MIB = 2**20
Row = tuple[str, int]  # test, loops


@dataclass
class Side:
    """Tokens per second of every row, round by round."""

    speeds: dict[Row, list[float]] = field(default_factory=dict)

    def add(self, row: Row, speed: float) -> None:
        self.speeds.setdefault(row, []).append(speed)


def make(config: Path, folder: Path, quant: str, target: str) -> Path:
    """A package of random weights, exported in a process of its own: exporting leaves a large heap behind."""
    path = folder / f"{config.stem}-{target}.rmse"
    process = get_context("spawn").Process(target=export_random, args=(config, path, quant, target))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"export of {config} to {target} failed")
    return path


def python_round(bench: Bench, side: Side) -> None:
    for row in bench.rows:
        side.add((row.test, row.dials.max_loops), row.work(row))


def native_round(runner: Path, package: Path, depths: list[int], side: Side | None = None) -> dict:
    command = [
        str(runner),
        str(package),
        "--bench",
        "-p",
        str(PROMPT),
        "-n",
        str(GENERATE),
        "-r",
        "1",
        "-t",
        "1",
        "-o",
        "json",
    ]
    done = subprocess.run([*command, "-d", ",".join(map(str, depths))], capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    for row in document["rows"]:
        if side is not None:
            side.add((row["test"], row["max_loops"]), row["tok_per_s"]["median"])
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runner", type=Path, default=Path("build/native/rmse-runner"))
    parser.add_argument("--config", type=Path, default=Path("docs/benchmarks/d768.json"))
    parser.add_argument("--hollow", type=Path, default=Path("docs/benchmarks/d768-hollow.json"))
    parser.add_argument("--quant", default="int4")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx, native, hollow = (
            make(config, folder, args.quant, target)
            for config, target in ((args.config, "onnx"), (args.config, "executorch"), (args.hollow, "executorch"))
        )
        runtime = OnnxRuntime(Package.open(onnx), threads=1)
        full = runtime.info.max_loops
        depths = [full, max(1, full // 3)]
        ids = np.random.default_rng(0).integers(0, runtime.info.vocab_size, PROMPT + GENERATE)
        bench = Bench(runtime, ids, BenchSettings(PROMPT, GENERATE, tuple(depths), repetitions=1))
        ours, theirs = Side(), Side()
        python_round(bench, Side())
        for _ in tqdm(range(args.rounds), unit=" rounds", disable=None, leave=False):
            python_round(bench, theirs)
            document = native_round(args.runner, native, depths, ours)
        print(
            "| test | loops | ONNX Runtime from Python, tokens/s | rmse-runner, tokens/s | ratio |\n|---|---|---|---|---|"
        )
        for row, speeds in theirs.speeds.items():
            a, b = median(speeds), median(ours.speeds[row])
            print(f"| {row[0]} | {row[1]} | {a:.1f} | {b:.1f} | {b / a:.2f} |")
        small = native_round(args.runner, hollow, depths)
        sizes = [Package.open(p).nbytes for p in (native, hollow)]
        peaks = [d["peak_rss_bytes"] for d in (document, small)]
        grown = (peaks[0] - peaks[1]) / (sizes[0] - sizes[1])
        print(
            f"\nloop stopped at {depths[1]} of {full}: {document['loop_time_ratio']['loop1']:.2f} of the time (1 row)"
        )
        print(f"memory at most: {peaks[0] / MIB:.1f} MiB for a package of {sizes[0] / MIB:.1f} MiB; with {args.hollow.stem} "
              f"{peaks[1] / MIB:.1f} MiB for {sizes[1] / MIB:.1f} MiB: {grown:.2f} x the file; engine alone "
              f"{document['baseline_rss_bytes'] / MIB:.1f} MiB")  # fmt: skip


if __name__ == "__main__":
    main()
