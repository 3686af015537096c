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
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from rmse_edge.errors import TextError, UserError

from . import profiling, streaming
from .boards import bench_boards, refuse_flags_of_texts
from .common import (
    Parser,
    existing_file,
    existing_model,
    list_of,
    model_folder,
    non_negative_int,
    one_of,
    positive_int,
    random_model,
    verb,
)
from .display import bars, offload_lines, plain, table
from .flags import (
    add_dial_flags,
    add_runtime_flags,
    add_speculation_flags,
    chosen_dials,
    chosen_speculation,
    open_model,
    rates_line,
)

if TYPE_CHECKING:
    from rmse_edge.runtimes import LoopRuntime
    from rmse_edge.runtimes.measure.bench import Bench


QUANTIZATIONS = ("fp32", "fp16", "int8", "int4")
CHARACTERS = 32  # of a token, at most on average


@verb("rmse-bench")
def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse(argv)
    if args.boards:
        return bench_boards(args)
    forms: dict[str, Callable[[dict[str, Any]], str]] = {"md": as_markdown, "json": json.dumps, "csv": as_csv}
    with opened(args) as (runtimes, baseline):
        if args.profile:
            document, forms = measure_profile(runtimes[0], args), profiling.FORMS
        elif args.stream is not None:
            document, forms = measure_stream(runtimes[0], args), streaming.FORMS
        else:
            document = measure(runtimes, baseline, args)
    print(forms[args.output](document))
    return None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="rmse-bench",
        description="Time prefill (pp), decoding (tg) and the loop alone, at fixed depths and adaptive, interleaved.",
    )
    parser.arguments["tokens"] = "--stream"
    parser.add_argument(
        "model", type=existing_model, nargs="*",
        help="package (NAME.rmse or NAME.rmse.zip) or checkpoint folder; several are timed side by side and compared with the first",
    )  # fmt: skip
    parser.add_argument(
        "--config", type=existing_file, metavar="FILE", help="config.json of random weights to time instead"
    )
    parser.add_argument(
        "--quant", type=list_of(one_of(*QUANTIZATIONS)), default=["fp32"], metavar="Q,Q,...",
        help=f"of --config's weights: {', '.join(QUANTIZATIONS)}; several are timed side by side",
    )  # fmt: skip
    parser.add_argument(
        "-p",
        "--prompt",
        type=non_negative_int,
        metavar="N",
        help="tokens of a prompt, pp in the table; 0: none (default: 512, or what the model has room for)",
    )
    parser.add_argument(
        "-n",
        "--generate",
        type=non_negative_int,
        metavar="N",
        help="tokens to generate, tg in the table; 0: none (default: 128, or what the model has room for)",
    )
    parser.add_argument(
        "-d",
        "--depths",
        type=list_of(positive_int),
        metavar="N,N,...",
        help="fixed depths (default: full, a half and a third)",
    )
    parser.add_argument(
        "-r", "--repetitions", type=positive_int, default=5, metavar="N", help="timed, after one warm-up"
    )
    parser.add_argument(
        "--text", type=existing_file, metavar="FILE", help="text to read (default: the folder's sample.txt)"
    )
    parser.add_argument(
        "--ids", type=existing_file, metavar="FILE",
        help="token ids instead of a text: an array of NumPy's (.npy), or numbers in a text file",
    )  # fmt: skip
    parser.add_argument(
        "--boards", type=existing_file, metavar="FILE.csv",
        help="instead, of models of boards: boards per second at full and adaptive depth, one and 32 at a time",
    )  # fmt: skip
    parser.add_argument(
        "--stream", type=positive_int, metavar="N", help="instead: feed N tokens in a row and report what stays flat"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="instead: the time of every operator of an ExecuTorch package, or of a checkpoint on the cuda runtime",
    )
    add_dial_flags(parser)
    add_speculation_flags(parser)
    add_runtime_flags(parser)
    parser.add_argument("-o", "--output", choices=("md", "json", "csv"), default="md", help="a table, or for programs")
    args = parser.parse_args(argv)
    if not args.ids:
        parser.arguments["ids"] = "--text"  # which they are made of
    if bool(args.model) == bool(args.config):
        raise UserError(
            "give a package or checkpoint folder, or --config FILE for random weights (see rmse-bench --help)"
        )
    if args.ids and (args.text or args.config):
        raise UserError(
            f"--ids: what is read is given by {'--text' if args.text else '--config'}; leave one of them out"
        )
    if args.boards and (args.config or args.ids or args.text or args.profile or args.stream or args.output == "csv"):
        raise UserError(
            "--boards: takes packages or checkpoint folders, and gives md or json; leave the other flags out"
        )
    if args.boards:
        refuse_flags_of_texts(args, parser, ("prompt", "generate", "speculate", "draft_tokens"), "--boards")
    if args.quant != ["fp32"] and (args.model or args.runtime in ("torch", "cuda")):
        raise UserError("--quant: a package has its own; it is for --config FILE on packages of random weights")
    instead = "--profile" if args.profile else "--stream" if args.stream is not None else None
    if args.profile and args.stream is not None:
        raise UserError("--profile and --stream: give one of them")
    if args.profile and args.config:
        raise UserError("--profile: takes a package, not --config")
    if instead and len(args.model or args.quant) > 1:
        raise UserError(f"{instead}: takes one model")
    for flag in ("prompt", "generate", "depths", "repetitions", "speculate", "draft_tokens"):
        if instead and getattr(args, flag) != parser.get_default(flag):
            raise UserError(f"{instead}: has rows of its own and no repetitions; leave out --{flag.replace('_', '-')}")
    args.model = [model_folder(path) for path in args.model]
    return args


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[tuple[list[LoopRuntime], int | None]]:
    """The runtimes to time, and the resident memory before the first was opened. With --config, exports of random weights
    that are gone afterwards."""
    if args.config is None:
        baseline = baseline_memory(args.model[0])
        yield [open_one(path, args) for path in args.model], baseline
    elif args.runtime == "torch":
        from rmse_edge.runtimes.engines.torch import TorchRuntime, set_threads

        set_threads(args.threads)
        model = random_model(args.config)
        yield [TorchRuntime(model, args.config.stem, device=args.device or "cpu")], None
    elif args.runtime == "cuda":
        from rmse_edge.runtimes.engines.cuda import CudaRuntime
        from rmse_edge.runtimes.engines.torch import set_threads

        set_threads(args.threads)
        device, dtype = args.device or "cuda", args.dtype or "fp32"
        yield [CudaRuntime(random_model(args.config), args.config.stem, device=device, dtype=dtype)], None
    else:
        from rmse_edge.runtimes import RUNTIMES

        if args.runtime not in (None, *RUNTIMES):
            raise UserError(f"--runtime: got {args.runtime!r}, expected one of {', '.join(RUNTIMES)}")
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{args.config.stem}-random-{quant}.rmse" for quant in args.quant]
            # In a process of its own, so that the memory reported is that of running, not of exporting. Ctrl-C reaches
            # both: that one ends silently, this one reports it.
            quiet = (signal.SIGINT, signal.SIG_DFL)
            with ProcessPoolExecutor(1, get_context("spawn"), signal.signal, quiet) as pool:
                for path, quant in zip(paths, args.quant):
                    pool.submit(export_random, args.config, path, quant, args.runtime or "onnx").result()
            baseline = baseline_memory(paths[0])
            yield [open_one(path, args) for path in paths], baseline


