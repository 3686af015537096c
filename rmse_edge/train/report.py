"""Measurements of a trained checkpoint, in PyTorch and over whole blocks: what the model card and the notes quote.

- the loss at every fixed depth;
- adaptive exits by brake threshold, under three rules for what a stopped position shows to deeper loops: "propagate"
  (the deployed one), "frozen" (its last keys and values, repeated) and "selected" (nothing stops: everything is computed
  and the state at the exit is picked afterwards, so this saves no work and is what the others are measured against);
- how much the expert sets of different loops overlap, and how evenly experts are used;
- multiply-adds per token.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from rmse_edge.arch.rmse.costs import average_context, macs_per_token
from rmse_edge.arch.rmse.model import RMSE, Stop
from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.layers.experts import Routing, members
from rmse_edge.loop.stop import gate_stops
from rmse_edge.losses import token_loss
from rmse_edge.text import Tokenizer, consecutive_blocks, read_text, split

from .gpt import GPTConfig
from .losses import losses_by_depth
from .trainer import evaluate

RULES = ("propagate", "frozen", "selected")
BATCH = 16


def measure(
    checkpoint: Path, text_file: Path, split_name: str, thresholds: list[float], max_tokens: int | None = None
) -> dict[str, Any]:
    """Everything above for one checkpoint folder, as one JSON-able document.

    Raises:
        UserError: the checkpoint, its tokenizer or the text cannot be used.
    """
    model = load_checkpoint(checkpoint)
    ids = np.array(Tokenizer(checkpoint / "tokenizer.json").encode(read_text(text_file)))
    block = model.config.block_size
    blocks = torch.from_numpy(consecutive_blocks(split(ids, split_name)[: max_tokens and max_tokens + 1], block))
    fixed = evaluate(model, blocks, progress="fixed depths")
    return {
        "checkpoint": str(checkpoint),
        "parameters": sum(p.numel() for p in model.parameters()),
        "split": split_name,
        "tokens": blocks[:, 1:].numel(),
        "block_size": block,
        "loss_by_depth": fixed,
        "adaptive": adaptive(model, blocks, thresholds, fixed),
        "experts": expert_usage(model, blocks),
        "costs": costs(model),
    }


# ------------------------------------------------------------------------------------------------ adaptive exits


@torch.no_grad()
def adaptive(
    model: RMSE, blocks: Tensor, thresholds: list[float], fixed: list[float] | None = None
) -> list[dict[str, Any]]:
    """Loss and depth at every threshold under every rule.

    Args:
        blocks: (n, T + 1) int64.
        fixed: losses by depth, to put beside each row the loss of a fixed depth of the same mean (interpolated).
    """
    rows = []
    cells = [(rule, threshold) for threshold in thresholds for rule in RULES]
    for rule, threshold in tqdm(cells, desc="adaptive", unit="setting", leave=False, disable=None):
        losses, depths = [], []
        for part in blocks.split(BATCH):
            tokens, targets = part[:, :-1], part[:, 1:]
            state, depth = exit_states(model, tokens, threshold, rule)
            losses.append(token_loss(model.head_proj(state), targets))
            depths.append(depth)
        depth = torch.cat(depths).double()
        row = {
            "rule": rule,
            "threshold": threshold,
            "loss": torch.cat(losses).double().mean().item(),
            "mean_depth": depth.mean().item(),
            "sd_depth": depth.std(correction=0).item(),
        }
        if fixed:
            row["loss_at_same_fixed_depth"] = float(np.interp(row["mean_depth"], range(1, len(fixed) + 1), fixed))
        rows.append(row)
    return rows


def exit_states(model: RMSE, tokens: Tensor, threshold: float, rule: str) -> tuple[Tensor, Tensor]:
    """The normed state each position leaves the loop with, (B, T, d), and its depth, (B, T), 1-based.

    Args:
        tokens: (B, T) int64.
        threshold: of the brake score; 1 or more never stops.
        rule: one of RULES.
    """
    if rule not in RULES:
        raise ValueError(f"rule: got {rule!r}, expected one of {', '.join(RULES)}")
    stop = brake(model, threshold)
    if rule != "selected":
        states, _, depth = model.trajectory(tokens, stop=stop, stopped_kv=rule)
        return states[-1], depth
    states, gates, _ = model.trajectory(tokens)
    survival = -F.softplus(gates).cumsum(0)  # logarithms
    stops = torch.stack([stop(k, states[k], states[k], survival[k]) for k in range(len(states))])  # (K, B, T)
    stops[-1] = True
    depth = stops.int().argmax(0)  # the first loop that stops, 0-based
    chosen = torch.stack(states).gather(0, depth[None, ..., None].expand(1, *states[0].shape))[0]
    return chosen, depth + 1


def brake(model: RMSE, threshold: float) -> Stop:
    """The gate rule as a `stop` callback of `RMSE.trajectory`."""
    limit = torch.tensor(threshold, device=model.gate.weight.device)

    def stop(k: int, before: Tensor, after: Tensor, log_survival: Tensor) -> Tensor:
        return gate_stops(log_survival, limit) & (k + 1 >= model.config.min_loops)

    return stop


# ------------------------------------------------------------------------------------------------ experts


@torch.no_grad()
def expert_usage(model: RMSE, blocks: Tensor) -> dict[str, Any]:
    """Which experts the loops pick, at full depth.

    Returns:
        overlap: K x K, the share of a position's top-k experts in loop i that it also picks in loop j, averaged;
        jaccard: the same as |both| / |either|;
        mean_overlap, mean_jaccard: over i != j; chance_overlap: what unrelated choices would give, top_k / n_experts;
        effective_experts: per loop, exp of the entropy of its usage (n_experts if even), and over all loops;
        top_tenth_share: per loop, the share of its choices that goes to its most used tenth of the experts;
        idle: experts no position picked, per loop and in any loop.
    """
    config = model.config
    loops, count, top_k = config.max_loops, config.n_experts, config.top_k
    shared, jaccard = torch.zeros(loops, loops, dtype=torch.float64), torch.zeros(loops, loops, dtype=torch.float64)
    usage = torch.zeros(loops, count, dtype=torch.float64)
    chosen: dict[int, Tensor] = {}

    def observer(k: int, routing: Routing) -> None:
        chosen[k] = routing.experts

    positions = 0
    model.block.experts.observer = observer
    try:
        for part in tqdm(blocks.split(4), desc="experts", unit="batch", leave=False, disable=None):
            losses_by_depth(model, part[:, :-1], part[:, 1:])
            picks = torch.stack([chosen[k] for k in range(loops)], 1)  # (N, K, top_k)
            member = members(picks, count)  # (N, K, E)
            both = member @ member.transpose(1, 2)  # (N, K, K): how many experts two loops have in common
            shared += both.double().sum(0)
            jaccard += (both / (2 * top_k - both)).double().sum(0)
            usage += member.double().sum(0)
            positions += len(picks)
    finally:
        model.block.experts.observer = None
    overlap, jaccard = shared / (positions * top_k), jaccard / positions
    tenth = max(1, count // 10)
    return {
        "overlap": overlap.tolist(),
        "jaccard": jaccard.tolist(),
        "mean_overlap": off_diagonal_mean(overlap),
        "mean_jaccard": off_diagonal_mean(jaccard),
        "chance_overlap": top_k / count,
        "effective_experts": [effective_number(row) for row in usage],
        "effective_experts_all_loops": effective_number(usage.sum(0)),
        "top_tenth_share": (usage.topk(tenth, -1).values.sum(-1) / usage.sum(-1)).tolist(),
        "idle": (usage == 0).sum(-1).tolist(),
        "idle_all_loops": int((usage.sum(0) == 0).sum()),
    }


def off_diagonal_mean(matrix: Tensor) -> float | None:
    """Mean over i != j; None for a single loop."""
    n = len(matrix)
    return ((matrix.sum() - matrix.diagonal().sum()) / (n * (n - 1))).item() if n > 1 else None


def effective_number(usage: Tensor) -> float:
    """exp of the entropy of a usage count, (E,): how many evenly used experts would be as spread out."""
    share = usage / usage.sum()
    return math.exp(-(share * share.clamp_min(1e-12).log()).sum().item())


# ------------------------------------------------------------------------------------------------ costs and tables


def costs(model: RMSE) -> dict[str, Any]:
    """Multiply-adds per token inside a training block, beside GPTs of the same width."""
    config = model.config
    context = average_context(config.block_size, config.window)
    ours = macs_per_token(config, context)
    gpt_context = average_context(config.block_size)
    gpts = {
        layers: GPTConfig(
            vocab_size=config.vocab_size, d_model=config.d_model, n_heads=1, n_layers=layers
        ).macs_per_token(gpt_context)
        for layers in (1, config.max_loops)
    }
    layer = (gpts[config.max_loops] - gpts[1]) / (config.max_loops - 1) if config.max_loops > 1 else None
    return {
        "context": context,
        "rmse": ours,
        "gpt_context": gpt_context,
        "gpt_total_by_layers": gpts,
        "loop_over_gpt_layer": ours["loop_total"] / layer if layer else None,
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The document of `measure` as tables for people."""
    experts, cost = result["experts"], result["costs"]
    lines = [
        f"{result['checkpoint']}: {result['parameters']:,} parameters; {result['tokens']:,} {result['split']} tokens in "
        f"blocks of {result['block_size']}",
        "",
        "| depth | loss |",
        "|---|---|",
        *(f"| {depth} | {loss:.4f} |" for depth, loss in enumerate(result["loss_by_depth"], 1)),
        "",
        "| threshold | rule for stopped positions | loss | mean depth | sd | loss at that fixed depth |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['threshold']:g} | {row['rule']} | {row['loss']:.4f} | {row['mean_depth']:.2f} | {row['sd_depth']:.2f} "
            f"| {row['loss_at_same_fixed_depth']:.4f} |"
            for row in result["adaptive"]
        ),
        "",
    ]
    if experts["mean_overlap"] is not None:
        lines += [
            f"Experts: two loops share {experts['mean_overlap']:.1%} of a position's choices on average (unrelated choices: "
            f"{experts['chance_overlap']:.1%}; mean Jaccard {experts['mean_jaccard']:.3f}). Share by pair of loops, %:",
            "",
            "| loop | " + " | ".join(str(i) for i in range(1, len(experts["overlap"]) + 1)) + " |",
            "|---" * (len(experts["overlap"]) + 1) + "|",
            *(
                f"| {i} | " + " | ".join(f"{100 * v:.0f}" for v in row) + " |"
                for i, row in enumerate(experts["overlap"], 1)
            ),
            "",
        ]
    lines += [
        "| loop | effective experts | share of the top tenth | idle experts |",
        "|---|---|---|---|",
        *(
            f"| {i} | {n:.0f} | {share:.1%} | {idle} |"
            for i, (n, share, idle) in enumerate(
                zip(experts["effective_experts"], experts["top_tenth_share"], experts["idle"]), 1
            )
        ),
        f"| all | {experts['effective_experts_all_loops']:.0f} | | {experts['idle_all_loops']} |",
        "",
        "| multiply-adds per token | |",
        "|---|---|",
        *(f"| one loop: {name.replace('_', ' ')} | {macs:,.0f} |" for name, macs in cost["rmse"]["loop"].items()),
        f"| **one loop** (context {cost['context']:.1f}) | {cost['rmse']['loop_total']:,.0f} |",
        *(f"| once: {name.replace('_', ' ')} | {macs:,.0f} |" for name, macs in cost["rmse"]["once"].items()),
        f"| **full depth** | {cost['rmse']['total']:,.0f} |",
        *(
            f"| GPT, {layers} layer{'s' if layers > 1 else ''} (context {cost['gpt_context']:.1f}) | {macs:,.0f} |"
            for layers, macs in cost["gpt_total_by_layers"].items()
        ),
    ]
    if cost["loop_over_gpt_layer"]:
        lines.append(f"| one loop / one GPT layer | {cost['loop_over_gpt_layer']:.3f} |")
    return "\n".join(lines)
