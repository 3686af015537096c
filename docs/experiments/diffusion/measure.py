"""What denoising steps a model that writes by blocks can do without, and what its text is then worth.

    python docs/experiments/diffusion/measure.py BLOCKS ONE TEXT [--prompts 8] [-o results.json]

BLOCKS, a checkpoint, continues prompts of 48 tokens from the validation part of TEXT by four blocks, at settings of its dials.
ONE, a model of blocks of one token, which is an autoregressive model, says what it finds of each written text: its loss, in nats a
token. Text that repeats itself has a low loss, so the share of different runs of four tokens stands beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.cli.display import table
from rmse_edge.loop.dials import Dials
from rmse_edge.runtimes.engines.torch import TorchBlocks, open_writer
from rmse_edge.text import Tokenizer, read_text, split
from rmse_edge.train.diffusion import losses

PROMPT, BLOCKS = 48, 4


def settings(most: int) -> dict[str, Dials]:
    one = Dials(most)
    found = {"one token a step": one}
    found |= {f"{n} steps": dataclasses.replace(one, max_loops=n) for n in (8, 6, 4, 2) if n < most}
    found |= {f"confidence {p:g}": dataclasses.replace(one, exit_threshold=p) for p in (0.2, 0.3, 0.4, 0.5, 0.7, 0.9)}
    found |= {f"gap {g:g}": dataclasses.replace(one, exit_gap=g) for g in (0.25, 0.4, 0.5, 0.75, 1.0, 2.5)}
    return found


def runs(texts: np.ndarray) -> float:
    """The share of different runs of four tokens in each text (n, T), the mean over texts."""
    every = np.lib.stride_tricks.sliding_window_view(texts, 4, 1)
    return float(np.mean([len({tuple(run) for run in row}) / len(row) for row in every]))


@torch.no_grad()
def loss(judge: object, texts: np.ndarray) -> float:
    """What an autoregressive model says of what is behind the prompt in texts (n, T), nats a token."""
    tokens = torch.from_numpy(texts)
    everything = torch.ones_like(tokens)
    found = losses(judge, tokens, everything > 0, everything.float())
    return float(found[:, PROMPT - 1 :].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("blocks", type=Path, help="checkpoint")
    parser.add_argument("one", type=Path, help="checkpoint")
    parser.add_argument("text", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("-o", "--output", type=Path, help="also as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runtime = open_writer(args.blocks)
    assert isinstance(runtime, TorchBlocks)
    size, tokenizer = runtime.blocks.size, Tokenizer(args.blocks / "tokenizer.json")
    ids = split(np.array(tokenizer.encode(read_text(args.text))), "validation")
    length = PROMPT + BLOCKS * size
    starts = np.linspace(0, len(ids) - length, args.prompts).astype(int)
    given = np.stack([ids[s : s + length] for s in starts])
    count = len(starts) * BLOCKS
    written: dict[str, np.ndarray] = {}
    steps: dict[str, int] = {}
    for name, dials in settings(runtime.info.max_loops).items():
        texts, steps[name] = [], 0
        for start in given[:, :PROMPT]:
            runtime.reset()
            runtime.read(start)
            found = [runtime.write(dials) for _ in range(BLOCKS)]
            steps[name] += sum(b.iterations for b in found)
            texts.append(np.concatenate([start, *(b.tokens for b in found)]))
        written[name] = np.stack(texts)
    judge = load_checkpoint(args.one)
    first = next(iter(written.values()))
    rows = [
        {
            "setting": name,
            "tokens_per_step": count * size / steps[name],
            "tokens_per_forward": count * size / (steps[name] + count),
            "loss": loss(judge, texts),
            "runs": runs(texts[:, PROMPT:]),
            "same": float((texts == first)[:, PROMPT:].mean()),
        }
        for name, texts in written.items()
    ]
    real = {"loss": loss(judge, given), "runs": runs(given[:, PROMPT:])}
    head = ("setting", "tokens a step", "tokens a forward", "loss", "different runs of 4", "same tokens")
    cells = [
        (r["setting"], f"{r['tokens_per_step']:.2f}", f"{r['tokens_per_forward']:.2f}", f"{r['loss']:.2f}",
         f"{r['runs']:.0%}", f"{r['same']:.0%}")
        for r in rows
    ]  # fmt: skip
    print(table(head, [*cells, ("the text itself", "", "", f"{real['loss']:.2f}", f"{real['runs']:.0%}", "")]))
    if args.output:
        args.output.write_text(json.dumps({"real": real, "settings": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
