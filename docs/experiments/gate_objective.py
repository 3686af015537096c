"""Which objective should train the gate? Prints the loss at given mean depths for several, on a frozen model.

    rmse-train --text shakespeare.txt --recipe models/rmse-shakespeare/base-recipe.json -o runs/mine --stop-at 1500
    python docs/experiments/gate_objective.py runs/mine --text shakespeare.txt

Every objective trains a linear gate on the states of training blocks; validation blocks then give loss against mean depth
over brake thresholds. Everything is computed and the exit's state picked afterwards, so the KV rule plays no part.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.loop.stop import exit_distribution
from rmse_edge.text import Tokenizer, consecutive_blocks, read_text, split
from rmse_edge.train.losses import cross_entropies, gate_loss
from rmse_edge.train.recipe import Recipe

DEPTHS = (2, 3, 4, 6)
ROWS, LR = 1024, 1e-2


def states(model: RMSE, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Normed states (K, n, d) and losses (K, n) of all positions after every loop."""
    hs, ls = [], []
    with torch.no_grad():
        for part in blocks.split(8):
            trajectory = model.trajectory(part[:, :-1])[0]
            hs.append(torch.stack(trajectory).flatten(1, 2))
            ls.append(cross_entropies(model, trajectory, part[:, 1:]).flatten(1))
    return torch.cat(hs, 1), torch.cat(ls, 1)


def frontier(gate: nn.Module, h: Tensor, losses: Tensor) -> np.ndarray:
    """(mean depth, loss, sd of depth) for brake thresholds from 0.02 to 0.999, ascending by depth."""
    with torch.no_grad():
        brake = 1 - (-F.softplus(gate(h).squeeze(-1))).cumsum(0).exp()
    rows = []
    for threshold in np.concatenate([np.linspace(0.02, 0.98, 49), [0.99, 0.995, 0.999]]):
        stop = brake >= threshold
        stop[-1] = True
        depth = stop.int().argmax(0)
        rows.append((depth.double().mean() + 1, losses.gather(0, depth[None]).mean(), depth.double().std()))
    return np.array(sorted(tuple(map(float, row)) for row in rows))


def labels(losses: Tensor, kind: str, sharpness: float = 50.0, margin: float = 0.005) -> Tensor:
    """The label of "continue" at every loop but the last: sigmoid(sharpness * (improvement - margin))."""
    before = torch.cat([losses[:1] + 1, losses[:-1]])
    improvement = {
        "just made (Ouro)": before - losses,
        "of the next loop": losses[:-1] - losses[1:],
        "still to come": losses[:-1] - losses[-1:],
    }[kind][: len(losses) - 1]
    return torch.sigmoid(sharpness * (improvement - margin))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a training folder with training-state.pt")
    parser.add_argument("--text", required=True)
    parser.add_argument("--blocks", type=int, default=64, help="of each split")
    parser.add_argument("--steps", type=int, default=600, help="of training a gate")
    args = parser.parse_args()
    state = torch.load(args.run / "training-state.pt", map_location="cpu", weights_only=True)
    config = Recipe.from_file(args.run / "recipe.json").model_config()
    model = RMSE(config)  # type: ignore[arg-type]
    model.load_state_dict(state["best_weights"] or state["average"])
    model.eval()
    ids = np.array(Tokenizer(args.run / "tokenizer.json").encode(read_text(args.text)))

    def sample(name: str) -> tuple[Tensor, Tensor]:
        blocks = torch.from_numpy(consecutive_blocks(split(ids, name), config.block_size))
        return states(model, blocks[np.linspace(0, len(blocks) - 1, args.blocks).astype(int)])

    (h, losses), (h_val, losses_val) = sample("train"), sample("validation")
    fixed = losses_val.mean(1).numpy()
    loops = np.arange(1, len(fixed) + 1)
    print("fixed depths: " + " ".join(f"{x:.4f}" for x in fixed))
    print("gate | " + " | ".join(f"loss at {d} (gain, sd)" for d in DEPTHS))

    def show(name: str, gate: nn.Module) -> None:
        depth, loss, sd = frontier(gate, h_val, losses_val).T
        cells = []
        for d in DEPTHS:
            here = np.interp(d, depth, loss)
            cells.append(f"{here:.4f} ({np.interp(d, loops, fixed) - here:+.4f}, {np.interp(d, depth, sd):.1f})")
        print(f"{name} | " + " | ".join(cells), flush=True)

    show("as stage 1 left it", model.gate)
    objectives = {
        f"priced, {c:g} per loop": (lambda z, j, c=c: gate_loss(losses[:, j], z, c)) for c in (0.01, 0.02, 0.03)
    }
    for kind in ("just made (Ouro)", "of the next loop", "still to come"):
        goal = labels(losses, kind)
        objectives[f"labelled by the improvement {kind}"] = lambda z, j, goal=goal: F.binary_cross_entropy_with_logits(
            -z[:-1], goal[:, j]
        )
    for name, objective in objectives.items():
        torch.manual_seed(0)
        gate = nn.Linear(config.d_model, 1)
        gate.load_state_dict(model.gate.state_dict())
        optimizer = torch.optim.Adam(gate.parameters(), lr=LR)
        for step in range(args.steps):
            optimizer.param_groups[0]["lr"] = LR * (1 - step / args.steps)
            rows = torch.randint(0, h.shape[1], (ROWS,))
            optimizer.zero_grad()
            objective(gate(h[:, rows]).squeeze(-1), rows).backward()
            optimizer.step()
        show(name, gate)
    p = exit_distribution(model.gate(h_val).squeeze(-1).detach()).mean(1)
    print("exit distribution of stage 1: " + " ".join(f"{x:.3f}" for x in p))


if __name__ == "__main__":
    main()