def open_one(path: Path, args: argparse.Namespace) -> LoopRuntime:
    """The runtime of one folder; every runtime here is built on methods that can be timed one by one."""
    from rmse_edge.runtimes import LoopRuntime

    runtime = open_model(args, path)
    assert isinstance(runtime, LoopRuntime)
    return runtime


def baseline_memory(path: Path) -> int | None:
    """Resident bytes with the engine started and no model; None for PyTorch, whose checkpoints are no packages."""
    from rmse_edge.package import MANIFEST, Package
    from rmse_edge.runtimes import start_engine
    from rmse_edge.runtimes.measure.machine import resident_bytes

    if not (path / MANIFEST).is_file():
        return None
    import tokenizers  # noqa: F401  (reading the text is not the model's doing)

    start_engine(Package.open(path).target)
    return resident_bytes()[0]


def export_random(config: Path, destination: Path, quant: str, target: str) -> None:
    """Export random weights to `destination`, unchecked: there is nothing to be right about but the time."""
    from rmse_edge.export.pipeline import ExportRequest, export_package
    from rmse_edge.quantize import QuantizeRequest, Scheme, quantize

    model, quantized = random_model(config).eval(), None
    if quant in ("int8", "int4"):
        quantized = quantize(model, QuantizeRequest(Scheme(quant), method="rtn"))
        model = quantized.model
    export_package(model, destination, ExportRequest(target, quant, check=False), quantized=quantized)


