"""What a looped dense model loses by stopping early, under each policy for the keys and values of loops that were not run.

    python docs/experiments/ouro/policies.py models/ouro-shakespeare --text shakespeare.txt

Every block of the held-out text is read from an empty past, once per policy and threshold of the exit gate; the loss is that
of all its positions. Differences are paired: block by block against full depth, with the standard error of their mean.
Fixed depths (`max_loops` lowered, all positions alike) stand beside them: what a gate has to beat.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.reading import stop_of
from rmse_edge.losses import token_loss
from rmse_edge.text import Tokenizer, consecutive_blocks, read_text, split

POLICIES = ("propagate", "repeat", "all")


def with_policy(model: Any, policy: str) -> Any:
    twin = type(model)(dataclasses.replace(model.config, kv_policy=policy)).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@torch.no_grad()
def read(model: Any, blocks: Tensor, dials: Dials) -> tuple[Tensor, float]:
    """Mean loss of each block (n, T + 1), nats, and the mean depth."""
    stop = stop_of(dials, lambda h: model.head(h)["logits"])
    losses, depths = [], []
    for part in blocks.split(16):
        states, _, depth = model.trajectory(part[:, :-1], dials.max_loops, stop, every=False)
        losses.append(token_loss(model.head(states[-1])["logits"], part[:, 1:]).mean(1))
        depths.append(depth.float().mean(1))
    return torch.cat(losses).double(), float(torch.cat(depths).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=64, help="of the held-out tenth, spread evenly")
    parser.add_argument("--thresholds", default="0.3,0.5,0.6,0.7,0.8,0.9,0.95")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_checkpoint(args.checkpoint)
    loops, length = model.config.max_loops, model.config.block_size
    ids = Tokenizer(args.checkpoint / "tokenizer.json").encode(read_text(args.text))
    every = torch.from_numpy(consecutive_blocks(split(torch.tensor(ids).numpy(), "validation"), length))
    blocks = every[torch.linspace(0, len(every) - 1, min(args.blocks, len(every))).long()]
    full, _ = read(model, blocks, Dials(loops))
    print(f"{blocks[:, 1:].numel()} positions, loss at full depth {float(full.mean()):.4f} nats\n")
    print("| rule | policy | mean loops | loops saved | loss, nats | difference (standard error) | relative |")
    print("|---|---|---|---|---|---|---|")

    def row(rule: str, policy: str, chosen: Any, dials: Dials) -> None:
        loss, depth = read(chosen, blocks, dials)
        change = loss - full
        error = float(change.std()) / len(change) ** 0.5
        print(
            f"| {rule} | {policy} | {depth:.2f} | {1 - depth / loops:.0%} | {float(loss.mean()):.4f} | "
            f"{float(change.mean()):+.4f} ({error:.4f}) | {float(change.mean() / full.mean()):+.2%} |",
            flush=True,
        )

    for depth in range(1, loops):
        row(f"fixed depth {depth}", "", model, Dials(depth))
    models = {policy: with_policy(model, policy) for policy in POLICIES}
    for threshold in map(float, args.thresholds.split(",")):
        for policy, chosen in models.items():
            row(f"gate {threshold}", policy, chosen, Dials(loops, exit_threshold=threshold))


if __name__ == "__main__":
    main()
