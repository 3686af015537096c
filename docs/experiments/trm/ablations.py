"""What each part of TRM brings at a small size: the paper's ablations, three seeds each. Prints a table of verdicts.

    python docs/experiments/trm/ablations.py

Trains what is missing of every variant below with every seed, by the recipe ablations.json beside this file, and goes on
where it was stopped. All have the same boards, steps of the optimiser and learning rate; a seed decides the first weights and the
order of the boards. results.json beside this file holds every run, and is brought up to date after each; --only-table
prints the table of what it holds.

**A claim** says that the whole is better than the variant that lacks one part. The measure is the share of the test boards with every cell
right after all the steps that a variant was trained for. A claim is *kept* where every seed of the whole solves more
than any seed of the variant, *refuted* where every seed solves fewer, and otherwise *unclear*; so it is where no seed of one of
the two solves a board: it has not begun to, which says how fast it learns and nothing of where it ends. Where a part brings nothing,
three seeds against three come out as kept by chance once in 20 times, and as often as refuted.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.puzzles.measures import table_of_thresholds
from rmse_edge.puzzles.sets import Boards, write_boards
from rmse_edge.train.boards import TEST_FILE, TRAIN_FILE, BoardTask, trajectories
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.session import EVALUATION_FILE, train_task
from rmse_edge.train.tasks import make_task
from rmse_edge.train.trainer import STATE_FILE

HERE = Path(__file__).parent
STEPS = 16  # how far every variant is followed, also what was trained for one step
WHOLE = "whole"


@dataclass(frozen=True)
class Variant:
    """What it changes of the recipe, and the claim that it puts to the test."""

    title: str
    changes: tuple[str, ...] = ()
    claim: str = ""


VARIANTS: dict[str, Variant] = {
    WHOLE: Variant("the whole"),
    "no-supervision": Variant(
        "one supervision step for each board", ("model.halt_max_steps=1",), "deep supervision is better than none"
    ),
    "two-networks": Variant(
        "a network H of its own", ("model.separate_H=true", "model.H_layers=2"), "one network is better than two"
    ),
    "four-layers": Variant(
        "four layers, called half as often",
        ("model.L_layers=4", "model.L_cycles=1"),
        "two layers are better than four",
    ),
    "no-average": Variant("the last weights, not their average", ("ema=0.0",), "averaged weights are better"),
    "one-step-gradient": Variant(
        "gradient through the last L and H alone",
        ("model.gradient=step",),
        "the gradient of a whole recursion is better than that of one step",
    ),
    "attention": Variant(
        "attention over positions",
        ("model.mlp_t=false", "model.pos_encodings=rope"),
        "an MLP over positions is better than attention on small boards",
    ),
}


def with_boards(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with its boards in files, made once: making them takes a quarter of a run."""
    filed = recipe.override([f"task.data={folder}"])
    if (folder / TEST_FILE).exists():  # the second of the two
        return filed
    assert recipe.task is not None
    task = make_task(recipe.task, recipe.model_config())
    assert isinstance(task, BoardTask)
    folder.mkdir(parents=True, exist_ok=True)
    both = (Boards(*map(np.concatenate, zip(*(vars(b).values() for b in (task.held, task.boards))))), task.tested)
    for name, boards in zip((TRAIN_FILE, TEST_FILE), both):
        write_boards(folder / name, task.game, boards, "ablations.py")
    return filed


def trained(recipe: Recipe, out: Path) -> Any:
    """The model of one variant and one seed; a run that was stopped goes on."""
    if not (out / EVALUATION_FILE).exists():
        resume = (out / STATE_FILE).exists()
        if not resume:  # what a run left that was stopped before its first saved state
            shutil.rmtree(out, ignore_errors=True)
        train_task(out, recipe, resume)
    return load_checkpoint(out)


def measured(model: Any, recipe: Recipe) -> dict[str, Any]:
    """On the boards of the test, which no variant is trained on."""
    assert recipe.task is not None
    task = make_task(recipe.task, recipe.model_config())
    assert isinstance(task, BoardTask)
    steps = model.config.halt_max_steps
    model.config = dataclasses.replace(model.config, halt_max_steps=STEPS)
    exact, cells, score = trajectories(model, task.tested)
    return {
        "solved": float(exact[steps - 1].mean()),
        "solved_by_step": exact.mean(1).tolist(),
        "cells": float(cells[steps - 1].mean()),
        "trained_steps": steps,
        "halting": table_of_thresholds(exact[:steps], score[:steps], (0.5,))[0],
        "boards": exact.shape[1],
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def verdict(whole: list[float], variant: list[float]) -> str:
    """See above; with fewer than three seeds of either there is none."""
    if min(len(whole), len(variant)) < 3:
        return "not measured"
    if not max(whole) or not max(variant):
        return "unclear"
    if min(whole) > max(variant):
        return "kept"
    return "refuted" if max(whole) < min(variant) else "unclear"


def share(values: list[float]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * spread:.1f} %"


def table(results: dict[str, Any]) -> str:
    """Markdown: every claim with its verdict, then every variant."""
    found = {name: [r for r in results["runs"].values() if r["variant"] == name] for name in VARIANTS}
    solved = {name: [r["solved"] for r in runs] for name, runs in found.items() if runs}
    rows = ["| claim | the whole | without | verdict |", "|---|---|---|---|"]
    for name, variant in VARIANTS.items():
        if variant.claim and name in solved and WHOLE in solved:
            decided = verdict(solved[WHOLE], solved[name])
            rows.append(f"| {variant.claim} | {share(solved[WHOLE])} | {share(solved[name])} | {decided} |")
    head = ("variant", "parameters", "solved", "cells right", "after 1 step", f"after {STEPS}", "halting at 0.5")
    rows += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in solved:
        runs = found[name]
        steps = statistics.mean(r["halting"]["mean_steps"] for r in runs)
        cells = (
            VARIANTS[name].title, f"{runs[0]['parameters']:,}", share(solved[name]), share([r["cells"] for r in runs]),
            share([r["solved_by_step"][0] for r in runs]), share([r["solved_by_step"][-1] for r in runs]),
            f"{share([r['halting']['solved'] for r in runs])} in {steps:.2f} steps",
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/trm-ablations"), help="where the trained models are put"
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", help="names of variants, separated by commas: " + ", ".join(VARIANTS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe of all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = Recipe.from_file(HERE / "ablations.json").override(args.set)
    results: dict[str, Any] = {"changes": args.set, "runs": {}}
    if args.output.is_file():
        results = json.loads(args.output.read_text())
        if not args.only_table and results["changes"] != args.set:
            parser.error(f"{args.output} is of --set {results['changes']}; give another file with -o")
    if not args.only_table:
        base = with_boards(base, args.runs / "boards")
    seeds = [] if args.only_table else [int(seed) for seed in args.seeds.split(",")]
    for seed, (name, variant) in itertools.product(seeds, VARIANTS.items()):
        cell = f"{name}-{seed}"
        if cell in results["runs"] or (args.only and name not in args.only.split(",")):
            continue
        recipe = base.override([*variant.changes, f"seed={seed}"])
        found = measured(trained(recipe, args.runs / cell), recipe)
        results["runs"][cell] = {"variant": name, "seed": seed, **found}
        args.output.write_text(json.dumps(results, indent=2) + "\n")
        print(f"{cell}: {found['solved']:.1%} of {found['boards']} boards", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
