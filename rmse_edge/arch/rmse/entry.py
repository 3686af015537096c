"""What the rest of the project asks RMS-E. Hosts of packages ask too, so PyTorch is imported where a model is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rmse_edge.arch.registry import Arch
from rmse_edge.info import Retrieval, TextInfo
from rmse_edge.numbers import SEGMENT, token_ids

from .config import RINGS, RMSEConfig
from .costs import macs_per_token, parameters
from .quantization import GATE_BIAS, table

if TYPE_CHECKING:
    from rmse_edge.loop.course import Reader

    from .model import RMSE


def parts(model: RMSE) -> dict[str, Any]:
    c = model.config
    macs = macs_per_token(c, context=0)  # each weight is used in one multiply-add per token
    propagation = macs["once"]["propagate_kv"]
    return {
        "dials": c.dials,
        "text": TextInfo(
            c.vocab_size, c.rotary_dims, c.rope_theta, eos_token_ids=token_ids(c.eos_token_id, "eos_token_id")
        ),
        "retrieval": space(c),
        "loop_weights": macs["loop_total"],
        # The weights that supply keys and values to loops that did not run are shared by all loops.
        "once_weights": macs["once_total"] - propagation + propagation // c.max_loops,
    }


def stated(config: RMSEConfig) -> dict[str, Any]:
    dials = ("max_loops", "min_loops", "exit_threshold", "exit_epsilon", "exit_entropy")
    found: dict[str, Any] = {
        "max_loops": config.max_loops,
        "width": config.d_model,
        "parameters": parameters(config),
        "segment": SEGMENT,
        "remembers": config.memory != "none",
        "retrieval": space(config),
        "text.vocab_size": config.vocab_size,
        "text.rotary_dims": config.rotary_dims,
        "text.rope_theta": config.rope_theta,
    }
    for name, source in RINGS.items():
        ring = {
            "shape": config.ring_shape,
            "dtype": config.kv_dtype,
            "kind": "ring",
            "source": source,
            "per_loop": True,
        }
        found |= {f"state.{name}.{field}": value for field, value in ring.items()}
    return found | {f"dials.{name}": getattr(config, name) for name in dials}


def space(config: RMSEConfig) -> Retrieval | None:
    """Sizes of the retrieval head."""
    if not config.retrieval_slots:
        return None
    return {
        "key_dims": config.retrieval_dim,
        "slots": config.retrieval_slots,
        "hits": config.retrieval_hits,
        "gamma": config.retrieval_gamma,
    }


def build(config: RMSEConfig) -> RMSE:
    from .model import RMSE

    return RMSE(config)


def reader(model: RMSE) -> Reader:
    from . import reading

    return reading.reader(model)


def tied(config: RMSEConfig) -> Mapping[str, str]:
    return {"head_proj.weight": "embed.weight"} if config.tie_embeddings else {}


ARCH = Arch(
    RMSEConfig,
    build,
    parts,
    settings=("exit_", "min_loops", "retrieval_gamma"),
    tied=tied,
    additions=("memory.", "retrieval."),
    quantization=table,
    reader=reader,
    trains=True,
    gate_bias=lambda config: GATE_BIAS,
    stated=stated,
)
