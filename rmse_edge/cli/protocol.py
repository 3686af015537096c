"""Protocols: variants of a recipe, each trained with several seeds, and one file of what was measured of them.

Runs go on where they were stopped, and what the file holds already is not trained again. The scripts of docs/experiments that compare
variants are made of this; rmse_edge/train/comparison.py says what differences between runs are worth.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from rmse_edge.files import write_text
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.session import EVALUATION_FILE, train
from rmse_edge.train.trainer import STATE_FILE


def parser_of(
    description: str | None, runs: str, output: Path, variants: Iterable[str], text: bool = True
) -> argparse.ArgumentParser:
    """The flags of a protocol.

    Args:
        runs: the folder of trained models, unless another is asked for.
        output: the file of results, likewise.
        text: whether it trains on a text.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if text:
        parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--runs", type=Path, default=Path(runs), help="where the trained models are put")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", help="names of variants, separated by commas: " + ", ".join(variants))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe of all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    parser.add_argument("-o", "--output", type=Path, default=output)
    return parser


def carried_out(
    parser: argparse.ArgumentParser,
    order: Callable[[Sequence[int]], Iterable[tuple[int, str]]],
    measured: Callable[[str, int, Path, argparse.Namespace], dict[str, Any]],
) -> tuple[list[dict[str, Any]], argparse.Namespace]:
    """What was measured of every run, after training those that are missing.

    Args:
        order: seeds -> (seed, variant), in the order in which they are trained.
        measured: trains a variant with a seed in a folder, by the flags, and says what is kept of it; JSON.
    """
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"changes": args.set, "runs": {}}
    if args.output.is_file():
        results = json.loads(args.output.read_text())
        if not args.only_table and results["changes"] != args.set:
            parser.error(f"{args.output} is of --set {results['changes']}; give another file with -o")
    seeds = [] if args.only_table else [int(seed) for seed in args.seeds.split(",")]
    for seed, name in order(seeds):
        cell = f"{name}-{seed}"
        if cell in results["runs"] or (args.only and name not in args.only.split(",")):
            continue
        results["runs"][cell] = measured(name, seed, args.runs / cell, args)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.output, json.dumps(results, indent=1) + "\n")
        print(cell, flush=True)
    return list(results["runs"].values()), args


def trained(recipe: Recipe, text: Path, out: Path) -> None:
    """One run of `rmse-train`; if it was stopped, it goes on."""
    if not (out / EVALUATION_FILE).exists():
        train(text, out, recipe, resume=found_or_cleared(out), save_every=50)


def found_or_cleared(out: Path) -> bool:
    """Whether a run can go on from its saved state; what one left that was stopped before its first is taken away."""
    resume = (out / STATE_FILE).exists()
    if not resume:
        shutil.rmtree(out, ignore_errors=True)
    return resume


def spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return ""
    deviation = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + deviation
