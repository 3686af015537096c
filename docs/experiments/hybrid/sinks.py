"""RMS-E with and without the gate of its attention: how much attention the first position draws, how large states get, and how
much eight bits change. Prints tables of verdicts.

    python docs/experiments/hybrid/sinks.py --text shakespeare.txt

Qiu et al. 2025 (Gated Attention for Large Language Models) find that a sigmoid gate behind attention takes away attention sinks and
massive activations. Here a block is looped four times. Without a gate its weights stand still at zero, so that it is a half
everywhere, and the output projection begins twice as large: what is computed is attention without a gate.

- sink: the share of its attention that a query beyond the first 8 positions gives to position 0, mean of loops, heads and queries.
  That of a position it sees is 0.056 in the mean.
- peak: the largest number of a state before its norm, by the root mean square of that state: the largest of all positions and loops.
- int8: how much predictions change (KL of a position, millionths of a nat) where every product of the block has its weights rounded by
  rmse-quantize's int8 and its inputs to 255 steps per position, as engines do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from study import Claim, Column, Run, Study, Variant, by_seed, loss_of
from torch import Tensor, nn

from rmse_edge.quantize import QuantizeRequest, Scheme, quantize
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.sources import Source

BEYOND = 8  # a query that sees few positions gives each of them much
BLOCKS = 32

RECIPE = {
    "architecture": "rmse",
    "model": {
        "vocab_size": 65, "d_model": 48, "n_heads": 3, "n_kv_heads": 1, "head_dim": 16, "window": 64, "max_loops": 4,
        "n_experts": 1, "top_k": 1, "expert_width": 96, "n_shared_experts": 0, "block_size": 32, "exit_rules": ["gate"],
    },
    "batch_size": 16, "objective": "last", "depths": [4], "steps": 150, "gate_steps": 0, "exit_steps": 0,
    "lr": 0.01, "warmup": 15, "ema": 0.95, "eval_every": 75, "eval_blocks": 16, "precision": "fp32",
}  # fmt: skip


def no_gate(model: Any) -> None:
    attention = model.block.attention
    attention.gate_proj.weight.zero_().requires_grad_(False)
    attention.o_proj.weight *= 2


VARIANTS = {
    "headwise": Variant("a gate per head"),
    "elementwise": Variant("a gate per channel", ("model.attention_gate=elementwise",)),
    "none": Variant("no gate", change=no_gate),
}
CLAIMS = tuple(
    Claim(f"{VARIANTS[name].title} {text}", name, "none", measure)
    for name in ("headwise", "elementwise")
    for text, measure in (
        ("takes attention from position 0", "sink"),
        ("makes states less peaked", "peak"),
        ("changes less by int8", "int8"),
        ("has a lower loss", "loss"),
    )
)
COLUMNS = (
    Column("loss, nats", "loss"),
    Column("sink", "sink"),
    Column("peak", "peak", "{:.2f}"),
    Column("int8", "int8", "{:.1f}"),
)


@torch.no_grad()
def attention_and_states(model: Any, tokens: Tensor) -> tuple[float, float]:
    """(sink, peak), see above."""
    attention, sinks, peaks = model.block.attention, [], []

    def before(_: nn.Module, given: tuple[Any, ...]) -> None:
        x, k, cos, sin, keys, _, mask = given
        query = attention.q_norm(attention.q_proj(x).unflatten(-1, (-1, attention.head_dim))).transpose(1, 2)
        query = attention.turn(query, *attention.angles(k, cos, sin, 1.0))
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
        weights = torch.softmax(query @ keys.transpose(2, 3) * attention.head_dim**-0.5 + mask, -1)
        sinks.append(float(weights[:, :, BEYOND:, 0].mean()))

    def behind(_: nn.Module, __: Any, found: tuple[Tensor, ...]) -> None:
        h = found[0]
        peaks.append(float((h.abs().amax(-1) / h.square().mean(-1).sqrt()).max()))

    hooks = attention.register_forward_pre_hook(before), model.block.register_forward_hook(behind)
    model.trajectory(tokens)
    for hook in hooks:
        hook.remove()
    return sum(sinks) / len(sinks), max(peaks)


def rounded_input(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x = given[0]
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (torch.round(x / scale) * scale, *given[1:])


def in_int8(model: Any) -> Any:
    """The model with the block's weights and the inputs of its products in eight bits."""
    found = quantize(model, QuantizeRequest(Scheme("int8"), method="rtn")).model.eval()
    for module in found.block.modules():
        if isinstance(module, nn.Linear) or module is found.block.experts:
            module.register_forward_pre_hook(rounded_input)
    return found


@torch.no_grad()
def predictions(model: Any, tokens: Tensor) -> Tensor:
    """(B, T, V) logarithms."""
    return torch.log_softmax(model.read_out(model.trajectory(tokens, every=False)[0][-1]), -1)


def measured(model: Any, source: Source, _recipe: Recipe) -> dict[str, float]:
    tokens = source.validation(BLOCKS)["tokens"]
    sink, peak = attention_and_states(model, tokens)
    said, rounded = predictions(model, tokens), predictions(in_int8(model), tokens)
    change = 1e6 * float((said.exp() * (said - rounded)).sum(-1).mean())
    return {"loss": loss_of(model, source), "sink": sink, "peak": peak, "int8": change}


def draw(axis: Any, runs: Sequence[Run]) -> None:
    for name, variant in VARIANTS.items():
        sinks, costs = (list(by_seed(runs, name, measure).values()) for measure in ("sink", "int8"))
        axis.plot(sinks, costs, "o", label=variant.title)
    axis.set_xlabel("share of attention that position 0 draws")
    axis.set_ylabel("KL of predictions by int8, millionths of a nat")


STUDY = Study("sinks", RECIPE, VARIANTS, CLAIMS, COLUMNS, measured, draw, text=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
