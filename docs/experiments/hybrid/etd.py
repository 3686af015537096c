"""Encode, think, decode with 1 to 4 loops, trained on equally many characters. Prints tables of verdicts.

    python docs/experiments/hybrid/etd.py --text shakespeare.txt

Four layers, of which the middle two are looped k times (arXiv 2510.07358); every model is trained from the start and measured with its own k,
and has the same parameters. The paper goes on from a trained stack of layers, which asks for one that is worth it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from study import Claim, Column, Run, Study, Variant, by_seed, draw_line, loss_of

from rmse_edge.train.recipe import Recipe
from rmse_edge.train.sources import Source

LOOPS = (1, 2, 3, 4)

RECIPE = {
    "architecture": "hybrid",
    "model": {
        "vocab_size": 65, "d_model": 48, "layers": ["gated_deltanet", "gated_attention", "gated_deltanet", "gated_deltanet"],
        "think": [1, 3], "deltanet_key_heads": 2, "deltanet_value_heads": 2, "deltanet_key_dim": 16, "deltanet_value_dim": 24,
        "n_heads": 3, "head_dim": 16, "n_kv_heads": 1, "rotary_dims": 8, "window": 8, "intermediate_size": 96,
        "exit_rules": [],
    },
    "block_size": 32, "batch_size": 16, "objective": "last", "depths": [1], "steps": 150, "gate_steps": 0,
    "exit_steps": 0,
    "lr": 0.01, "warmup": 15, "ema": 0.95, "eval_every": 75, "eval_blocks": 16, "precision": "fp32",
}  # fmt: skip

VARIANTS = {f"k{k}": Variant(f"{k} loop{'s' * (k > 1)}", (f"model.think_loops={k}", f"depths=[{k}]")) for k in LOOPS}
CLAIMS = tuple(
    Claim(f"{more} loops beat {fewer}", f"k{more}", f"k{fewer}", "loss")
    for fewer, more in (*itertools.pairwise(LOOPS), (LOOPS[0], LOOPS[-1]))
)


def measured(model: Any, source: Source, _recipe: Recipe) -> dict[str, float]:
    return {"loss": loss_of(model, source)}


def draw(axis: Any, runs: Sequence[Run]) -> None:
    found = {k: by_seed(runs, f"k{k}", "loss") for k in LOOPS}
    found = {k: by for k, by in found.items() if by}
    seeds = set.intersection(*(set(by) for by in found.values()))
    if seeds:
        values = [[by[seed] for by in found.values()] for seed in seeds]
        draw_line(axis, list(found), values, "mean and range of seeds", "C0")
    axis.set_xticks(LOOPS)
    axis.set_xlabel("loops, in training and after it")
    axis.set_ylabel("validation loss, nats")


STUDY = Study("etd", RECIPE, VARIANTS, CLAIMS, (Column("validation loss, nats", "loss"),), measured, draw, text=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
