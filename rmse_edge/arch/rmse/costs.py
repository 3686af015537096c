"""What a position costs: multiply-adds of one loop, and of what happens once around the loops.

Only matrix products count (norms, gates and softmax are thousandths of it). One multiply-add is two FLOPs.
"""

from __future__ import annotations

from typing import Any

from .config import RMSEConfig


def average_context(length: int, window: int | None = None) -> float:
    """Positions a query sees, itself included, averaged over a sequence of `length` that starts from an empty past."""
    window = length if window is None else min(window, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def macs_per_token(config: RMSEConfig, context: float) -> dict[str, Any]:
    """Multiply-adds of one token.

    Args:
        context: positions the attention reads on average, see `average_context`.
    Returns:
        "loop": parts of ONE iteration by name; "once": parts outside the loop; "loop_total", "once_total" their sums;
        "total": the whole token at the trained depth, `once_total + max_loops * loop_total`. For another (mean) depth
        replace max_loops; what is outside the loop does not depend on it.
    """
    d, wide = config.d_model, config.n_heads * config.head_dim
    kv = 2 * config.n_kv_heads * config.head_dim
    loop = {
        "q_proj": d * wide,
        "kv_proj": d * kv,
        "gate_proj": d * (wide if config.attention_gate == "elementwise" else config.n_heads),
        "o_proj": wide * d,
        "attention": 2 * wide * context,  # q.k and weights.v
        "router": d * config.n_experts,
        "routed_experts": config.top_k * 3 * d * config.expert_width,
        "shared_expert": config.n_shared_experts * 3 * d * config.shared_width,
        "brake_gate": d,
    }
    if config.memory != "none":
        first, second = _memory_layers(config)
        key_dims = config.memory_dim if config.memory == "titans" else config.memory_key_dim
        loop["memory_read"] = d * key_dims + first + second + config.memory_dim * d + d
    if "entropy" in config.exit_rules:
        loop["entropy_head"] = d * config.vocab_size
    once = {
        "inject": d * d,
        "head": d * config.vocab_size,
        "propagate_kv": config.max_loops * d * kv,  # commit projects the exit state for every loop in one product
    }
    if config.memory != "none":
        # Keys, values and rates; M on the keys; the gradient, which Titans takes with two sets of weights.
        gradients = 2 if config.memory == "titans" else 1
        projected = d * (key_dims + config.memory_dim + (3 if config.memory == "titans" else 4))
        once["memory_write"] = projected + first + second + gradients * (first + 2 * second)
    per_loop, around = sum(loop.values()), sum(once.values())
    return {
        "loop": loop,
        "once": once,
        "loop_total": per_loop,
        "once_total": around,
        "total": around + config.max_loops * per_loop,
    }


def parameters(config: RMSEConfig) -> int:
    """Trained numbers of the model that `config` describes."""
    c, d, wide, kv = config, config.d_model, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    total = c.vocab_size * d * (1 if c.tie_embeddings else 2)  # embeddings, head
    total += d * d + (c.max_loops * d if c.step_encoding == "learned" else 0)  # injection, a bias per loop
    gates = wide if c.attention_gate == "elementwise" else c.n_heads
    total += d * (2 * wide + 2 * kv + gates) + 2 * c.head_dim  # attention and the norms of its queries and keys
    told = 0 if c.step_encoding == "none" else c.max_loops
    total += c.n_experts * (told + d + 3 * d * c.expert_width)  # router logits per loop, router, experts
    total += 3 * d * c.n_shared_experts * c.shared_width
    total += 5 * d + d + 1  # norms, exit gate
    if c.memory != "none":
        rates, key_dims = (3, c.memory_dim) if c.memory == "titans" else (4, c.memory_key_dim)
        total += sum(_memory_layers(c)) + 4 * key_dims + d * (2 * key_dims + 2 * c.memory_dim) + (rates + 1) * (d + 1)
    if c.retrieval_slots:
        # Pooling queries, pooling and value projections, a norm; the key and search projections; attention to the hits.
        total += 2 * c.retrieval_slots * d + 2 * d * d + d + 1
        total += 2 * c.retrieval_dim * c.retrieval_slots * d + 4 * d * wide
    return total


def _memory_layers(config: RMSEConfig) -> tuple[int, int]:
    """Weights of the memory's two layers. ATLAS reads keys with all products of two channels added."""
    dims = config.memory_key_dim
    features = config.memory_dim if config.memory == "titans" else dims + dims * (dims + 1) // 2
    return features * config.memory_hidden, config.memory_hidden * config.memory_dim
