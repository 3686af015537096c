"""rmse-eval: loss, perplexity and loops of a model on a text; with --sweep, what stopping early by one of its rules costs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from rmse_edge.errors import TextError, UserError
from rmse_edge.loop.dials import DIALS

from .boards import evaluate_boards, refuse_flags_of_texts
from .common import (
    Parser,
    existing_file,
    existing_model,
    finite_float,
    model_folder,
    non_negative_float,
    non_negative_int,
    output_path,
    positive_int,
    verb,
)
from .display import bars, table
from .flags import add_dial_flags, add_runtime_flags, chosen_dials, leave_memory_blank, open_model

if TYPE_CHECKING:
    from rmse_edge.runtimes import Dials, ModelInfo, Runtime

POINTS = 10  # of a sweep


@verb("rmse-eval")
def main(argv: Sequence[str] | None = None) -> int | None:
    args = parse(argv)
    if args.boards:
        return evaluate_boards(args)
    runtime = open_model(args)
    dials = chosen_dials(args, runtime.info)
    if args.no_memory:
        leave_memory_blank(runtime)
    ids = tokens_of(args, runtime.info.vocab_size)
    document = {
        "model": runtime.info.name,
        "runtime": runtime.info.target,
        "text": str(args.ids or args.text),
        "split": args.split,
        "block": args.block,
        "dials": vars(dials),
        "memory": bool(runtime.info.memory) and not args.no_memory,
        "state_bytes": runtime.state_bytes(),
    }
    if args.sweep:
        document |= run_sweep(runtime, ids, dials, args)
    else:
        document |= run_once(runtime, ids, dials, args)
    if args.output == "json":
        print(json.dumps(document))
    else:
        print(sweep_report(document) if args.sweep else report(document))
    return None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="rmse-eval",
        description="Measure loss, perplexity and loops per token on a text; with --sweep, over thresholds and depths.",
    )
    parser.arguments["path"] = "--plot"
    parser.add_argument("model", type=existing_model, help="package (NAME.rmse or NAME.rmse.zip) or checkpoint folder")
    given = parser.add_mutually_exclusive_group()
    given.add_argument(
        "--text", type=existing_file, metavar="FILE", help="UTF-8 text (default: the folder's sample.txt)"
    )
    given.add_argument(
        "--ids", type=existing_file, metavar="FILE",
        help="token ids instead of a text: an array of NumPy's (.npy), or numbers in a text file",
    )  # fmt: skip
    given.add_argument(
        "--boards", type=existing_file, metavar="FILE.csv",
        help="boards and their answers instead of a text, as Sudoku-Extreme and Maze-Hard are published",
    )  # fmt: skip
    parser.add_argument(
        "--split", choices=("train", "validation", "all"), default="all", help="first 90 %%, last 10 %%, all"
    )
    parser.add_argument(
        "--max-tokens", type=positive_int, metavar="N", help="score only the first N tokens of the split, or boards"
    )
    parser.add_argument(
        "--block", type=non_negative_int, default=0, metavar="N",
        help="forget everything every N tokens, as in training; 0: one stream through the model's window",
    )  # fmt: skip
    parser.add_argument("--no-memory", action="store_true", help="leave the neural memory blank")
    add_dial_flags(parser)
    add_runtime_flags(parser)
    group = parser.add_argument_group("sweep")
    group.add_argument(
        "--sweep", action="store_true", help="measure values of an exit rule's dial beside fixed depths, propose one"
    )
    group.add_argument(
        "--rule", type=rule_and_values, metavar="DIAL[=V,V,...]",
        help="the dial, such as exit-kl, and its values (default: the model's first rule, values where the depth changes)",
    )  # fmt: skip
    group.add_argument(
        "--points", type=positive_int, metavar="N", help="values on the frontier, at least 2 (default: 10)"
    )
    group.add_argument(
        "--budget", type=non_negative_float, default=1.0, metavar="PERCENT",
        help="loss over full depth that the proposed value may cost",
    )  # fmt: skip
    group.add_argument(
        "--store", action="store_true",
        help="make the proposed value the default of the package or checkpoint, with what it was measured on",
    )  # fmt: skip
    group.add_argument("--plot", type=output_path, metavar="FILE.png", help="draw the frontier (needs matplotlib)")
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md", help="for people, or one JSON document")
    args = parser.parse_args(argv)
    if args.plot:
        if not args.sweep:
            raise UserError("--plot draws what --sweep measures; add --sweep")
        from rmse_edge.runtimes.measure.sweep import check_plot

        check_plot(args.plot)
    if args.rule and not args.sweep:
        raise UserError("--rule says what --sweep varies; add --sweep")
    if args.store and not args.sweep:
        raise UserError("--store keeps what --sweep proposes; add --sweep")
    if args.boards:
        refuse_flags_of_texts(
            args, parser, ("store", "plot", "block", "no_memory", "split", "points", "budget"), "--boards"
        )
    if args.store and args.ids:
        raise UserError("--store: needs a text, whose digest is kept; give --text instead of --ids")
    if args.store and args.max_loops:
        raise UserError("--store: keeps exit rules, at the trained depth; leave --max-loops out")
    if args.points and args.rule and args.rule[1]:
        raise UserError("--points: --rule says which values are measured; leave one of them out")
    if args.store and args.model.is_file():
        raise UserError(f"--store: {args.model} is an archive, in which nothing is changed; give the package's folder")
    args.points = args.points or POINTS
    args.model = model_folder(args.model)
    args.text = args.text or args.model / "sample.txt"
    return args


def rule_and_values(text: str) -> tuple[str, tuple[float, ...]]:
    """A rule's dial and the values given for it, if any: "exit-kl=0.1,0.3" -> ("exit_kl", (0.1, 0.3))."""
    given, equals, listed = text.partition("=")
    name = given.removeprefix("--").replace("-", "_")
    dial = DIALS.get(name)
    if dial is None or dial.off is None:
        known = ", ".join(name.replace("_", "-") for name, dial in DIALS.items() if dial.off is not None)
        raise argparse.ArgumentTypeError(f"got {given!r}, expected one of {known}")
    if not equals:
        return name, ()
    values = [finite_float(part) for part in listed.split(",")]
    for value in values:
        if not dial.allows(value):
            raise argparse.ArgumentTypeError(f"got {value:g}, expected {dial.expected}")
    return name, tuple(int(value) if dial.dtype == "int64" else value for value in values)


