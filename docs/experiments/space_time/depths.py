"""How RMS-E should learn its depth: what tells loops apart, and what the recipe asks of deep ones. Prints a table.

    python docs/experiments/space_time/depths.py --text shakespeare.txt

Trains what is missing of every variant below with every seed, by the recipe rmse.json beside this file, and goes on where it was
stopped. Losses are of the same 96 blocks of the validation split after every loop, also of loops beyond the trained depth of 8: a
learned bias and router logits then stay those of loop 8, temporal_rope turns on by the trained frequencies, and without an encoding
there is nothing to continue. depths.json beside this file holds every run, depths.png draws it; --only-table prints and draws
what it holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.cli.protocol import carried_out, parser_of, spread, trained
from rmse_edge.layers.rope import inverse_frequencies
from rmse_edge.probe.diversity import CODES
from rmse_edge.probe.exits import frontiers
from rmse_edge.probe.readings import read
from rmse_edge.probe.subjects import Looped
from rmse_edge.text import Tokenizer, consecutive_blocks, read_text, split
from rmse_edge.text import spread as spread_evenly
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.trainer import evaluate

HERE = Path(__file__).parent
BEYOND = 16  # loops
BLOCKS = 96
NOTHING = 0.002  # nats by which a deeper loop may be worse
EVERY = "[1,2,3,4,5,6,7,8]"


@dataclass(frozen=True)
class Variant:
    title: str
    changes: tuple[str, ...] = ()


VARIANTS: dict[str, Variant] = {
    "learned": Variant("as the shipped model: learned codes; 3, 5 or 8 loops; entropy weight 0.5 falling to 0.1"),
    "temporal-rope": Variant("temporal_rope", ("model.step_encoding=temporal_rope",)),
    "none": Variant("no encoding", ("model.step_encoding=none",)),
    "last": Variant("the last loop's loss alone, any depth of 1 to 8", (f"depths={EVERY}", "objective=last")),
    "uniform": Variant("any depth of 1 to 8", (f"depths={EVERY}",)),
    "entropy": Variant("entropy weight 0.5 throughout", ("final_entropy_weight=0.5",)),
    "longer": Variant("twice as many steps", ("steps=1200",)),
}


def recipe_of(name: str, seed: int, changes: Sequence[str]) -> Recipe:
    return Recipe.from_file(HERE / "rmse.json").override([*VARIANTS[name].changes, f"seed={seed}", *changes])


def deepened(model: RMSE, loops: int) -> RMSE:
    """The same weights for more loops than were trained; see above for what tells the further ones apart."""
    trained = model.config.max_loops
    deep = RMSE(dataclasses.replace(model.config, max_loops=loops))
    weights = dict(model.state_dict())
    for name, table in weights.items():
        if name.rpartition(".")[2] in CODES:
            weights[name] = torch.cat([table, table[-1:].expand(loops - trained, -1)])
    deep.load_state_dict(weights)
    if (dims := deep.block.attention.step_dims) > 0:
        angles = np.arange(loops)[:, None] * inverse_frequencies(dims, float(trained))
        deep.block.attention.step_cos.copy_(torch.from_numpy(np.cos(angles)))
        deep.block.attention.step_sin.copy_(torch.from_numpy(np.sin(angles)))
    return deep.eval()


def measured(name: str, seed: int, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    recipe = recipe_of(name, seed, args.set)
    trained(recipe, args.text, out)
    model = load_checkpoint(out)
    ids = np.array(Tokenizer(out / "tokenizer.json").encode(read_text(args.text)))
    every = consecutive_blocks(split(ids, "validation"), recipe.block)
    blocks = every[spread_evenly(len(every), BLOCKS)]
    rules = frontiers(read(Looped(model.eval()), blocks))["rules"]
    return {
        "variant": name,
        "seed": recipe.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_loops": model.config.max_loops,
        "loss_by_depth": evaluate(deepened(model, BEYOND), torch.from_numpy(blocks)),
        "saved": {rule: rules[rule]["saved"] for rule in rules},
    }


def worst_rise(losses: Sequence[float]) -> float:
    """By how much a deeper loop is worse than a shallower one, at most; 0: never."""
    best = np.minimum.accumulate(losses)
    return float((np.array(losses) - best).max())


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each variant, means and standard deviations over seeds."""
    head = ("variant", "seeds", "loss after 1", "after 4", "at the best", "after 8", "worst rise to 8",
            f"never worse by {NOTHING}", f"after {BEYOND}", "loops saved: gate", "change", "KL")  # fmt: skip
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, variant in VARIANTS.items():
        own = [run for run in runs if run["variant"] == name]
        if not own:
            continue
        inside = [run["loss_by_depth"][: run["trained_loops"]] for run in own]
        rises = [worst_rise(losses) for losses in inside]
        held = sum(rise <= NOTHING for rise in rises)
        losses = [
            spread([f(losses) for losses in inside], "{:.3f}")
            for f in (lambda x: x[0], lambda x: x[3], min, lambda x: x[-1])
        ]
        saved = [spread([run["saved"][rule] for run in own], "{:.0%}") for rule in ("gate", "change", "KL")]
        cells = (
            variant.title, str(len(own)), *losses, spread(rises, "{:.4f}"), f"{held} of {len(own)}",
            spread([run["loss_by_depth"][-1] for run in own], "{:.3f}"), *saved,
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(runs: Sequence[dict[str, Any]], picture: Path) -> None:
    """The loss after every loop, means over seeds: what tells loops apart, and what the recipe asks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    names = list(VARIANTS)
    for axis, shown in zip(axes, (names[:3], [names[0], *names[3:]])):
        for name in shown:
            own = [run["loss_by_depth"] for run in runs if run["variant"] == name]
            if own:
                losses = [statistics.fmean(at) for at in zip(*own)]
                label = VARIANTS[name].title.split(":")[0]
                axis.plot(
                    range(1, len(losses) + 1), losses, "o-", ms=2.5, lw=1, color=f"C{names.index(name)}", label=label
                )
        axis.axvline(8, color="grey", lw=0.8, ls=":")
        axis.set_xlabel("loops; trained to the dotted line")
        axis.legend(fontsize=8)
    at_the_end = [run["loss_by_depth"][7] for run in runs]
    if at_the_end:
        axes[0].set_ylim(min(at_the_end) - 0.03, max(at_the_end) + 0.25)
    axes[0].set_ylabel("validation loss, nats")
    figure.tight_layout()
    figure.savefig(picture, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = parser_of(__doc__, "runs/depths", HERE / "depths.json", VARIANTS)
    runs, args = carried_out(parser, lambda seeds: [(seed, name) for seed in seeds for name in VARIANTS], measured)
    print(table(runs))
    draw(runs, args.output.with_name("depths.png"))


if __name__ == "__main__":
    main()