def measure(runtimes: list[LoopRuntime], baseline: int | None, args: argparse.Namespace) -> dict[str, Any]:
    """One document; of several models {"models": their documents, "speedups": of each of the others over the first}."""
    from rmse_edge.runtimes.measure.bench import ratios, run_together
    from rmse_edge.runtimes.measure.machine import copy_bandwidth, device_bandwidth, resident_bytes

    ids = None
    room = min((n for n in (runtime.info.longest for runtime in runtimes) if n is not None), default=None)
    prepared = []
    for runtime in runtimes:
        bench, notes, dials, ids = prepare(runtime, ids, room, args)
        prepared.append((runtime, bench, notes, dials))
    benches = [bench for _, bench, _, _ in prepared]
    with tqdm(total=sum(b.passes for b in benches), unit=" rows", disable=None, leave=False, file=sys.stderr) as bar:
        run_together(benches, bar.update)
    resident, peak = resident_bytes()  # before the bandwidth is measured, which needs memory of its own
    if len(runtimes) > 1:
        resident = peak = baseline = None  # of all of them together: it says nothing about one
    threads: int | None = args.threads or os.cpu_count() or 1
    if any(on_gpu(runtime) for runtime in runtimes):
        threads, bandwidth = None, device_bandwidth() / 1e9
    else:
        bandwidth = copy_bandwidth(threads or 1) / 1e9
    documents = [
        {
            "model": runtime.info.name,
            "runtime": runtime.info.target,
            "quant": runtime.info.quant,
            "parameters": runtime.info.parameters,
            "package_bytes": runtime.info.nbytes or None,
            "state_bytes": runtime.state_bytes(),
            "peak_rss_bytes": peak,
            "rss_bytes": resident,
            "baseline_rss_bytes": baseline,
            "threads": args.threads,
            "memory_gb_per_s": bandwidth,
            "memory_threads": threads,
            "dials": vars(dials),
            **bench.summary(),
            "notes": notes,
        }
        for runtime, bench, notes, dials in prepared
    ]
    for row in (row for d in documents if d["runtime"] == "cuda" for row in d["rows"]):
        row["roofline"] = None if row["gb_per_s"] is None else row["gb_per_s"] / bandwidth
    if len(documents) == 1:
        return documents[0]
    speedups = [{"model": d["model"], "rows": ratios(documents[0], d)} for d in documents[1:]]
    return {"models": documents, "speedups": speedups}


def on_gpu(runtime: LoopRuntime) -> bool:
    device = getattr(runtime, "device", None)
    return device is not None and device.type == "cuda"


def prepare(
    runtime: LoopRuntime, ids: np.ndarray | None, room: int | None, args: argparse.Namespace
) -> tuple[Bench, list[str], Any, Any]:
    """The bench of one runtime, what is to be noted about it, its dials, and the text that all of them read.

    Args:
        room: tokens of the longest text that all runtimes take; None: any number.
    """
    from rmse_edge.runtimes.measure.bench import Bench, BenchSettings

    notes = []
    dials = chosen_dials(args, runtime.info)
    adaptive = dials if dials.exits and not args.config else None
    if args.config:
        notes.append("random weights: exits would mean nothing, fixed depths only")
    elif adaptive is None:
        notes.append("the checkpoint's own settings disable every exit rule: no adaptive rows (set --exit-threshold)")
    given = {n: getattr(args, n) for n in ("prompt", "generate") if getattr(args, n) is not None}
    asked = BenchSettings(
        depths=tuple(args.depths or ()),
        adaptive=adaptive,
        repetitions=args.repetitions,
        speculation=chosen_speculation(args),
        **given,
    )
    settings = replace(asked.fitting(room), **given)  # what was asked for is never another number
    if settings != asked:
        notes.append(
            f"a text has room for {room} tokens: pp{settings.prompt} instead of pp{asked.prompt}, tg{settings.generate} "
            f"behind {settings.context} tokens instead of tg{asked.generate} behind {asked.context}"
        )
    if ids is None:
        ids = text_ids(runtime, settings.tokens_needed(runtime.info), args)
    if ids.max() >= runtime.info.vocab_size:
        raise UserError(f"{runtime.info.name}: has another vocabulary than the first model; time them one by one")
    return Bench(runtime, ids, settings), notes, dials, ids


