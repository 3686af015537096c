"""Depth in space against depth in time: layers, one layer, and one layer looped, trained alike. Prints tables of verdicts.

    python docs/experiments/space_time/compare.py --text shakespeare.txt

Trains what is missing of every variant below with every seed, and goes on where it was stopped. All read the same blocks in the
same order at the same learning rate, attention reaches over the whole block in all, and one loop costs as many FLOPs as one
layer, within 2 %; the dense loop has the parameters of one layer and, besides, an injection, a code for each loop and an exit gate.
The gate is not trained: like the layers, loops are asked for their last state alone. results.json beside this file holds every run
and is brought up to date after each, curves.png draws it; --only-table prints and draws what it holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmse_edge.cli.protocol import carried_out, parser_of, spread, trained
from rmse_edge.train.comparison import Axis, Run, by_seed, difference, recovered
from rmse_edge.train.flops import flops_per_token
from rmse_edge.train.journal import read_rows
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.session import EVALUATION_FILE, RECIPE_FILE
from rmse_edge.train.trainer import LOG_FILE

HERE = Path(__file__).parent
NO_WORSE = 0.02  # nats; single runs of this size differ by as much


@dataclass(frozen=True)
class Variant:
    """A recipe beside this file, and what is changed of it."""

    title: str
    recipe: str
    changes: tuple[str, ...] = ()


def looped(loops: int) -> Variant:
    return Variant(f"dense loop, {loops}", "loop.json", (f"model.max_loops={loops}", f"depths=[{loops}]"))


# In the order in which they are trained: first with every seed what decides, then more depths.
VARIANTS: dict[str, Variant] = {
    "gpt-1": Variant("GPT, 1 layer", "gpt.json", ("model.n_layers=1",)),
    "gpt-12": Variant("GPT, 12 layers", "gpt.json"),
    "loop-1": looped(1),
    "loop-12": looped(12),
    "moe-12": Variant("MoE loop, 12", "loop.json", ("model.n_experts=88", "model.top_k=3", "model.shared_width=75")),
    "gpt-1-long": Variant(
        "GPT, 1 layer, 12 times the steps",
        "gpt.json",
        ("model.n_layers=1", "steps=7200", "warmup=720", "eval_every=600"),
    ),
    "loop-2": looped(2),
    "loop-4": looped(4),
    "loop-6": looped(6),
    "loop-24": looped(24),
}
FIRST = tuple(VARIANTS)[:5]


@dataclass(frozen=True)
class Claim:
    """That `first` has a lower loss than `second`, or one no higher than by `margin`."""

    text: str
    first: str
    second: str
    axis: Axis
    margin: float = 0.0


CLAIMS = (
    Claim("twelve layers beat one, at equal tokens", "gpt-12", "gpt-1", "tokens"),
    Claim("twelve loops beat one layer of as many parameters, at equal tokens", "loop-12", "gpt-1", "tokens"),
    Claim("twelve loops beat one loop of the same block, at equal tokens", "loop-12", "loop-1", "tokens"),
    Claim("twelve loops beat one layer that reads twelve times as much, at equal FLOPs", "loop-12", "gpt-1-long", "flops"),
    Claim("twelve loops are worth twelve layers, at equal FLOPs", "loop-12", "gpt-12", "flops", NO_WORSE),
    Claim("experts make a loop better, at equal FLOPs", "moe-12", "loop-12", "flops"),
    Claim("a loop of experts is worth twelve layers of as many parameters, at equal FLOPs", "moe-12", "gpt-12", "flops", NO_WORSE),
    *(
        Claim(f"{more} loops beat {fewer}, at equal tokens", f"loop-{more}", f"loop-{fewer}", "tokens")
        for fewer, more in ((1, 2), (2, 4), (4, 6), (6, 12), (12, 24))
    ),
)  # fmt: skip


def of_variant(name: str, seed: int, changes: Sequence[str]) -> Recipe:
    variant = VARIANTS[name]
    return Recipe.from_file(HERE / variant.recipe).override([*variant.changes, f"seed={seed}", *changes])


def order(seeds: Sequence[int]) -> list[tuple[int, str]]:
    """What decides with every seed, then the other depths."""
    rest = tuple(name for name in VARIANTS if name not in FIRST)
    return [(seed, name) for part in (FIRST, rest) for seed in seeds for name in part]


def measured(name: str, seed: int, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    trained(of_variant(name, seed, args.set), args.text, out)
    evaluation = json.loads((out / EVALUATION_FILE).read_text())
    recipe = Recipe.from_file(out / RECIPE_FILE)  # which says how many tokens there are
    step = recipe.batch_size * recipe.block
    valued = [row for row in read_rows(out / LOG_FILE) if row["val_loss"]]
    run = Run(
        name,
        recipe.seed,
        evaluation["parameters"],
        flops_per_token(recipe),
        tuple((int(row["step"]) + 1) * step for row in valued),
        tuple(float(row["val_loss"]) for row in valued),
        evaluation["loss_by_depth"]["float32"][-1],
    )
    return dataclasses.asdict(run)


def tables(runs: Sequence[Run]) -> str:
    """Markdown: every claim with its verdict, then every variant."""
    rows = ["| claim | difference, nats | seeds | verdict |", "|---|---|---|---|"]
    for claim in CLAIMS:
        found = difference(runs, claim.first, claim.second, claim.axis)
        text = claim.text + (f" (within {claim.margin:g})" if claim.margin else "")
        rows.append(f"| {text} | {found} | {len(found.values)} | {found.verdict(claim.margin)} |")
    head = ("variant", "parameters", "MFLOPs a token", "loss", "of the gain of 12 layers", "tokens to one layer's loss")
    rows += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, variant in VARIANTS.items():
        own = list(by_seed(runs, name).values())
        if own:
            cells = (
                variant.title, f"{own[0].parameters:,}", f"{own[0].flops_per_token / 1e6:.2f}",
                spread([run.final for run in own], "{:.3f}"), spread(recovered(runs, name, "gpt-1", "gpt-12"), "{:.0%}"),
                spread(reached(runs, name), "{:,.0f}"),
            )  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def reached(runs: Sequence[Run], name: str) -> list[float]:
    """Tokens until a variant is as good as one layer is at the end, of the seeds that get there."""
    goals = by_seed(runs, "gpt-1")
    found = (run.needed("tokens", goals[seed].loss[-1]) for seed, run in by_seed(runs, name).items() if seed in goals)
    return [tokens for tokens in found if tokens is not None]


def draw(runs: Sequence[Run], picture: Path) -> None:
    """Loss over tokens, over FLOPs, and by the number of loops; lines are means over seeds, bands their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, (tokens, flops, depths) = plt.subplots(1, 3, figsize=(15, 4.6))
    for i, name in enumerate(VARIANTS):
        own = list(by_seed(runs, name).values())
        if not own:
            continue
        losses = [statistics.fmean(at) for at in zip(*(run.loss for run in own))]
        style = {"color": f"C{i}", "ls": "-" if name in FIRST else ":", "lw": 1.6 if name in FIRST else 1.2}
        for axis, places in ((tokens, own[0].along("tokens")), (flops, own[0].along("flops"))):
            axis.plot(places, losses, label=VARIANTS[name].title, **style)
            axis.fill_between(
                places, *zip(*((min(at), max(at)) for at in zip(*(r.loss for r in own)))), color=f"C{i}", alpha=0.15
            )
    for axis, label in ((tokens, "characters trained on"), (flops, "FLOPs spent")):
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(label)
        axis.set_ylabel("validation loss, nats")
    tokens.legend(fontsize=7)
    swept = [
        (int(name.removeprefix("loop-")), list(by_seed(runs, name).values()))
        for name in VARIANTS
        if name.startswith("loop-")
    ]
    swept = sorted((loops, own) for loops, own in swept if own)
    for loops, own in swept:
        depths.plot([loops] * len(own), [run.final for run in own], "ko", ms=3)
    depths.plot(
        [k for k, _ in swept],
        [statistics.fmean(r.final for r in own) for _, own in swept],
        "k-",
        lw=1,
        label="dense loop",
    )
    for name, color in (("gpt-1", "C0"), ("gpt-12", "C1"), ("moe-12", "C4")):
        if own := list(by_seed(runs, name).values()):
            depths.axhline(
                statistics.fmean(r.final for r in own), color=color, ls="--", lw=1, label=VARIANTS[name].title
            )
    depths.set_xscale("log", base=2)
    depths.set_xticks([k for k, _ in swept], [str(k) for k, _ in swept])
    depths.set_xlabel("loops")
    depths.set_ylabel("loss after training, nats")
    depths.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(picture, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = parser_of(__doc__, "runs/space-time", HERE / "results.json", VARIANTS)
    found, args = carried_out(parser, order, measured)
    runs = [Run(**run) for run in found]
    print(tables(runs))
    draw(runs, args.output.with_name("curves.png"))


if __name__ == "__main__":
    main()
