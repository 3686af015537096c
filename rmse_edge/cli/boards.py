"""Boards at the command line: what rmse-run, rmse-eval and rmse-bench do with a model that fills them in."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from rmse_edge.errors import UserError

from .display import bars, table
from .flags import chosen_dials

if TYPE_CHECKING:
    from rmse_edge.puzzles.game import Game
    from rmse_edge.puzzles.sets import Boards
    from rmse_edge.runtimes import BoardRuntime

BATCHES = (1, 32)


def refuse_flags_of_texts(
    args: argparse.Namespace, parser: argparse.ArgumentParser, flags: Sequence[str], beside: str
) -> None:
    """Fail where one of these was given a value, beside a flag that asks for boards: it would change nothing.

    Raises:
        UserError: names the flag.
    """
    for flag in flags:
        if getattr(args, flag) != parser.get_default(flag):
            raise UserError(f"--{flag.replace('_', '-')}: is of texts; leave it out with {beside}")


def opened(args: argparse.Namespace, path: Path) -> tuple[BoardRuntime, Game]:
    """The runtime that the flags ask for, and the rules of its boards.

    Raises:
        UserError: it is a model of texts, or what its boards are is not known.
    """
    from rmse_edge.puzzles.known import game_of_model
    from rmse_edge.runtimes import open_boards

    if args.expert_ram is not None:
        raise UserError("--expert-ram: solvers of boards have no experts; leave it out")
    if args.dtype is not None:
        raise UserError("--dtype: is for models of texts; leave it out")
    runtime = open_boards(path, args.runtime, args.device, args.threads)
    try:
        return runtime, game_of_model(runtime.board)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------------------------------------ rmse-run


def run_boards(args: argparse.Namespace) -> int | None:
    """`rmse-run MODEL --board FILE`: the solved boards, as people write them."""
    runtime, game = opened(args, args.model)
    dials = chosen_dials(args, runtime.info)
    documents = []
    for i, given in enumerate(game.read(*board_text(args.board)), 1):
        began = time.perf_counter()
        found = runtime.solve(given, dials)
        seconds = time.perf_counter() - began
        answer, steps = found.cells, int(found.depth.max())
        wrong = game.broken(given, answer)
        document: dict[str, Any] = {
            "board": game.line(given), "answer": game.line(answer), "steps": steps, "max_steps": dials.max_loops,
            "solved": wrong is None, "broken": wrong, "seconds": seconds,
        }  # fmt: skip
        every = list(runtime.steps(given, dials)) if args.show_steps else []
        document |= {"boards": [game.line(s.cells) for s in every]} if every else {}
        documents.append(document)
        if args.output == "json":
            continue
        if i > 1:
            print()
        before = given
        for k, step in enumerate(every, 1):
            changed = step.cells != before
            print(f"step {k}: {changed.sum()} cells changed\n{game.show(step.cells, changed)}\n")
            before = step.cells
        print(game.show(answer), flush=True)
        verdict = "solved" if wrong is None else f"NOT a solution: {wrong}"
        print(f"board {i}: {steps} of {dials.max_loops} steps, {1000 * seconds:.0f} ms; {verdict}", file=sys.stderr)
    if args.output == "json":
        print(
            json.dumps(
                {
                    "model": runtime.info.name,
                    "runtime": runtime.info.target,
                    "dials": vars(dials),
                    "solutions": documents,
                }
            )
        )
    return None


def board_text(source: str) -> tuple[str, str]:
    """The text of a file or of stdin (-), and its name.

    Raises:
        UserError: it is not there, or not UTF-8.
    """
    from rmse_edge.text import decode_utf8, read_text

    if source != "-":
        return read_text(Path(source), empty=True), source
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("--board: nothing was piped into stdin; give a file")
    return decode_utf8(sys.stdin.buffer.read(), "stdin"), "stdin"


# ----------------------------------------------------------------------------------------------------------- rmse-eval


def evaluate_boards(args: argparse.Namespace) -> int | None:
    """`rmse-eval MODEL --boards FILE.csv`: boards solved, steps and false halts; with --sweep over thresholds."""
    from rmse_edge.puzzles.measures import THRESHOLDS
    from rmse_edge.runtimes.measure.boards import solve_all, sweep_thresholds

    runtime, game = opened(args, args.model)
    dials = chosen_dials(args, runtime.info)
    boards = read(args.boards, game, args.max_tokens)
    thresholds = THRESHOLDS
    if args.rule:
        if args.rule[0] != "exit_threshold":
            raise UserError(f"--rule {args.rule[0].replace('_', '-')}: boards stop by exit-threshold alone")
        thresholds = args.rule[1] or THRESHOLDS
    document: dict[str, Any] = {
        "model": runtime.info.name, "runtime": runtime.info.target, "quant": runtime.info.quant,
        "boards_file": str(args.boards), "dials": vars(dials),
    }  # fmt: skip
    with progress(len(boards) * (len(thresholds) + 1 if args.sweep else 1)) as bar:
        if args.sweep:
            document["sweep"] = sweep_thresholds(runtime, game, boards, dials, thresholds, bar.update)
        else:
            document |= solve_all(runtime, game, boards, dials, progress=bar.update).summary()
    if args.output == "json":
        print(json.dumps(document))
        return None
    rows = document.get("sweep", [document | {"exit_threshold": dials.exit_threshold}])
    head = (
        "model",
        "runtime",
        "boards",
        "exit threshold",
        "solved",
        "cells right",
        "mean steps",
        "false halts",
        "boards/s",
    )
    print(
        table(
            head,
            [
                (
                    document["model"], document["runtime"], f"{r['boards']:,}",
                    "off" if r["exit_threshold"] >= 1 else f"{r['exit_threshold']:g}", f"{r['solved']:.2%}",
                    f"{r['cells']:.2%}", f"{r['mean_steps']:.2f} of {dials.max_loops}", f"{r['false_halts']:.2%}",
                    f"{r['boards_per_s']:.1f}",
                )
                for r in rows
            ],
        )
    )  # fmt: skip
    if not args.sweep:
        print("\n".join(bars(document["histogram"])))
    return None


def read(path: Path, game: Game, most: int | None) -> Boards:
    from rmse_edge.puzzles.sets import read_boards

    return read_boards(path, game, most)


def progress(total: int) -> tqdm:
    """A bar on stderr, for people only."""
    return tqdm(total=total, unit=" boards", disable=None, leave=False, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------- rmse-bench


def bench_boards(args: argparse.Namespace) -> int | None:
    """`rmse-bench MODEL... --boards FILE.csv`: boards per second at fixed and adaptive depth."""
    from dataclasses import replace

    from rmse_edge.runtimes.measure.boards import time_boards

    documents = []
    for path in args.model:
        runtime, game = opened(args, path)
        dials = chosen_dials(args, runtime.info)
        boards = read(args.boards, game, max(BATCHES)).given
        depths = args.depths or [dials.max_loops]
        settings = {
            f"{d} steps": runtime.info.check(replace(dials, max_loops=d, min_loops=1, exit_threshold=1.0))
            for d in depths
        }
        if dials.exits:
            settings[f"threshold {dials.exit_threshold:g}"] = dials
        batches = [
            size
            for size in BATCHES
            if size <= len(boards) and (runtime.largest_batch is None or size <= runtime.largest_batch)
        ]
        with progress(len(boards) * len(batches) * len(settings) * (args.repetitions + 1)) as bar:
            rows = time_boards(runtime, boards, settings, batches, args.repetitions, bar.update)
        notes = []
        if runtime.largest_batch == 1:
            notes.append(f"{runtime.info.name}: {runtime.info.target} takes one board at a time")
        elif len(batches) < len(BATCHES):
            notes.append(
                f"{runtime.info.name}: {args.boards} has {len(boards)} boards, too few for {BATCHES[-1]} at once"
            )
        documents.append(
            {
                "model": runtime.info.name, "runtime": runtime.info.target, "quant": runtime.info.quant,
                "parameters": runtime.info.parameters, "package_bytes": runtime.info.nbytes, "boards": len(boards),
                "threads": args.threads, "rows": rows, "notes": notes,
            }
        )  # fmt: skip
    if args.output == "json":
        print(json.dumps(documents[0] if len(documents) == 1 else {"models": documents}))
        return None
    cells = [
        (d["model"], d["runtime"], d["quant"], row["setting"], str(row["batch"]), f"{row['mean_steps']:.2f}",
         f"{row['boards_per_s']:.1f}", f"{row['ms_per_step']:.2f}")
        for d in documents for row in d["rows"]
    ]  # fmt: skip
    print(table(("model", "runtime", "quant", "setting", "batch", "mean steps", "boards/s", "ms/step"), cells))
    for note in (note for d in documents for note in d["notes"]):
        print(note)
    return None
