"""What a stopped position leaves to deeper loops: three ways, trained and measured at a small size.

    python docs/experiments/hybrid/stopped.py --text shakespeare.txt

- every loop: each loop has states of its own, and those of deeper loops absorb what a position had when it stopped;
- outside: recurrences stand before and behind the loop, attention in it;
- one state: all loops read one state, which takes in each position once, with what it had when it stopped.

All have three layers, two of Gated DeltaNet and one of windowed attention, of which one is looped, and are trained alike on blocks of
characters: the mean loss after every loop. The third is computed position by position, in training too, since a position reads
what those before it stopped with. Positions stop by the change of their state; the value of the dial is the one at which, on
the training text, half of the positions take fewer loops.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rmse_edge.arch.common.hybrid_model import HybridModel
from rmse_edge.arch.hybrid.config import HybridConfig
from rmse_edge.layers.mixers.base import Call
from rmse_edge.layers.mixers.stack import MixerStack, of_call
from rmse_edge.loop.contract import Ring, Tensors
from rmse_edge.loop.drive import run_loop
from rmse_edge.text import consecutive_blocks, random_blocks, read_text, split

GDN, ATTENTION = "gated_deltanet", "gated_attention"
LAYERS = {
    "every loop": (ATTENTION, GDN, GDN),
    "outside": (GDN, ATTENTION, GDN),
    "one state": (ATTENTION, GDN, GDN),
}
LOOPS, HELD_OUT = 3, 128  # blocks that are measured
Epsilon = float


def build(layers: tuple[str, ...], vocab: int, width: int) -> HybridModel:
    head = width // 4
    config = HybridConfig(
        vocab_size=vocab, d_model=width, layers=layers, think=(1, 2), think_loops=LOOPS, intermediate_size=2 * width,
        n_heads=4, n_kv_heads=2, head_dim=head, rotary_dims=head // 2, window=16, max_position_embeddings=4096,
        deltanet_key_heads=4, deltanet_value_heads=4, deltanet_key_dim=head, deltanet_value_dim=head,
        exit_rules=("delta",),
    )  # fmt: skip
    return HybridModel(config)


def change(before: Tensor, after: Tensor) -> Tensor:
    """(B, T): what `exit_epsilon` is compared with."""
    return (after - before).norm(dim=-1) / after.norm(dim=-1)


def by_loops(model: HybridModel, tokens: Tensor, epsilon: Epsilon) -> tuple[list[Tensor], Tensor]:
    """(states (B, T, d) after every loop, depth (B, T)) where each loop has states of its own."""

    def stop(k: int, before: Tensor, after: Tensor, log_survival: Tensor) -> Tensor:
        return change(before, after) < epsilon

    states, _, depth = model.trajectory(tokens, stop=stop if epsilon else None)
    return states, depth


def by_one_state(model: HybridModel, tokens: Tensor, epsilon: Epsilon) -> tuple[list[Tensor], Tensor]:
    """The same where all loops read one state; position by position."""
    x0 = model.encoder(model.embed_tokens(tokens), 0, None, model._of_sequences(tokens))[0]
    first = model.config.sections[1].start
    stack = MixerStack(model.core.layers, first)  # type: ignore[arg-type]
    batch = len(tokens)
    specs = stack.state(1, "prelude")
    past: Tensors = {s.name: x0.new_zeros(batch, *s.shape[1:]) for s in specs}
    slotted = {s.name: s.update.source for s in specs if isinstance(s.update, Ring)}
    found: list[list[Tensor]] = [[] for _ in range(LOOPS)]
    depths = []
    for t in range(tokens.shape[1]):
        position, n_valid = torch.full((batch,), t), torch.ones(batch, dtype=torch.int64)
        call = Call(position, n_valid, of_call((stack,), {"position": position, "n_valid": n_valid}, 1))
        h = x0[:, t : t + 1]
        active = torch.ones(batch, 1, dtype=torch.bool)
        depth = torch.zeros(batch, 1, dtype=torch.int64)
        left: Tensors = {}
        for k in range(LOOPS):
            after, rows, states = stack(h, 0, past, call)
            new = rows | states
            # Rows and states have the batch first: of what stopped, those of its last loop.
            left = {n: _where(active, v, left[n]) if left else v for n, v in new.items()}
            before, h = h, torch.where(active.unsqueeze(-1), after, h)
            found[k].append(h)
            depth = depth + active
            active = active & ~(change(before, h) < epsilon)
        depths.append(depth)
        for name, old in past.items():
            if name in slotted:
                slot = torch.arange(old.shape[-2]) == t % old.shape[-2]
                past[name] = torch.where(slot[:, None], left[slotted[name]], old)
            else:
                past[name] = left[name.removeprefix("past_")]
    return [torch.cat(states, 1) for states in found], torch.cat(depths, 1)


def _where(active: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(active.reshape(-1, *[1] * (new.dim() - 1)), new, old)


Read = Callable[[HybridModel, Tensor, Epsilon], tuple[list[Tensor], Tensor]]
READ: dict[str, Read] = {"every loop": by_loops, "outside": by_loops, "one state": by_one_state}


def loss_of(model: HybridModel, states: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model.read_out(states).flatten(0, 1), targets.flatten())


def trained(name: str, seed: int, ids: Tensor, vocab: int, args: argparse.Namespace) -> HybridModel:
    torch.manual_seed(seed)
    model = build(LAYERS[name], vocab, args.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
    for step in range(args.steps):
        block = torch.from_numpy(random_blocks(ids.numpy(), args.batch, args.length, (seed, step)))
        states, _ = READ[name](model, block[:, :-1], 0.0)
        loss = torch.stack([loss_of(model, h, block[:, 1:]) for h in states]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def measured(name: str, model: HybridModel, blocks: Tensor, seen: Tensor) -> dict[str, float]:
    tokens, targets = blocks[:, :-1], blocks[:, 1:]
    states, _ = READ[name](model, seen[:, :-1], 0.0)
    epsilon = float(
        change(states[0], states[1]).median()
    )  # half of the positions stop after the second loop, at the latest
    full, _ = READ[name](model, tokens, 0.0)
    stopped, depth = READ[name](model, tokens, epsilon)
    found = {f"loss {k}": float(loss_of(model, h, targets)) for k, h in enumerate(full, 1)}
    return found | {"stopped": float(loss_of(model, stopped[-1], targets)), "depth": float(depth.float().mean())}


@torch.no_grad()
def cost(layers: tuple[str, ...], vocab: int, width: int) -> tuple[float, float]:
    """Products of one token, in thousands of operations: of one loop, and of what `commit` adds for all loops."""
    model = build(layers, vocab, width).eval()
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
    return (counted[1] - counted[0]) / 1e3, counter.get_total_flops() / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default=",".join(LAYERS), help="names, separated by commas")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--length", type=int, default=32, help="of a block")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=4e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = read_text(args.text)
    letters = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([letters[c] for c in text])
    train = torch.from_numpy(split(ids.numpy(), "train"))
    blocks = torch.from_numpy(consecutive_blocks(split(ids.numpy(), "validation"), args.length))[::11][:HELD_OUT]
    seen = torch.from_numpy(consecutive_blocks(train.numpy(), args.length))[::101][:HELD_OUT]
    print("| way | loss at 1, 2, 3 loops, nats | stopping | mean loops | change | one loop | absorbing |")
    print("|---|---|---|---|---|---|---|")
    for name in args.only.split(","):
        runs = []
        for seed in map(int, args.seeds.split(",")):
            runs.append(measured(name, trained(name, seed, train, len(letters), args), blocks, seen))
            print(f"{name} {seed}: {runs[-1]}", flush=True)
        loop, absorbing = cost(LAYERS[name], len(letters), args.width)
        loss = ", ".join(_spread([run[f"loss {k}"] for run in runs]) for k in range(1, LOOPS + 1))
        lost = _spread([100 * (run["stopped"] / run[f"loss {LOOPS}"] - 1) for run in runs], "{:+.2f} %")
        if name == "one state":
            absorbing /= LOOPS
        print(
            f"| {name} | {loss} | {_spread([run['stopped'] for run in runs])} | {_spread([run['depth'] for run in runs], '{:.2f}')} | "
            f"{lost} | {loop:.1f} k | {absorbing:.1f} k |",
            flush=True,
        )


def _spread(values: list[float], form: str = "{:.3f}") -> str:
    """Mean, and the standard deviation over seeds."""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(statistics.fmean(values))} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    main()