def swept(args: argparse.Namespace, info: ModelInfo) -> tuple[str, tuple[float, ...]]:
    """The dial that is varied, and its values where they were given.

    Raises:
        UserError: the model was built without that rule, or without any.
    """
    rules = [name for name in info.rules if DIALS[name].off is not None]
    if not rules:
        raise UserError(f"--sweep: {info.name} has no exit rule")
    name, values = args.rule or (rules[0], ())
    if name not in rules:
        known = ", ".join(rule.replace("_", "-") for rule in rules)
        raise UserError(f"--rule {name.replace('_', '-')}: {info.name} has no such rule; it has {known}")
    return name, values


def tokens_of(args: argparse.Namespace, vocab_size: int) -> np.ndarray:
    """The tokens to score and the one before them, (n + 1,) int64."""
    from rmse_edge.text import Tokenizer, read_ids, read_text, split

    if args.ids:
        tokens = read_ids(args.ids, vocab_size)
    elif not args.text.is_file():
        raise TextError(f"{args.model}: holds no sample.txt; give --text FILE")
    else:
        tokens = np.asarray(Tokenizer(args.model / "tokenizer.json").encode(read_text(args.text)), np.int64)
    ids = split(tokens, args.split)
    return ids if args.max_tokens is None else ids[: args.max_tokens + 1]


def run_once(runtime: Runtime, ids: np.ndarray, dials: Dials, args: argparse.Namespace) -> dict[str, Any]:
    from rmse_edge.runtimes.measure.evaluate import evaluate

    with progress(targets(ids, args.block)) as bar:
        return evaluate(runtime, ids, dials, args.block, bar.update).summary()


