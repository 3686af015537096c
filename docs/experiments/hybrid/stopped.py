"""What a stopped position leaves to deeper loops: three ways, trained alike at a small size. Prints tables of verdicts, and costs.

    python docs/experiments/hybrid/stopped.py --text shakespeare.txt

- every loop: each loop has states of its own, and those of deeper loops absorb what a position had when it stopped;
- outside: recurrences stand before and behind the loop, attention in it;
- one state: all loops read one state, which takes in each position once, with what it had when it stopped.

All have three layers, two of Gated DeltaNet and one of windowed attention, of which one is looped up to three times; a step's loops are
drawn from 1 to 3. The third is computed position by position, in training too, since a position reads what those before it stopped
with. Positions stop by the change of their state; the value of the dial is the one at which, on a block of the training text in
each hundred, half of the positions take two loops at most. Costs are those of one token in operations of matrix products: of
one loop, and of absorbing what a position left into the states of all loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from study import BLOCKS, Claim, Column, Run, Study, Variant, by_seed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rmse_edge.arch.common.hybrid_model import HybridModel
from rmse_edge.layers.mixers.base import Call
from rmse_edge.layers.mixers.stack import MixerStack, of_call
from rmse_edge.loop.contract import Ring, Tensors
from rmse_edge.loop.course import Stop, Watcher
from rmse_edge.loop.drive import run_loop
from rmse_edge.losses import token_loss
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.sources import Batch, Source, TextSource

LOOPS = 3
COSTS = 64  # the width at which costs are counted

RECIPE = {
    "architecture": "hybrid",
    "model": {
        "vocab_size": 65, "d_model": 32, "layers": ["gated_attention", "gated_deltanet", "gated_deltanet"], "think": [1, 2],
        "think_loops": LOOPS, "intermediate_size": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rotary_dims": 4,
        "window": 4, "deltanet_key_heads": 4, "deltanet_value_heads": 4, "deltanet_key_dim": 8, "deltanet_value_dim": 8,
        "exit_rules": ["delta"],
    },
    "block_size": 16, "batch_size": 32, "objective": "last", "depths": [1, 2, 3], "steps": 100, "gate_steps": 0,
    "exit_steps": 0, "lr": 0.01, "warmup": 10, "ema": 0.95, "eval_every": 100, "eval_blocks": 16, "precision": "fp32",
}  # fmt: skip


def change(before: Tensor, after: Tensor) -> Tensor:
    """(B, T): what `exit_epsilon` is compared with."""
    return (after - before).norm(dim=-1) / after.norm(dim=-1)


def by_one_state(
    model: HybridModel,
    tokens: Tensor,
    loops: int | None = None,
    stop: Stop | None = None,
    every: bool = True,
    watcher: Watcher | None = None,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """As `HybridModel.trajectory` of a model without a gate, where all loops read one state; position by position."""
    loops = LOOPS if loops is None else loops
    x0 = model.encoder(model.embed_tokens(tokens), 0, None, model._of_sequences(tokens))[0]
    first = model.config.sections[1].start
    stack = MixerStack(model.core.layers, first)  # type: ignore[arg-type]
    batch = len(tokens)
    specs = stack.state(1, "prelude")
    past: Tensors = {s.name: x0.new_zeros(batch, *s.shape[1:]) for s in specs}
    slotted = {s.name: s.update.source for s in specs if isinstance(s.update, Ring)}
    found: list[list[Tensor]] = [[] for _ in range(loops)]
    depths = []
    for t in range(tokens.shape[1]):
        position, n_valid = torch.full((batch,), t), torch.ones(batch, dtype=torch.int64)
        call = Call(position, n_valid, of_call((stack,), {"position": position, "n_valid": n_valid}, 1))
        h = x0[:, t : t + 1]
        active = torch.ones(batch, 1, dtype=torch.bool)
        depth = torch.zeros(batch, 1, dtype=torch.int64)
        left: Tensors = {}
        for k in range(loops):
            after, rows, states = stack(h, 0, past, call)
            new = rows | states
            # Rows and states have the batch first: of what stopped, those of its last loop.
            left = {n: _where(active, v, left[n]) if left else v for n, v in new.items()}
            before, h = h, torch.where(active.unsqueeze(-1), after, h)
            found[k].append(h)
            depth = depth + active
            if stop is not None:
                active = active & ~stop(k, before, h, torch.zeros_like(depth, dtype=h.dtype))
        depths.append(depth)
        for name, old in past.items():
            if name in slotted:
                slot = torch.arange(old.shape[-2]) == t % old.shape[-2]
                past[name] = torch.where(slot[:, None], left[slotted[name]], old)
            else:
                past[name] = left[name.removeprefix("past_")]
    states = [torch.cat(of_loop, 1) for of_loop in found]
    return states if every else states[-1:], x0.new_zeros(loops, *tokens.shape), torch.cat(depths, 1)


def _where(active: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(active.reshape(-1, *[1] * (new.dim() - 1)), new, old)


def share_state(model: Any) -> None:
    model.trajectory = partial(by_one_state, model)


VARIANTS = {
    "every": Variant("every loop"),
    "outside": Variant("outside", ('model.layers=["gated_deltanet","gated_attention","gated_deltanet"]',)),
    "one": Variant("one state", change=share_state),
}
CLAIMS = (
    Claim(
        "states of every loop are better than recurrences outside the loop, all loops run", "every", "outside", "loss"
    ),
    Claim("they are, where positions stop", "every", "outside", "stopped"),
    Claim("states of every loop are better than one state, all loops run", "every", "one", "loss"),
    Claim("they are, where positions stop", "every", "one", "stopped"),
)
COLUMNS = (
    *(Column(f"loss after {k}", f"loss-{k}") for k in range(1, LOOPS)),
    Column(f"after {LOOPS}, nats", "loss"),
    Column("where positions stop", "stopped"),
    Column("mean loops", "depth", "{:.2f}"),
    Column("one loop", "loop_cost", "{:,.0f}"),
    Column("absorbing", "absorbing_cost", "{:,.0f}"),
)


def loss_of_states(model: Any, h: Tensor, batch: Batch) -> float:
    return float(token_loss(model.read_out(h), batch["targets"]).mean())


@torch.no_grad()
def measured(model: Any, source: Source, recipe: Recipe) -> dict[str, float]:
    assert isinstance(source, TextSource)
    batch, seen = source.validation(BLOCKS), source.batch(BLOCKS, (1,))
    states = model.trajectory(seen["tokens"])[0]
    epsilon = float(
        change(states[0], states[1]).median()
    )  # half of the positions stop after the second loop, at the latest

    def stop(k: int, before: Tensor, after: Tensor, log_survival: Tensor) -> Tensor:
        return change(before, after) < epsilon

    full = [loss_of_states(model, h, batch) for h in model.trajectory(batch["tokens"])[0]]
    stopped, _, depth = model.trajectory(batch["tokens"], stop=stop)
    found = {f"loss-{k}": loss for k, loss in enumerate(full, 1)} | {"loss": full[-1]}
    found |= {"stopped": loss_of_states(model, stopped[-1], batch), "depth": float(depth.float().mean())}
    loop, absorbing = cost(recipe)
    if "trajectory" in vars(model):  # one state, which takes a position in once
        absorbing /= LOOPS
    return found | {"loop_cost": loop, "absorbing_cost": absorbing}


@torch.no_grad()
def cost(recipe: Recipe) -> tuple[float, float]:
    """Operations of products of one token, at a width of `COSTS`: of one loop, and of what `commit` adds for all loops."""
    head = COSTS // 4
    sizes = {
        name: head for name in ("head_dim", "deltanet_key_dim", "deltanet_value_dim")
    } | {"d_model": COSTS, "intermediate_size": 2 * COSTS, "rotary_dims": head // 2, "window": 16}  # fmt: skip
    model = HybridModel(type(recipe.model_config()).from_dict({**recipe.model, **sizes})).eval()
    spec = model.spec(1)
    tensors = {s.name: s.zeros() for s in spec.state} | model.angles_of(1)
    tensors |= {
        "tokens": torch.zeros(1, 1, dtype=torch.int64),
        "position": torch.tensor([40]),
        "n_valid": torch.tensor([1]),
    }
    tensors |= model.prelude(tensors)
    counted = []
    for loops in (1, 2):
        dials = {"max_loops": torch.tensor(loops), "min_loops": torch.tensor(1), "exit_epsilon": torch.tensor(0.0)}
        with FlopCounterMode(display=False) as counter:
            found = run_loop(model, spec, tensors, dials)
        counted.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        model.commit(tensors | found)
    return float(counted[1] - counted[0]), float(counter.get_total_flops())


def draw(axis: Any, runs: Sequence[Run]) -> None:
    for name, variant in VARIANTS.items():
        for measure, style in (("loss", "o"), ("stopped", "x")):
            found, loops = by_seed(runs, name, measure), by_seed(runs, name, "depth")
            color = f"C{list(VARIANTS).index(name)}"
            at = [loops[seed] if measure == "stopped" else LOOPS for seed in found]
            axis.plot(at, list(found.values()), style, color=color, label=f"{variant.title}, {measure}")
    axis.set_xlabel("mean loops of a position")
    axis.set_ylabel("validation loss, nats")


STUDY = Study("stopped", RECIPE, VARIANTS, CLAIMS, COLUMNS, measured, draw, text=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
