"""What models of dense layers say alike to the rest of the project. Without PyTorch: hosts of packages ask too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from rmse_edge.info import TextInfo
from rmse_edge.loop.dials import Dials
from rmse_edge.numbers import EndTokens, KvDtype, token_ids


class DenseConfig(Protocol):
    """What is asked of a configuration."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def head_width(self) -> int: ...
    @property
    def max_loops(self) -> int: ...
    @property
    def kv_dtype(self) -> KvDtype: ...
    @property
    def eos_token_id(self) -> EndTokens: ...
    @property
    def dials(self) -> Dials: ...


def layer_stages(layer: str, attention: str) -> list[tuple[str, ...]]:
    """The matrices of one layer in the order of the data flow, as `QuantTable.stages` has them.

    Args:
        layer: its path.
        attention: what its `FullAttention` is called; its `GatedMLP` is mlp.
    """
    return [
        tuple(f"{layer}.{attention}.{name}_proj.weight" for name in "qkv"),
        (f"{layer}.{attention}.o_proj.weight",),
        (f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"),
        (f"{layer}.mlp.down_proj.weight",),
    ]


def parts(
    c: DenseConfig,
    rope_theta: float,
    loop_weights: int,
    once_weights: int,
    further_thetas: Mapping[str, float] | None = None,
    prefix: bool = False,
) -> dict[str, Any]:
    """`Arch.parts`."""
    ends = token_ids(c.eos_token_id, "eos_token_id")
    return {
        "dials": c.dials,
        "text": TextInfo(
            c.vocab_size, c.head_width, rope_theta, dict(further_thetas or {}), prefix, eos_token_ids=ends
        ),
        "loop_weights": loop_weights,
        "once_weights": once_weights,
    }


def stated(
    c: DenseConfig, rope_theta: float, width: int, parameters: int, further_thetas: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """`Arch.stated`, but for the dials."""
    found: dict[str, Any] = {
        "max_loops": c.max_loops,
        "width": width,
        "parameters": parameters,
        "text.vocab_size": c.vocab_size,
        "text.rotary_dims": c.head_width,
        "text.rope_theta": rope_theta,
        "text.further_thetas": dict(further_thetas or {}),
    }
    for name in ("keys", "values"):
        kept = {"dtype": c.kv_dtype, "kind": "append", "source": name, "per_loop": True}
        found |= {f"state.past_{name}.{field}": value for field, value in kept.items()}
    return found
