"""What a looped model loses by stopping early, under each policy for the keys and values of loops that were not run, and what
a token of context then costs.

    python docs/experiments/exits/policies.py models/ouro-shakespeare --text shakespeare.txt
    python docs/experiments/exits/policies.py runs/dory --text shakespeare.txt --rule exit-kl=0.003,0.01,0.03,0.1

Every block of the held-out text is read from an empty past, once per policy and value of the rule's dial; the loss is that of
all its positions. Differences are paired: block by block against full depth, with the standard error of their mean. Fixed
depths (`max_loops` lowered, all positions alike) stand beside them: what a rule has to beat. The second table has the types
that a cache may keep, at full depth and at one value of the dial, with bytes per token of context; those of int8 are
calibrated on the same number of blocks of the text's first nine tenths.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.cli.evaluate import rule_and_values
from rmse_edge.errors import ConfigError
from rmse_edge.info import State
from rmse_edge.layers.cache import with_cache_dtype
from rmse_edge.layers.stack import KvPolicy
from rmse_edge.loop.contract import Append
from rmse_edge.loop.dials import Dials
from rmse_edge.losses import token_loss
from rmse_edge.numbers import KvDtype
from rmse_edge.quantize.kv_scales import with_int8_cache
from rmse_edge.quantize.reader import text_length
from rmse_edge.text import Tokenizer, consecutive_blocks, read_text, split


def with_policies(model: Any) -> dict[str, Any]:
    """The model with each policy that its architecture has."""
    found = {}
    for policy in get_args(KvPolicy):
        try:
            config = dataclasses.replace(model.config, kv_policy=policy)
        except ConfigError:
            continue
        found[policy] = type(model)(config).eval()
        found[policy].load_state_dict(model.state_dict())
    return found


def token_bytes(model: Any) -> int:
    """Bytes that a token of context takes in what is kept between calls."""
    kept = [s for s in model.spec(1).state if isinstance(s.update, Append)]
    return sum(State.of(s).nbytes(2) - State.of(s).nbytes(1) for s in kept)


def read(model: Any, blocks: Tensor, dials: Dials) -> tuple[Tensor, float]:
    """Mean loss of each block (n, T + 1), nats, and the mean depth."""
    arrays = dials.arrays()
    scalars = {name: torch.from_numpy(arrays[name]) for name in model.spec(1).dials}
    said = [model.whole_text(block[:-1], scalars) for block in blocks]
    losses = [token_loss(found.logits, block[1:]).mean() for found, block in zip(said, blocks)]
    return torch.stack(losses).double(), float(torch.stack([found.depth for found in said]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=64, help="of the held-out tenth, spread evenly")
    parser.add_argument(
        "--rule", type=rule_and_values, default=("exit_threshold", (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)),
        metavar="DIAL=V,V,...", help="the exit rule's dial and its values (default: exit-threshold, 0.3 to 0.95)",
    )  # fmt: skip
    args = parser.parse_args()
    rule, values = args.rule
    if not values:
        parser.error("--rule: expected values, DIAL=V,V,...")
    torch.set_num_threads(1)
    model = load_checkpoint(args.checkpoint)
    loops, length = model.config.dials.max_loops, text_length(model)
    ids = torch.tensor(Tokenizer(args.checkpoint / "tokenizer.json").encode(read_text(args.text))).numpy()

    def blocks_of(part: str) -> Tensor:
        every = torch.from_numpy(consecutive_blocks(split(ids, part), length))
        return every[torch.linspace(0, len(every) - 1, min(args.blocks, len(every))).long()]

    blocks = blocks_of("validation")
    full, _ = read(model, blocks, Dials(loops))
    print(f"{blocks[:, 1:].numel()} positions, loss at full depth {float(full.mean()):.4f} nats\n")

    def row(cells: str, chosen: Any, dials: Dials) -> None:
        loss, depth = read(chosen, blocks, dials)
        change = loss - full
        error = float(change.std()) / len(change) ** 0.5
        print(
            f"| {cells} | {depth:.2f} | {1 - depth / loops:.0%} | {float(loss.mean()):.4f} | "
            f"{float(change.mean()):+.4f} ({error:.4f}) | {float(change.mean() / full.mean()):+.2%} |",
            flush=True,
        )

    columns = "mean loops | loops saved | loss, nats | difference (standard error) | relative |"
    label = rule.removeprefix("exit_").replace("threshold", "gate").replace("_", " ")
    print(f"| rule | policy | {columns}\n|---|---|---|---|---|---|---|")
    for depth in range(1, loops):
        row(f"fixed depth {depth} | ", model, Dials(depth))
    models = with_policies(model)
    for value in values:
        for policy, chosen in models.items():
            row(f"{label} {value} | {policy}", chosen, Dials(loops, **{rule: value}))

    value = values[len(values) // 2]
    print(f"\n| cache | bytes per token | rule | {columns}\n|---|---|---|---|---|---|---|---|")
    for dtype in get_args(KvDtype):
        chosen = (
            with_int8_cache(model, blocks_of("train")[:, :-1]) if dtype == "int8" else with_cache_dtype(model, dtype)
        )
        for name, dials in (("full depth", Dials(loops)), (f"{label} {value}", Dials(loops, **{rule: value}))):
            row(f"{dtype} | {token_bytes(chosen):,} | {name}", chosen, dials)


if __name__ == "__main__":
    main()
