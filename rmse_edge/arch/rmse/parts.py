"""The layers of an RMS-E model, made from the numbers of its configuration."""

from __future__ import annotations

from rmse_edge.layers.attention import Attention
from rmse_edge.layers.experts import SparseExperts
from rmse_edge.layers.memory.atlas import Atlas
from rmse_edge.layers.memory.base import Memory
from rmse_edge.layers.memory.titans import Titans
from rmse_edge.layers.retrieval import Retrieval

from .config import RMSEConfig


def make_attention(c: RMSEConfig) -> Attention:
    return Attention(
        c.d_model,
        n_heads=c.n_heads,
        n_kv_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        max_loops=c.max_loops,
        gate=c.attention_gate,
        step_dims=c.step_dims if c.step_encoding == "temporal_rope" else 0,
        kv_dtype=c.kv_dtype,
        norm_eps=c.norm_eps,
    )


def make_experts(c: RMSEConfig) -> SparseExperts:
    return SparseExperts(
        c.d_model,
        n_experts=c.n_experts,
        top_k=c.top_k,
        expert_width=c.expert_width,
        shared_width=c.n_shared_experts * c.shared_width,
        max_loops=None if c.step_encoding == "none" else c.max_loops,
    )


def make_memory(c: RMSEConfig) -> Memory | None:
    """None for a model without one."""
    if c.memory == "titans":
        return Titans(c.d_model, dims=c.memory_dim, hidden=c.memory_hidden, max_loops=c.max_loops)
    if c.memory == "atlas":
        return Atlas(
            c.d_model,
            dims=c.memory_dim,
            hidden=c.memory_hidden,
            key_dims=c.memory_key_dim,
            window=c.memory_window,
            max_loops=c.max_loops,
        )
    return None


def make_retrieval(c: RMSEConfig) -> Retrieval | None:
    """None for a model without it."""
    if not c.retrieval_slots:
        return None
    return Retrieval(
        c.d_model,
        slots=c.retrieval_slots,
        key_dims=c.retrieval_dim,
        n_heads=c.n_heads,
        head_dim=c.head_dim,
        norm_eps=c.norm_eps,
    )
