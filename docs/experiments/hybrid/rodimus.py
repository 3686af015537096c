"""What the parts of Rodimus bring at a small size: its temperature, the gate of its values, the two hops of Rodimus+.

    python docs/experiments/hybrid/rodimus.py --text shakespeare.txt

Two layers are trained on characters, alike but for one part, which stands still: a temperature tau of 1 leaves the input gate
to decay alone (arXiv 2410.06577, section 3.2); a gate of 1 takes values as they are; without the two hops what the attention of
Rodimus+ finds is added to the stream like anything else. Parts keep their weights, so sizes are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from study import Claim, Column, Run, Study, Variant, by_seed, loss_of
from torch import nn

from rmse_edge.layers.mixers.rodimus import Rodimus
from rmse_edge.layers.mixers.stack import MixerLayer
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.sources import Source

OPEN = 30.0  # its sigmoid is 1 in float32, and has no gradient

RECIPE = {
    "architecture": "hybrid",
    "model": {
        "vocab_size": 65, "d_model": 48, "layers": ["rodimus", "rodimus"], "rodimus_channels": 96, "rodimus_state_dim": 8,
        "rodimus_gate_rank": 16, "n_heads": 3, "head_dim": 16, "n_kv_heads": 3, "rotary_dims": 16, "shared_key_window": 8,
        "intermediate_size": 128, "exit_rules": [],
    },
    "block_size": 32, "batch_size": 16, "objective": "last", "depths": [1], "steps": 150, "gate_steps": 0, "exit_steps": 0,
    "lr": 0.01, "warmup": 15, "ema": 0.95, "eval_every": 75, "eval_blocks": 16, "precision": "fp32",
}  # fmt: skip


def each(kind: type, model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def open_gate(matrix: nn.Linear, rows: slice) -> None:
    matrix.weight[rows] = 0.0
    matrix.bias[rows] = OPEN


def fix_temperature(model: Any) -> None:
    for mixer in each(Rodimus, model):
        open_gate(mixer.selection_proj, slice(mixer.state_dim, None))  # of tau


def open_values(model: Any) -> None:
    for mixer in each(Rodimus, model):
        open_gate(mixer.value_up_proj, slice(None))


def one_hop(model: Any) -> None:
    for layer in each(MixerLayer, model):
        layer.two_hop = False


PLUS = ('model.layers=["rodimus_plus","rodimus_plus"]',)
VARIANTS = {
    "rodimus": Variant("Rodimus"),
    "tau": Variant("Rodimus, tau = 1", change=fix_temperature),
    "values": Variant("Rodimus, values without their gate", change=open_values),
    "plus": Variant("Rodimus+", PLUS),
    "one-hop": Variant("Rodimus+ with one hop", PLUS, one_hop),
}
CLAIMS = (
    Claim("a temperature that is selected is better than one of 1", "rodimus", "tau", "loss"),
    Claim("a gate of values is better than none", "rodimus", "values", "loss"),
    Claim("two hops are better than one", "plus", "one-hop", "loss"),
    Claim("attention to a window makes Rodimus better", "plus", "rodimus", "loss"),
)


def measured(model: Any, source: Source, _recipe: Recipe) -> dict[str, float]:
    return {"loss": loss_of(model, source)}


def draw(axis: Any, runs: Sequence[Run]) -> None:
    for i, (name, variant) in enumerate(VARIANTS.items()):
        losses = list(by_seed(runs, name, "loss").values())
        axis.plot([i] * len(losses), losses, "o", label=variant.title)
    axis.set_xticks([])
    axis.set_ylabel("validation loss, nats")


STUDY = Study(
    "rodimus", RECIPE, VARIANTS, CLAIMS, (Column("validation loss, nats", "loss"),), measured, draw, text=True
)

if __name__ == "__main__":
    STUDY.main(__doc__)
