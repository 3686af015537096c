"""What a recipe spends on a token that it trains on, in floating point operations.

Matrix products alone, two operations for each multiply-add; norms, softmax and other work along channels are hundredths of them.
The backward pass multiplies twice for each product of the forward pass: once for the gradient of each factor. Attention
counts what is seen, not what a mask hides.
"""

from __future__ import annotations

import statistics

from rmse_edge.arch.rmse.config import RMSEConfig
from rmse_edge.arch.rmse.costs import average_context, macs_per_token
from rmse_edge.errors import ConfigError

from .gpt import GPTConfig
from .recipe import Recipe

FLOPS_PER_MAC = 2
FORWARD, TRAINED = 1, 3  # passes: forward alone; forward, and backward for two factors


def flops_per_token(recipe: Recipe, context: float | None = None) -> float:
    """FLOPs of one token in the first stage of a recipe, forward and backward, averaged over the depths that are drawn.

    Args:
        context: positions that the attention reads on average; None: those that a token of the recipe's blocks sees.
    Raises:
        ConfigError: there is no count for this architecture, or for its memory.
    """
    config = recipe.model_config()
    if isinstance(config, GPTConfig):
        seen = average_context(recipe.block) if context is None else context
        return FLOPS_PER_MAC * TRAINED * config.macs_per_token(seen)
    if not isinstance(config, RMSEConfig) or config.memory != "none":
        raise ConfigError(
            f"architecture: got {recipe.architecture!r}, expected gpt, or rmse without a memory: others' FLOPs are not counted"
        )
    costs = macs_per_token(config, average_context(recipe.block, config.window) if context is None else context)
    loops = statistics.mean(recipe.depths)
    last = recipe.objective == "last"
    gate = costs["loop"]["brake_gate"] * (FORWARD if last else TRAINED)  # no loss asks it
    block = sum(macs for name, macs in costs["loop"].items() if name not in ("brake_gate", "entropy_head"))
    heads = 1 if last else loops  # the expected loss weighs that of every loop
    once = costs["once"]["inject"] + heads * costs["once"]["head"]
    return FLOPS_PER_MAC * (TRAINED * (once + loops * block) + loops * gate)