def measure_stream(runtime: LoopRuntime, args: argparse.Namespace) -> dict[str, Any]:
    notes = ["random weights: exits and surprise mean nothing"] if args.config else []
    ids = text_ids(runtime, args.stream, args)
    return streaming.measure(runtime, ids, chosen_dials(args, runtime.info), args.stream, args.threads, notes)


def measure_profile(runtime: LoopRuntime, args: argparse.Namespace) -> dict[str, Any]:
    profiling.check(runtime)  # before anything is read
    from rmse_edge.runtimes.measure.profile import PREFILL

    ids = text_ids(runtime, PREFILL, args)[:PREFILL]
    return profiling.measure(runtime, ids, chosen_dials(args, runtime.info), args.threads)


def text_ids(runtime: LoopRuntime, count: int, args: argparse.Namespace) -> np.ndarray:
    """The first tokens of the text, or random ones for random weights, (>= count,) int64."""
    from rmse_edge.text import Tokenizer, read_ids, read_text

    if args.config:
        return np.random.default_rng(0).integers(0, runtime.info.vocab_size, count)
    if args.ids:
        return read_ids(args.ids, runtime.info.vocab_size)
    folder = args.model[0]
    text = args.text or folder / "sample.txt"
    if not text.is_file():
        raise TextError(
            f"{folder}: holds no sample.txt; give --text FILE or --ids FILE, exits on random tokens would mean nothing"
        )
    tokenizer = Tokenizer(folder / "tokenizer.json").fitting(runtime.info.vocab_size)
    content = read_text(text)
    # A long text takes hundreds of megabytes to tokenise, which would count as memory of the model.
    ids = np.asarray(tokenizer.encode(content[: CHARACTERS * count]), np.int64)
    return ids if len(ids) >= count else np.asarray(tokenizer.encode(content), np.int64)


def as_markdown(d: dict[str, Any]) -> str:
    """Two tables, then what they mean; of several models one after the other, then how they compare."""
    if "models" in d:
        parts = [as_markdown(document) for document in d["models"]]
        return "\n\n".join([*parts, comparison(d)])

    def cells(row: dict[str, Any], unit: str, digits: int) -> tuple[str, str, str]:
        speed = row[unit]
        depth = f"{row['max_loops']}" if row["mode"] == "fixed" else f"adaptive, at most {row['max_loops']}"
        return depth, f"{speed['mean']:.{digits}f} ± {speed['sd']:.{digits}f}", f"{speed['median']:.{digits}f}"

    def token_row(row: dict[str, Any]) -> tuple[str, ...]:
        depth, speed, middle = cells(row, "tok_per_s", 1)
        achieved = "" if row["gb_per_s"] is None else f"{row['gb_per_s']:.2f}"
        found = row["test"], depth, f"{row['mean_loops']:.2f}", speed, middle, achieved
        if not counted:
            return found
        return *found, "" if row["roofline"] is None else f"{row['roofline']:.1%}"

    counted = d["runtime"] == "cuda"
    head: tuple[str, ...] = ("test", "loops", "mean loops", "tokens/s", "median")
    head += ("GB/s read", "of bandwidth") if counted else ("GB/s of weights",)
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
    for row in d["rows"]:
        if "speculation" in row:
            lines.append(
                f"{row['test']}, {row['mode']}: {row['speculation']['tokens_per_round']:.2f} tokens per verification, "
                f"{d['speculative_speedup'][row['mode']]:.2f} × as fast as plain decoding of the same text"
            )
            if "tokens_per_ms" in row["speculation"]:
                lines.append(rates_line(row["speculation"]))
    if d["histogram"]:
        lines += [
            f"adaptive exit skips {d['work_skipped']:.1%} of the iterations of full depth:",
            *bars(d["histogram"]),
        ]
    lines += [
        f"memory bandwidth {d['memory_gb_per_s']:.1f} GB/s (copying, {copied_by(d['memory_threads'])}); "
        "looped weights may come faster, from the cache",
        *memory_lines(d),
        *(line for row in d["rows"] if "expert_ram" in row for line in of_budget(row)),
        f"{d['model']} on {d['runtime']}, {d['quant']}, {d['parameters']:,} parameters, {d['repetitions']} repetitions",
        *(f"note: {note}" for note in d["notes"]),
    ]
    return plain("\n".join(lines))


