"""How many pairs each mixer recalls, by the size of its state (MQAR as published, arXiv 2312.04927, smaller). Prints tables of verdicts.

    python docs/experiments/hybrid/mqar.py

Two layers of one mixer, an MLP behind each, on the task of mqar.json beside this file with fewer tokens and shorter texts: 64
positions with 4 to 16 pairs. The published sizes (8,192 tokens, up to 512 positions with 64 pairs) are mqar.json's own and take hours.
A state's numbers are those by which a layer recalls: the matrix of a recurrence, keys and values of a window, and of ATLAS the weights of
its network but for 16 biases and less. What it needs besides is not counted: inputs of short convolutions, the last position
and the angles of Mamba-3, of ATLAS the momentum of its weights, which is as large again, and the rows of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from study import Claim, Column, Run, Study, Variant, by_seed, draw_line

from rmse_edge.train.mqar import Mqar
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.sources import Source

PAIRS = (4, 8, 16)

RECIPE = {
    "architecture": "hybrid",
    "model": {
        "vocab_size": 128, "d_model": 64, "layers": ["gated_deltanet", "gated_deltanet"], "intermediate_size": 128,
        "exit_rules": [], "n_heads": 1, "n_kv_heads": 1, "head_dim": 32, "rotary_dims": 16,
    },
    "task": {"name": "mqar", "tokens": 128, "train": [[64, 4], [64, 8], [64, 16]], "test": [[64, p] for p in PAIRS]},
    "objective": "last", "depths": [1], "steps": 2000, "gate_steps": 0, "exit_steps": 0, "batch_size": 32, "lr": 0.005,
    "warmup": 100, "weight_decay": 0.0, "eval_every": 500, "eval_blocks": 32, "precision": "fp32",
}  # fmt: skip

# How each mixer has a state of so many numbers: one head, or two of half the width.
SIZES: dict[str, dict[int, dict[str, int]]] = {
    "gated_deltanet": {
        size: {"deltanet_key_heads": 1, "deltanet_value_heads": 1, "deltanet_key_dim": size // 32, "deltanet_value_dim": 32}
        for size in (256, 1024)
    },
    "mamba3": {
        size: {"mamba_heads": 1, "mamba_head_dim": 32, "mamba_state_dim": size // 32, "mamba_angles": size // 128}
        for size in (256, 1024)
    },
    "rodimus": {size: {"rodimus_channels": 64, "rodimus_state_dim": size // 64} for size in (256, 1024)},
    "atlas": {
        size: {"atlas_heads": 1, "atlas_head_dim": 8, "atlas_hidden": size // 16, "atlas_segment": 16, "atlas_degree": 1}
        for size in (256, 1024)
    },
    "gated_attention": {size: {"window": size // 64} for size in (256, 1024)},  # a key and a value of 32 for each
}  # fmt: skip


def variant(mixer: str, size: int) -> Variant:
    sizes = [f"model.{name}={value}" for name, value in SIZES[mixer][size].items()]
    return Variant(f"{mixer}, {size:,} numbers", (f'model.layers=["{mixer}","{mixer}"]', *sizes))


VARIANTS = {f"{mixer}-{size}": variant(mixer, size) for mixer, by_size in SIZES.items() for size in by_size}
CLAIMS = (
    *(
        Claim(f"a larger state lets {mixer} recall more", f"{mixer}-1024", f"{mixer}-256", "right-16", True)
        for mixer in SIZES
    ),
    *(
        Claim(f"gated_deltanet recalls more than {other} with as large a state", "gated_deltanet-1024", f"{other}-1024",
              "right-16", True)
        for other in SIZES if other != "gated_deltanet"
    ),
)  # fmt: skip


def measured(model: Any, source: Source, _recipe: Recipe) -> dict[str, float]:
    assert isinstance(source, Mqar)
    return {f"right-{found['pairs']}": found["right"] for found in source.evaluate(model)["settings"]}


def draw(axis: Any, runs: Sequence[Run]) -> None:
    for i, mixer in enumerate(SIZES):
        for size, style in zip(SIZES[mixer], (":", "-")):
            own = [by_seed(runs, f"{mixer}-{size}", f"right-{pairs}") for pairs in PAIRS]
            if own[0]:
                values = [[at[seed] for at in own] for seed in own[0]]
                draw_line(axis, PAIRS, values, VARIANTS[f"{mixer}-{size}"].title, f"C{i}", style)
    axis.set_xlabel("pairs")
    axis.set_ylabel("right answers")


COLUMNS = tuple(Column(f"{pairs} pairs", f"right-{pairs}") for pairs in PAIRS)
STUDY = Study("mqar", RECIPE, VARIANTS, CLAIMS, COLUMNS, measured, draw)

if __name__ == "__main__":
    STUDY.main(__doc__)
