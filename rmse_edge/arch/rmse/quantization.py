"""Which tensors of RMS-E are quantised.

The memory stays float: what it learns while running is float too, and it is small.
"""

from __future__ import annotations

from rmse_edge.arch.common.quantization import QuantTable

from .config import RMSEConfig

INJECT, GATE_BIAS = "inject.weight", "gate.bias"
EXPERTS = ("block.experts.gate_up_proj", "block.experts.down_proj")
ATTENTION_GATE = "block.attention.gate_proj.weight"


def table(config: RMSEConfig) -> QuantTable:
    # With a row per head the attention's gate is small; with one per channel it is a matrix like the others.
    gate = (ATTENTION_GATE,) if config.attention_gate == "elementwise" else ()
    return QuantTable(
        stages=(
            ("embed.weight",),
            (INJECT,),
            ("block.attention.q_proj.weight", "block.attention.kv_proj.weight", *gate),
            ("block.attention.o_proj.weight",),
            (EXPERTS[0], "block.experts.shared_gate_up_proj.weight"),
            (EXPERTS[1], "block.experts.shared_down_proj.weight"),
            ("head_proj.weight",),
        ),
        float=(
            "*norm.weight",
            "step_encoding",
            "gate.weight",
            GATE_BIAS,
            ATTENTION_GATE,
            "block.attention.kv_scales",
            "block.experts.router.weight",
            "block.experts.step_logits",
            "block.experts.balance_bias",
            "memory.*",
            "retrieval.*",
        ),
        experts=EXPERTS,
        once=(INJECT,),
        embedding="embed.weight",
        head="head_proj.weight",
    )