def of_budget(row: dict[str, Any]) -> list[str]:
    """What --expert-ram did in a row of the table."""
    return ["", f"{row['test']}, {row['mode']}, at most {row['max_loops']} loops", *offload_lines(row["expert_ram"])]


def memory_lines(d: dict[str, Any]) -> list[str]:
    resident, baseline, package = d["rss_bytes"], d["baseline_rss_bytes"], d["package_bytes"]
    sizes = f"artifact {mebibytes(package)}, state {d['state_bytes']:,} bytes"
    if resident is None and d["peak_rss_bytes"] is None:
        return [f"memory: {sizes}"]
    lines = [f"memory: {mebibytes(d['peak_rss_bytes'])} at most, {mebibytes(resident)} now; {sizes}"]
    if resident and baseline and package:
        lines.append(
            f"without a model the engine takes {mebibytes(baseline)}: this one adds {mebibytes(resident - baseline)}, "
            f"{(resident - baseline) / package:.2f} × the artifact"
        )
    return lines


def comparison(d: dict[str, Any]) -> str:
    """How many times as fast every other model is as the first, row by row."""
    first, *others = d["models"]
    names = [f"{m['model']} ({m['quant']})" for m in others]
    rows: dict[tuple[str, str], list[str]] = {}
    for i, side in enumerate(d["speedups"]):
        for r in side["rows"]:
            depth = str(r["max_loops"]) if r["mode"] == "fixed" else f"adaptive, at most {r['max_loops']}"
            rows.setdefault((r["test"], depth), [""] * len(names))[i] = f"{r['speedup']:.2f} ×"
    lines = [f"As fast as {first['model']} ({first['quant']}), by medians, all in turns:"]
    if first["package_bytes"]:
        sizes = (
            f"{n} {m['package_bytes'] / first['package_bytes']:.3f} ×"
            for n, m in zip(names, others)
            if m["package_bytes"]
        )
        lines.append(f"artifact of {first['package_bytes']:,} bytes; {', '.join(sizes)}")
    lines = [*lines, "", table(("test", "loops", *names), [(*key, *cells) for key, cells in rows.items()])]
    return plain("\n".join(lines))


def copied_by(threads: int | None) -> str:
    return "on the GPU" if threads is None else f"threads: {threads}"


def mebibytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:.1f} MiB"


def as_csv(d: dict[str, Any]) -> str:
    """All rows of both tables; the unit is tok/s or ms. Of several models, the model is the first column."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    several = "models" in d
    head = ("test", "mode", "max_loops", "mean_loops", "unit", "mean", "sd", "median")
    writer.writerow(("model", *head) if several else head)
    for document in d["models"] if several else [d]:
        for row in (*document["rows"], *document["loop_rows"]):
            unit, speed = ("tok/s", row["tok_per_s"]) if "tok_per_s" in row else ("ms", row["ms"])
            known = [row["test"], row["mode"], row["max_loops"], row.get("mean_loops", row["max_loops"])]
            cells = [*known, unit, *(speed[name] for name in ("mean", "sd", "median"))]
            writer.writerow([document["model"], *cells] if several else cells)
    return out.getvalue().rstrip("\n")


if __name__ == "__main__":
    sys.exit(main())
