"""The time that a plan saves, and what the exit gate of a looped model makes of the same prompts.

    python docs/experiments/dr_llm/measure.py time PACKAGE --text TEXT [-n 32] [-r 5]
    python docs/experiments/dr_llm/measure.py brake OURO --text TEXT [--recipe routers.json]

`time`: PACKAGE continues a prompt of TEXT by n tokens at several settings of `--route`, one after the other in every round; medians over
rounds of the processor time of one thread. `brake`: OURO, a checkpoint with an exit gate and one token a character, reads the held-out prompts that `rmse-train --stage routers`
measures its routers on, at several thresholds: the loss of what follows, and the loops of it as a share of all.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import numpy as np

from rmse_edge.cli.display import table
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.plan import plan_of
from rmse_edge.runtimes import open_runtime
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.text import LoopRuntime
from rmse_edge.text import Tokenizer, consecutive_blocks, read_text, split
from rmse_edge.train.routing import RouterRecipe

ROUTES = (0.5, -0.5, -0.6, 1.0)
THRESHOLDS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)


def seconds(runtime: LoopRuntime, prompt: np.ndarray, dials: Dials, count: int) -> tuple[float, float]:
    """Processor time of the prompt, and of each of `count` tokens behind it: the machine may be shared."""
    runtime.reset()
    began = time.process_time()
    logits = runtime.feed(prompt, dials, "last").logits
    read = time.process_time()
    for _ in range(count):
        logits = runtime.feed([int(logits[-1].argmax())], dials, "last").logits
    return read - began, (time.process_time() - read) / count


def of_time(args: argparse.Namespace) -> None:
    runtime = open_runtime(args.model, threads=1)
    assert isinstance(runtime, LoopRuntime)
    ids = np.array(Tokenizer(args.tokenizer or args.model / "tokenizer.json").encode(read_text(args.text)))
    prompt = split(ids, "validation")[:48]
    settings = {route: dataclasses.replace(runtime.info.full_depth, route=route) for route in ROUTES}
    taken: dict[float, list[tuple[float, float]]] = {route: [] for route in settings}
    plans = {}
    for route, dials in settings.items():  # once before anything is measured
        seconds(runtime, prompt, dials, 2)
        plans[route] = len(plan_of(runtime.state["past_plan"]))
    for _ in range(args.rounds):
        for route, dials in settings.items():
            taken[route].append(seconds(runtime, prompt, dials, args.count))
    first = [statistics.median(t[i] for t in taken[ROUTES[0]]) for i in range(2)]
    rows = []
    for route, found in taken.items():
        read, each = (statistics.median(t[i] for t in found) for i in range(2))
        rows.append(
            [
                f"{route:g}",
                plans[route],
                f"{1000 * read:.2f}",
                f"{read / first[0]:.2f}",
                f"{1000 * each:.3f}",
                f"{each / first[1]:.2f}",
            ]
        )
    print(table(["route", "executions", "prompt, ms", "ratio", "token, ms", "ratio"], rows))


def of_brake(args: argparse.Namespace) -> None:
    recipe = RouterRecipe.from_file(args.recipe) if args.recipe else RouterRecipe()
    runtime = TorchRuntime.open(args.model)
    ids = np.array(Tokenizer(args.model / "tokenizer.json").encode(read_text(args.text)))
    texts = consecutive_blocks(split(ids, "validation"), recipe.prompt + recipe.answer - 1)[
        : args.prompts or recipe.held_out
    ]
    rows, base = [], None
    for threshold in THRESHOLDS:
        dials = Dials(runtime.info.trained_loops, exit_threshold=threshold)
        losses, loops = [], []
        for text in texts:
            runtime.reset()
            fed = runtime.feed(text[:-1], dials)
            logits = fed.logits[recipe.prompt - 1 :].astype(np.float64)
            log_p = (
                logits
                - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
                - logits.max(-1, keepdims=True)
            )
            losses.append(-log_p[np.arange(len(log_p)), text[recipe.prompt :]].mean())
            loops.append(fed.depth[recipe.prompt - 1 :].mean())
        found = np.array(losses)
        base = found if base is None else base
        difference = found - base
        rows.append([
            f"{threshold:g}", f"{np.mean(loops):.2f}", f"{np.mean(loops) / runtime.info.trained_loops:.0%}", f"{found.mean():.4f}",
            f"{difference.mean():+.4f} ({difference.std(ddof=1) / len(difference) ** 0.5:.4f})",
        ])  # fmt: skip
    print(table(["threshold", "loops", "share", "loss", "difference (standard error)"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("time", "brake"))
    parser.add_argument("model", type=Path, help="package, or checkpoint")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tokenizer", type=Path, help="default: the model's own")
    parser.add_argument("--recipe", type=Path, help="of the routers")
    parser.add_argument("--prompts", type=int, help="fewer than the recipe's")
    parser.add_argument("-n", "--count", type=int, default=32)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    args = parser.parse_args()
    {"time": of_time, "brake": of_brake}[args.what](args)


if __name__ == "__main__":
    main()