def run_sweep(runtime: Runtime, ids: np.ndarray, dials: Dials, args: argparse.Namespace) -> dict[str, Any]:
    from rmse_edge.runtimes.measure.evaluate import Evaluation, evaluate
    from rmse_edge.runtimes.measure.sweep import draw, label, passes, sweep

    depth, (rule, values) = runtime.info.trained_loops, swept(args, runtime.info)
    count = passes(depth, args.points, rule=rule, values=values)
    with progress(targets(ids, args.block) * count) as bar:

        def measure(setting: Dials) -> Evaluation:
            value = getattr(setting, rule)
            added = f", {label(rule)} {value:.3g}" if DIALS[rule].enables(value) else ""
            bar.set_description(f"loops <= {setting.max_loops}{added}")
            return evaluate(runtime, ids, setting, args.block, bar.update)

        result = sweep(measure, depth, dials, args.budget, args.points, rule=rule, values=values)
    if args.plot:
        draw(
            result, args.plot, f"{runtime.info.name}: {(args.ids or args.text).name}, {targets(ids, args.block)} tokens"
        )
    document = {"tokens": targets(ids, args.block)} | result.summary()
    if args.store:
        document["stored"] = keep(runtime.info, dials, document, args)
    return document


def keep(info: ModelInfo, dials: Dials, found: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Make what a sweep proposes the model's default.

    Raises:
        UserError: it proposes nothing, or the model's folder cannot be written.
    """
    from rmse_edge.exits import Measured, settings_of, store
    from rmse_edge.files import digest_file

    chosen, rule = found["proposal"], found["rule"]
    if chosen is None:
        raise UserError(f"--store: nothing stays within {found['budget_percent']:g} % over full depth; raise --budget")
    dials = replace(dials, **{rule: chosen[rule]})
    measured = Measured(
        settings_of(dials, dict.fromkeys(name for name in info.rules if name != "max_loops")),
        rule, digest_file(args.text), args.split, found["tokens"], info.target, chosen["loss"],
        chosen["over_full_percent"], found["budget_percent"], chosen["mean_loops"], info.trained_loops,
    )  # fmt: skip
    store(args.model, measured, dials)
    return vars(measured)


def targets(ids: np.ndarray, block: int) -> int:
    """Tokens that will be scored."""
    return (len(ids) - 1) // block * block if block else len(ids) - 1


def progress(total: int) -> tqdm:
    """A bar on stderr, for people only: none where stderr is no terminal."""
    return tqdm(total=total, unit=" tokens", disable=None, leave=False, file=sys.stderr)


def report(d: dict[str, Any]) -> str:
    def with_error(name: str, digits: int) -> str:
        error = d[f"{name}_se"]
        return f"{d[name]:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")

    return "\n".join(
        [
            table(
                ("model", "runtime", "tokens", "loss", "perplexity", "mean loops", "sd", "saved", "tokens/s"),
                [(
                    d["model"], d["runtime"], f"{d['tokens']:,}", with_error("loss", 4), with_error("perplexity", 3),
                    f"{d['mean_loops']:.2f}", f"{d['depth_sd']:.2f}", f"{d['iterations_saved']:.1%}",
                    f"{d['tokens_per_s']:.0f}",
                )],
            ),
            f"per call the deepest position decides: {d['mean_iterations']:.2f} iterations; "
            f"kept between calls: {d['state_bytes']:,} bytes",
            *bars(d["histogram"]),
        ]
    )  # fmt: skip


def sweep_report(d: dict[str, Any]) -> str:
    from rmse_edge.runtimes.measure.sweep import label

    rule = d["rule"]
    head = ("setting", "mean loops", "sd", "loss", "over full", "saved", "fixed depth of that mean")
    rows = [
        (
            f"depth {p['max_loops']}" if p["mode"] == "fixed" else f"{label(rule)} {p[rule]:.4g}",
            f"{p['mean_loops']:.2f}", f"{p['depth_sd']:.2f}", f"{p['loss']:.4f}", f"{p['over_full_percent']:+.2f} %",
            f"{p['iterations_saved']:.1%}", "" if p["mode"] == "fixed" else f"{p['fixed_loss_at_mean']:.4f}",
        )
        for p in (*d["fixed"], *d["adaptive"])
    ]  # fmt: skip
    chosen, budget = d["proposal"], f"{d['budget_percent']:g} % over full depth"
    if chosen is None:
        last = f"no {label(rule)} stays within {budget}"
    else:
        last = (
            f"within {budget}: --{rule.replace('_', '-')} {chosen[rule]:.6g} "
            f"({chosen['mean_loops']:.2f} loops, {chosen['iterations_saved']:.1%} of the iterations saved)"
        )
    lines = [table(head, rows), f"{d['model']} on {d['runtime']}, {d['tokens']:,} tokens", last]
    if stored := d.get("stored"):
        lines.append(f"this is now the default, with the text's SHA-256, {stored['text_sha256']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
