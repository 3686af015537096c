"""Which experts a model uses, token by token and loop by loop, while it reads held-out text.

    python docs/experiments/offload/record.py models/rmse-shakespeare --text shakespeare.txt -o exits.npz
    python docs/experiments/offload/record.py models/rmse-shakespeare --text shakespeare.txt -o full.npz --exit-threshold 1

Writes arrays for T tokens, K loops and A experts per token: `experts` (T, K, A), -1 in loops that a token did not run; two guesses
of what loop k + 1 will use, (T, K, A) each, made from the state that entered loop k: `ahead` by the router of loop k + 1, `drift` by
the scores of loop k, moved as scores moved on average from loop k to k + 1 in the calls before; and `depth` (T,). It also
prints what the choice of a policy rests on: how much loops share, and how uneven the experts are used.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from rmse_edge.layers.experts import Routing, SparseExperts, best
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.text import Tokenizer, read_text, split

ROWS = 64  # of a call


def record(runtime: TorchRuntime, ids: np.ndarray, exit_threshold: float | None) -> dict[str, np.ndarray]:
    """The arrays of the module's docstring, of whole calls."""
    layers = [m for m in runtime.model.modules() if isinstance(m, SparseExperts)]
    if len(layers) != 1:
        raise SystemExit(f"expected a model with one layer of routed experts, got {len(layers)}")
    (layer,) = layers
    loops, seen = runtime.info.max_loops, []
    experts = np.full((len(ids), loops, layer.top_k), -1, np.int16)
    ahead, drift = experts.copy(), experts.copy()
    moved, pairs = torch.zeros(loops, layer.n_experts, dtype=torch.float64), torch.zeros(loops, 1)
    layer.observer = lambda k, routing: seen.append((k, routing))
    dials = runtime.info.dials if exit_threshold is None else replace(runtime.info.dials, exit_threshold=exit_threshold)
    depth = np.zeros(len(ids), np.int64)
    for start in range(0, len(ids), ROWS):
        seen.clear()
        here = slice(start, start + ROWS)
        depth[here] = runtime.feed(ids[here], dials, logits="last").depth
        scores = [layer.weighed(routing.logits)[1].detach() for _, routing in seen]
        for k, routing in seen:
            rows = np.flatnonzero(depth[here] > k) + start
            experts[rows, k] = routing.experts.numpy()[rows - start]
            ahead[rows, k] = next_loop(layer, routing, k).numpy()[rows - start]
            shifted = scores[k] + (moved[k] / pairs[k].clamp(min=1)).float()
            drift[rows, k] = best(shifted, layer.top_k).numpy()[rows - start]
        for k in range(len(scores) - 1):
            both = torch.from_numpy(depth[here] > k + 1)
            moved[k] += (scores[k + 1] - scores[k])[both].sum(0)
            pairs[k] += both.sum()
    return {"experts": experts, "ahead": ahead, "drift": drift, "depth": depth}


@torch.inference_mode()
def next_loop(layer: SparseExperts, routing: Routing, k: int) -> torch.Tensor:
    """What the router of loop k + 1 would choose for the same rows."""
    logits = routing.logits
    if layer.tells_loops and k + 1 < len(layer.step_logits):
        logits = logits - layer.step_logits[k] + layer.step_logits[k + 1]
    return best(layer.weighed(logits)[1], layer.top_k)


def facts(experts: np.ndarray, depth: np.ndarray, count: int) -> str:
    """What two neighbouring loops, two neighbouring tokens, and all tokens have in common."""
    used = np.zeros((*experts.shape[:2], count), bool)
    tokens, loops, _ = np.nonzero(experts >= 0)
    used[tokens, loops, experts[experts >= 0]] = True
    top = experts.shape[2]
    ran = experts[:, :, 0] >= 0
    both = ran[:, 1:] & ran[:, :-1]
    loop_share = (used[:, 1:] & used[:, :-1]).sum(-1)[both].mean() / top
    token_share = (used[1:] & used[:-1]).sum(-1)[ran[1:] & ran[:-1]].mean() / top
    distinct = used.any(1).sum(-1).mean()
    of_calls = np.mean([used[start : start + ROWS].any((0, 1)).sum() for start in range(0, len(used), ROWS)])
    load = np.sort(used.sum((0, 1)))[::-1]
    quarter = load[: count // 4].sum() / load.sum()
    per_loop = []
    for k in range(experts.shape[1]):
        mine = np.sort(used[:, k].sum(0))[::-1]
        if ran[:, k].sum() >= count:  # of loops that enough tokens ran
            per_loop.append(mine[: count // 4].sum() / mine.sum())
    return (
        f"{len(experts)} tokens, {depth.mean():.2f} loops on average\n"
        f"of a loop's {top} experts, the loop before used {100 * loop_share:.1f} %, "
        f"the token before in the same loop {100 * token_share:.1f} %\n"
        f"{distinct:.1f} different experts per token, {of_calls:.1f} of {count} per call of {ROWS}\n"
        f"the {count // 4} busiest of {count} experts take {100 * quarter:.1f} % of all uses, the busiest of each loop "
        f"{100 * min(per_loop):.1f} to {100 * max(per_loop):.1f} % of that loop's"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="from the beginning of the held-out tenth")
    parser.add_argument("--exit-threshold", type=float, help="1: every token runs every loop")
    args = parser.parse_args()
    runtime = TorchRuntime.open(args.checkpoint)
    ids = split(Tokenizer(args.checkpoint / "tokenizer.json").encode(read_text(args.text)), "validation")
    ids = ids[: min(args.tokens, len(ids)) // ROWS * ROWS]
    trace = record(runtime, ids, args.exit_threshold)
    (layer,) = (m for m in runtime.model.modules() if isinstance(m, SparseExperts))
    np.savez_compressed(args.output, count=layer.n_experts, **trace)
    print(facts(trace["experts"], trace["depth"], layer.n_experts))


if __name__ == "__main__":
    main()
