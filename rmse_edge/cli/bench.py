"""rmse-bench: how fast a package or a checkpoint is, at fixed depths and stopping by itself."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ..errors import TextError, UserError
from . import streaming
from .common import Parser, existing_file, existing_path, list_of, non_negative_int, positive_int, verb
from .display import bars, table
from .flags import add_dial_flags, add_runtime_flags, chosen_dials, open_model

if TYPE_CHECKING:
    from ..runtimes import LoopRuntime, Runtime


@verb("rmse-bench")
def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse(argv)
    forms: dict[str, Callable[[dict[str, Any]], str]] = {"md": as_markdown, "json": json.dumps, "csv": as_csv}
    with opened(args) as runtime:
        if args.stream is None:
            document = measure(runtime, args)
        else:
            document, forms = measure_stream(runtime, args), streaming.FORMS
    print(forms[args.output](document))
    return None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="rmse-bench",
        description="Time prefill (pp), decoding (tg) and the loop alone, at fixed depths and adaptive, interleaved.",
    )
    parser.add_argument("model", type=existing_path, nargs="?", help="package (NAME.rmse) or checkpoint folder")
    parser.add_argument(
        "--config", type=existing_file, metavar="FILE", help="config.json of random weights to time instead"
    )
    parser.add_argument(
        "-p", "--prompt", type=non_negative_int, default=512, metavar="N", help="tokens of pp rows; 0: none"
    )
    parser.add_argument(
        "-n", "--generate", type=non_negative_int, default=128, metavar="N", help="tokens of tg rows; 0: none"
    )
    parser.add_argument(
        "-d",
        "--depths",
        type=list_of(positive_int),
        metavar="N,N,...",
        help="fixed depths; full, a half and a third without it",
    )
    parser.add_argument("-r", "--repetitions", type=positive_int, default=5, metavar="N", help="after one warm-up")
    parser.add_argument(
        "--text", type=existing_file, metavar="FILE", help="what is read; the folder's sample.txt without it"
    )
    parser.add_argument(
        "--stream", type=positive_int, metavar="N", help="instead: feed N tokens in a row and report what stays flat"
    )
    add_dial_flags(parser)
    add_runtime_flags(parser)
    parser.add_argument("-o", "--output", choices=("md", "json", "csv"), default="md", help="a table, or for programs")
    args = parser.parse_args(argv)
    if (args.model is None) == (args.config is None):
        raise UserError(
            "give a package or checkpoint folder, or --config FILE for random weights (see rmse-bench --help)"
        )
    for flag in ("prompt", "generate", "depths", "repetitions"):
        if args.stream is not None and getattr(args, flag) != parser.get_default(flag):
            raise UserError(f"--stream: has one row and no repetitions; leave out --{flag}")
    return args


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[LoopRuntime]:
    """The runtime to time. With --config, an export of random weights that is gone afterwards."""
    if args.config is None:
        yield timed(open_model(args))
    elif args.runtime == "torch":
        from ..runtimes.torch import TorchRuntime, set_threads

        set_threads(args.threads)
        yield TorchRuntime(random_model(args.config), args.config.stem, device=args.device)
    else:
        with tempfile.TemporaryDirectory() as folder:
            args.model = Path(folder) / f"{args.config.stem}-random.rmse"
            # In a process of its own, so that the memory reported is that of running, not of exporting. Ctrl-C reaches
            # both: that one ends silently, this one reports it.
            quiet = (signal.SIGINT, signal.SIG_DFL)
            with ProcessPoolExecutor(1, get_context("spawn"), signal.signal, quiet) as pool:
                pool.submit(export_random, args.config, args.model).result()
            yield timed(open_model(args))


def timed(runtime: Runtime) -> LoopRuntime:
    """The same; every runtime here is built on methods that can be timed one by one."""
    from ..runtimes import LoopRuntime

    assert isinstance(runtime, LoopRuntime)
    return runtime


def random_model(config: Path) -> Any:
    import torch

    from ..config import RMSEConfig
    from ..model import RMSE

    torch.manual_seed(0)
    return RMSE(RMSEConfig.from_file(config))


def export_random(config: Path, destination: Path) -> None:
    """Export random weights to `destination`, unchecked: there is nothing to be right about but the time."""
    from ..export.pipeline import ExportRequest, export_package

    export_package(random_model(config), destination, ExportRequest(check=False))


def measure(runtime: LoopRuntime, args: argparse.Namespace) -> dict[str, Any]:
    from ..runtimes.bench import Bench, BenchSettings, exits_disabled
    from ..runtimes.machine import copy_bandwidth, resident_bytes

    notes = []
    dials = chosen_dials(args, runtime.info)
    adaptive = None if args.config or exits_disabled(dials) else dials
    if args.config:
        notes.append("random weights: exits would mean nothing, fixed depths only")
    elif adaptive is None:
        notes.append("the checkpoint's own settings disable every exit rule: no adaptive rows (set --exit-threshold)")
    settings = BenchSettings(args.prompt, args.generate, tuple(args.depths or ()), adaptive, args.repetitions)
    bench = Bench(runtime, read_ids(runtime, settings.tokens_needed, args), settings)
    with tqdm(total=bench.passes, unit=" rows", disable=None, leave=False, file=sys.stderr) as bar:
        bench.run(bar.update)
    resident, peak = resident_bytes()  # before the bandwidth is measured, which needs memory of its own
    threads = args.threads or os.cpu_count() or 1
    return {
        "model": runtime.info.name,
        "runtime": runtime.info.target,
        "parameters": runtime.info.parameters,
        "package_bytes": runtime.info.nbytes or None,
        "state_bytes": runtime.state_bytes(),
        "peak_rss_bytes": peak,
        "rss_bytes": resident,
        "threads": args.threads,
        "memory_gb_per_s": copy_bandwidth(threads) / 1e9,
        "memory_threads": threads,
        "dials": vars(dials),
        **bench.summary(),
        "notes": notes,
    }


def measure_stream(runtime: LoopRuntime, args: argparse.Namespace) -> dict[str, Any]:
    notes = ["random weights: exits and surprise mean nothing"] if args.config else []
    ids = read_ids(runtime, args.stream, args)
    return streaming.measure(runtime, ids, chosen_dials(args, runtime.info), args.stream, args.threads, notes)


def read_ids(runtime: LoopRuntime, count: int, args: argparse.Namespace) -> np.ndarray:
    """The first tokens of the text, or random ones for random weights, (>= count,) int64."""
    from ..text import Tokenizer, read_text

    if args.config:
        return np.random.default_rng(0).integers(0, runtime.info.vocab_size, count)
    text = args.text or args.model / "sample.txt"
    if not text.is_file():
        raise TextError(
            f"{args.model}: holds no sample.txt; give --text FILE, exits on random tokens would mean nothing"
        )
    return np.asarray(Tokenizer(args.model / "tokenizer.json").encode(read_text(text)), np.int64)


def as_markdown(d: dict[str, Any]) -> str:
    """Two tables, then what they mean."""

    def cells(row: dict[str, Any], unit: str, digits: int) -> tuple[str, str, str]:
        speed = row[unit]
        depth = f"{row['max_loops']}" if row["mode"] == "fixed" else f"adaptive, at most {row['max_loops']}"
        return depth, f"{speed['mean']:.{digits}f} ± {speed['sd']:.{digits}f}", f"{speed['median']:.{digits}f}"

    def token_row(row: dict[str, Any]) -> tuple[str, ...]:
        depth, speed, middle = cells(row, "tok_per_s", 1)
        achieved = "" if row["gb_per_s"] is None else f"{row['gb_per_s']:.2f}"
        return row["test"], depth, f"{row['mean_loops']:.2f}", speed, middle, achieved

    head = ("test", "loops", "mean loops", "tokens/s", "median", "GB/s of weights")
    lines = [
        table(head, [token_row(row) for row in d["rows"]]),
        "",
        table(("test", "loops", "ms", "median"), [(row["test"], *cells(row, "ms", 3)) for row in d["loop_rows"]]),
        "",
    ]
    ratio = d["loop_time_ratio"]
    measured = ", ".join(f"{ratio[test]:.2f} ({test})" for test in dict.fromkeys(r["test"] for r in d["loop_rows"]))
    lines.append(f"loop stopped at {ratio['max_loops']} of {ratio['of']}: {measured} of the time of full depth")
    for test, times in d["adaptive_speedup"].items():
        lines.append(f"{test}: adaptive exit is {times:.2f} × as fast as full depth")
    if d["histogram"]:
        lines += [
            f"adaptive exit skips {d['work_skipped']:.1%} of the iterations of full depth:",
            *bars(d["histogram"]),
        ]
    lines += [
        f"memory bandwidth {d['memory_gb_per_s']:.1f} GB/s (copying, threads: {d['memory_threads']}); "
        "looped weights may come faster, from the cache",
        f"memory: {mebibytes(d['peak_rss_bytes'])} at most, {mebibytes(d['rss_bytes'])} now; "
        f"artifact {mebibytes(d['package_bytes'])}, state {d['state_bytes']:,} bytes",
        f"{d['model']} on {d['runtime']}, {d['parameters']:,} parameters, {d['repetitions']} repetitions",
        *(f"note: {note}" for note in d["notes"]),
    ]
    return "\n".join(lines)


def mebibytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:.1f} MiB"


def as_csv(d: dict[str, Any]) -> str:
    """All rows of both tables; the unit is tok/s or ms."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("test", "mode", "max_loops", "mean_loops", "unit", "mean", "sd", "median"))
    for row in (*d["rows"], *d["loop_rows"]):
        unit, speed = ("tok/s", row["tok_per_s"]) if "tok_per_s" in row else ("ms", row["ms"])
        known = [row["test"], row["mode"], row["max_loops"], row.get("mean_loops", row["max_loops"])]
        writer.writerow([*known, unit, *(speed[name] for name in ("mean", "sd", "median"))])
    return out.getvalue().rstrip("\n")


if __name__ == "__main__":
    sys.exit(main())
