"""What the small comparisons here have in common: a recipe, its variants, what is measured of each, and claims about pairs of them.

Differences are taken seed by seed, since variants of one seed see the same examples in the same order; an interval is that of
Student's t at 95 % (rmse_edge/train/comparison.py). A claim is kept where the whole interval says so, refuted where it says the
contrary, otherwise unclear. NAME.json in results/ holds every run and is brought up to date after each; NAME.png beside it draws them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmse_edge.cli.protocol import carried_out, found_or_cleared, parser_of, spread
from rmse_edge.text import read_text, split
from rmse_edge.train.comparison import Difference
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.sources import Source, TextSource
from rmse_edge.train.tasks import make_task
from rmse_edge.train.trainer import Trainer, evaluate

RESULTS = Path(__file__).parent / "results"
BLOCKS = 96  # of a text's validation split

Run = dict[str, Any]  # "variant", "seed", and what was measured


@dataclass(frozen=True)
class Variant:
    """What it changes of the recipe, and of the model before it is trained."""

    title: str
    changes: tuple[str, ...] = ()
    change: Callable[[Any], None] | None = None


@dataclass(frozen=True)
class Claim:
    """That `first` has a lower `measure` than `second`, or a higher one."""

    text: str
    first: str
    second: str
    measure: str
    higher: bool = False


@dataclass(frozen=True)
class Column:
    """A number of the table of variants."""

    title: str
    measure: str
    form: str = "{:.3f}"


@dataclass(frozen=True)
class Study:
    name: str  # of its files
    recipe: Mapping[str, Any]
    variants: Mapping[str, Variant]
    claims: Sequence[Claim]
    columns: Sequence[Column]
    measured: Callable[[Any, Source, Recipe], dict[str, Any]]  # of a trained model; JSON
    draw: Callable[[Any, Sequence[Run]], None]  # on an axis of matplotlib
    text: bool = False  # it trains on a text, not on a task

    def recipe_of(self, name: str, seed: int, changes: Sequence[str]) -> Recipe:
        return Recipe.from_dict(dict(self.recipe)).override([*self.variants[name].changes, f"seed={seed}", *changes])

    def source(self, recipe: Recipe, text: Path | None) -> Source:
        if text is None:
            assert recipe.task is not None
            return make_task(recipe.task, recipe.model_config())
        found = read_text(text)
        letters = {c: i for i, c in enumerate(sorted(set(found)))}
        ids = np.array([letters[c] for c in found])
        return TextSource(split(ids, "train"), split(ids, "validation"), recipe.block)

    def run(self, name: str, seed: int, out: Path, args: argparse.Namespace) -> Run:
        recipe = self.recipe_of(name, seed, args.set)
        source = self.source(recipe, getattr(args, "text", None))
        model = self.trained(name, recipe, source, out)
        size = sum(p.numel() for p in model.parameters())
        return {"variant": name, "seed": seed, "parameters": size, **self.measured(model, source, recipe)}

    def trained(self, name: str, recipe: Recipe, source: Source, out: Path) -> Any:
        """The model of a variant with its averaged weights; a run that was stopped goes on."""
        resume = found_or_cleared(out)
        out.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(recipe, source, out)
        if (change := self.variants[name].change) is not None:
            with torch.no_grad():
                change(trainer.model)  # weights that are to stand still lose their gradient here
            trainer.average = {path: value.clone() for path, value in trainer.model.state_dict().items()}
        if resume:
            trainer.resume()
        trainer.run(save_every=100)
        trainer.model.load_state_dict(trainer.final_weights())
        return trainer.model.eval()

    def tables(self, runs: Sequence[Run]) -> str:
        """Markdown: every claim with its verdict, then every variant."""
        rows = ["| claim | difference | seeds | verdict |", "|---|---|---|---|"]
        for claim in self.claims:
            first, second = (by_seed(runs, name, claim.measure) for name in (claim.first, claim.second))
            found = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
            verdict = Difference(tuple(-value if claim.higher else value for value in found)).verdict()
            rows.append(f"| {claim.text} | {Difference(tuple(found))} | {len(found)} | {verdict} |")
        head = ("variant", "parameters", *(column.title for column in self.columns))
        rows += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for name, variant in self.variants.items():
            own = [run for run in runs if run["variant"] == name]
            if own:
                values = [spread(_distinct([run[c.measure] for run in own]), c.form) for c in self.columns]
                rows.append(f"| {' | '.join((variant.title, format(own[0]['parameters'], ','), *values))} |")
        return "\n".join(rows)

    def main(self, description: str | None) -> None:
        output = RESULTS / f"{self.name}.json"
        parser = parser_of(description, f"runs/hybrid/{self.name}", output, self.variants, self.text)
        runs, args = carried_out(
            parser, lambda seeds: [(seed, name) for seed in seeds for name in self.variants], self.run
        )
        print(self.tables(runs))
        if runs:
            self.picture(runs, args.output.with_suffix(".png"))

    def picture(self, runs: Sequence[Run], path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axis = plt.subplots(figsize=(7, 4))
        self.draw(axis, runs)
        axis.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(path, dpi=90)
        plt.close(figure)


def _distinct(values: list[float]) -> list[float]:
    """One of what does not depend on the seed."""
    return values[:1] if len(set(values)) == 1 else values


def loss_of(model: Any, source: Source) -> float:
    """The loss on `BLOCKS` blocks of the validation split after the last loop, nats."""
    batch = source.validation(BLOCKS)
    return evaluate(model, torch.cat([batch["tokens"], batch["targets"][:, -1:]], 1))[-1]


def by_seed(runs: Sequence[Run], variant: str, measure: str) -> dict[int, float]:
    return {run["seed"]: run[measure] for run in runs if run["variant"] == variant}


def draw_line(
    axis: Any, x: Sequence[float], runs: Sequence[Sequence[float]], label: str, color: str, style: str = "-"
) -> None:
    """The mean of several seeds' values along x, and their range."""
    axis.plot(x, [statistics.fmean(at) for at in zip(*runs)], f"o{style}", ms=3, label=label, color=color)
    axis.fill_between(x, [min(at) for at in zip(*runs)], [max(at) for at in zip(*runs)], color=color, alpha=0.15)
