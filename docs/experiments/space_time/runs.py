"""What the protocols here have in common: runs that go on where they were stopped, and one file of what they found."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from rmse_edge.train.recipe import Recipe
from rmse_edge.train.session import EVALUATION_FILE, train
from rmse_edge.train.trainer import STATE_FILE

HERE = Path(__file__).parent


def parser_of(description: str | None, runs: str, output: str, variants: Iterable[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--runs", type=Path, default=Path(runs), help="where the trained models are put")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", help="names of variants, separated by commas: " + ", ".join(variants))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe of all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    parser.add_argument("-o", "--output", type=Path, default=HERE / output)
    return parser


def carried_out(
    parser: argparse.ArgumentParser,
    order: Callable[[Sequence[int]], Iterable[tuple[int, str]]],
    recipe_of: Callable[[str, int, Sequence[str]], Recipe],
    measured: Callable[[str, Recipe, Path, Path], dict[str, Any]],
) -> tuple[list[dict[str, Any]], argparse.Namespace]:
    """What was measured of every run, after training those that are missing.

    Args:
        order: seeds -> (seed, variant), in the order in which they are trained.
        recipe_of: variant, seed and the changes of --set -> recipe.
        measured: variant, recipe, the text and the folder of a finished run -> what is kept of it; JSON.
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
        recipe = recipe_of(name, seed, args.set)
        trained(recipe, args.text, args.runs / cell)
        results["runs"][cell] = measured(name, recipe, args.text, args.runs / cell)
        args.output.write_text(json.dumps(results, indent=1) + "\n")
        print(cell, flush=True)
    return list(results["runs"].values()), args


def trained(recipe: Recipe, text: Path, out: Path) -> None:
    """One run; if it was stopped, it goes on."""
    if not (out / EVALUATION_FILE).exists():
        resume = (out / STATE_FILE).exists()
        if not resume:  # what a run left that was stopped before its first saved state
            shutil.rmtree(out, ignore_errors=True)
        train(text, out, recipe, resume=resume, save_every=50)


def spread(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation over seeds."""
    if not values:
        return ""
    deviation = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + deviation
