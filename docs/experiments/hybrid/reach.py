"""What a hybrid recalls, by distance, when one kind of its layers is taken away. Prints tables of verdicts.

    python docs/experiments/hybrid/reach.py

A layer of each memory, one value in texts of words that is asked for at the end (the needle of docs/hybrids.md), trained on texts of 16 to 64
positions. Distances are those of the needle from the question; attention sees 16 positions. A model without a kind has one layer less,
and so fewer parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from study import Claim, Column, Run, Study, Variant, by_seed, draw_line

from rmse_edge.train.needle import Needle
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.sequences import HELD_OUT, share_right
from rmse_edge.train.sources import Source

LAYERS = ("atlas", "mamba3", "gated_deltanet", "gated_attention")
DISTANCES = (8, 32, 128, 512)
COUNT = 64  # texts of each distance

RECIPE = {
    "architecture": "hybrid",
    "model": {
        "vocab_size": 33, "d_model": 32, "layers": list(LAYERS), "intermediate_size": 64, "exit_rules": [],
        "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "rotary_dims": 8, "window": 16,
        "deltanet_key_heads": 2, "deltanet_value_heads": 2, "deltanet_key_dim": 16, "deltanet_value_dim": 16,
        "mamba_heads": 2, "mamba_head_dim": 16, "mamba_state_dim": 16, "mamba_angles": 4,
        "atlas_heads": 2, "atlas_head_dim": 8, "atlas_hidden": 16, "atlas_segment": 16, "atlas_degree": 1,
    },
    "task": {"name": "needle", "values": 16, "hay": 16, "train": 64, "test": [64], "questions": 4},
    "objective": "last", "depths": [1], "steps": 800, "gate_steps": 0, "exit_steps": 0, "batch_size": 32, "lr": 0.005,
    "warmup": 40, "weight_decay": 0.0, "eval_every": 400, "eval_blocks": 32, "precision": "fp32",
}  # fmt: skip


def layers(without: str | None) -> tuple[str, ...]:
    left = ",".join(f'"{kind}"' for kind in LAYERS if kind != without)
    return (f"model.layers=[{left}]",)


VARIANTS = {"all": Variant("all four")} | {kind: Variant(f"without {kind}", layers(kind)) for kind in LAYERS}
CLAIMS = tuple(
    Claim(f"without {kind} less is recalled at {distance} positions", "all", kind, f"right-{distance}", True)
    for kind in LAYERS
    for distance in (DISTANCES[0], DISTANCES[-1])
)


def measured(model: Any, source: Source, _recipe: Recipe) -> dict[str, float]:
    assert isinstance(source, Needle)
    found = {}
    for distance in DISTANCES:  # the value stands at the beginning
        draw = np.random.default_rng((HELD_OUT, distance))
        found[f"right-{distance}"] = share_right(model, source.draw(draw, COUNT, distance + 1, 0.0))
    return found


def draw(axis: Any, runs: Sequence[Run]) -> None:
    for i, (name, variant) in enumerate(VARIANTS.items()):
        own = [by_seed(runs, name, f"right-{distance}") for distance in DISTANCES]
        if own[0]:
            draw_line(axis, DISTANCES, [[at[seed] for at in own] for seed in own[0]], variant.title, f"C{i}")
    axis.set_xscale("log", base=2)
    axis.set_xlabel("positions between value and question")
    axis.set_ylabel("right answers")


COLUMNS = tuple(Column(f"{distance} positions", f"right-{distance}") for distance in DISTANCES)
STUDY = Study("reach", RECIPE, VARIANTS, CLAIMS, COLUMNS, measured, draw)

if __name__ == "__main__":
    STUDY.main(__doc__)
