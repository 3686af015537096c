"""What the rest of the project asks hybrids. Hosts of packages ask too, so PyTorch is imported where a model is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rmse_edge.arch.registry import Arch
from rmse_edge.info import TextInfo
from rmse_edge.numbers import token_ids

from . import recurrent
from .hybrid import EMBEDDING, HEAD, MATRICES, HybridBase
from .quantization import QuantTable

if TYPE_CHECKING:
    from .hybrid_model import HybridModel

# What stays float in every layer, see `MATRICES`.
FLOAT = (
    "*norm.weight",
    "*mixer_norms.*.weight",
    "*.conv1d.*",
    "*.gates_proj.weight",
    "*.steps_proj.weight",
    "*.selection_proj.*",
    "*.value_down_proj.weight",
    "*.value_up_proj.*",
    "*.rates_proj.*",
    *(f"*.{name}" for name in ("A_log", "dt_bias", "D", "b_bias", "c_bias", "mimo_x", "mimo_z", "mimo_o")),
    *(f"*.{name}" for name in ("residual_weight", "coefficients", "mixers.*.up", "mixers.*.down")),
    "*.mlp.router.weight",
    "*.mlp.balance_bias",
    "*.mlp.shared_gate_proj.weight",
    "*.kv_scales",
    "exit_gate.*",
)


def parts(model: HybridModel) -> dict[str, Any]:
    """`Arch.parts`."""
    c = model.config
    dims, theta = c.turning
    ends = token_ids(c.eos_token_id, "eos_token_id")
    return {
        "dials": c.dials,
        "text": TextInfo(c.vocab_size, dims, theta if dims else 10_000.0, eos_token_ids=ends),
        "loop_weights": model.weights_of(1) + recurrent.gate_weights(c, c.width),
        "once_weights": model.weights_of(0) + model.weights_of(2) + c.vocab_size * c.width,
    }


def stated(c: HybridBase) -> dict[str, Any]:
    """`Arch.stated`."""
    dims, _ = c.turning
    found: dict[str, Any] = {
        "max_loops": c.max_loops,
        "width": c.width,
        "segment": c.segment,
        "text.vocab_size": c.vocab_size,
        "text.rotary_dims": dims,
    }
    return found | recurrent.stated_exits(c)


def table(c: HybridBase) -> QuantTable:
    """`Arch.quantization`: layer by layer, in the order of the data flow."""
    stages: list[tuple[str, ...]] = [(EMBEDDING,)]
    experts: list[str] = []
    for i, layer in enumerate(c.plan):
        for j, mixer in enumerate(layer.mixers):
            path = f"layers.{i}.mixers.{j}"
            stages += [tuple(f"{path}.{name}.weight" for name in stage) for stage in MATRICES[mixer.kind]]
        mlp = f"layers.{i}.mlp"
        if layer.experts:
            experts += [f"{mlp}.gate_up_proj", f"{mlp}.down_proj"]
            stages.append((f"{mlp}.gate_up_proj", f"{mlp}.shared_gate_up_proj.weight"))
            stages.append((f"{mlp}.down_proj", f"{mlp}.shared_down_proj.weight"))
        elif layer.dense:
            stages += [(f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"), (f"{mlp}.down_proj.weight",)]
    stages.append((HEAD,))
    return QuantTable(
        stages=tuple(stages),
        float=FLOAT,
        experts=tuple(experts),
        once=tuple(f"layers.{i}.*" for i in range(c.looped[0])),
        embedding=EMBEDDING,
        head=HEAD,
    )


def tied(c: HybridBase) -> Mapping[str, str]:
    """`Arch.tied`."""
    return {HEAD: EMBEDDING} if c.tie_word_embeddings else {}


def build(config: HybridBase) -> HybridModel:
    from .hybrid_model import HybridModel

    return HybridModel(config)


def hybrid(config: type[HybridBase], **published: Any) -> Arch:
    """Of one whose files have this configuration.

    Args:
        published: fields of `Arch` that say how published checkpoints are read.
    """
    return Arch(
        config,
        build,
        parts,
        additions=recurrent.ADDITIONS,
        settings=config.settings,
        tied=tied,
        quantization=table,
        trains=True,
        gate_bias=recurrent.gate_bias,
        stated=stated,
        **published,
    )
