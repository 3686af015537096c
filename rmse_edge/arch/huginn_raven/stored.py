"""How published checkpoints of Huginn hold its tensors: joined, under other names, and turned by neighbouring channels.

They rotate channels 2 i and 2 i + 1 of a head; here channel i is turned with channel i + hd/2. Scores are the same if queries and
keys come in the other order, so their rows, and their biases, are reordered when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rmse_edge.arch.registry import Stored

from .config import HuginnConfig

if TYPE_CHECKING:
    from torch import Tensor

STACKS = {
    "prelude": "n_layers_in_prelude",
    "core_block": "n_layers_in_recurrent_block",
    "coda": "n_layers_in_coda",
}


def stored(c: HuginnConfig) -> Mapping[str, Stored]:
    """The model's tensors that published checkpoints hold otherwise."""
    found: dict[str, Stored] = {}
    for stack, count in STACKS.items():
        for i in range(getattr(c, count)):
            found |= _of_layer(c, f"transformer.{stack}.layers.{i}", f"transformer.{stack}.{i}")
    return found


def _of_layer(c: HuginnConfig, own: str, theirs: str) -> dict[str, Stored]:
    width, hd = c.n_embd, c.head_width
    joined, fused = (f"{theirs}.attn.Wqkv.weight",), (f"{theirs}.mlp.fc.weight",)
    found = {f"{own}.norm_{n}.weight": Stored((f"{theirs}.norm_{n}.weight",)) for n in range(1, 5)}
    found |= {
        f"{own}.attn.q_proj.weight": Stored(joined, lambda w: halves(w[:width], hd)),
        f"{own}.attn.k_proj.weight": Stored(joined, lambda w: halves(w[width : 2 * width], hd)),
        f"{own}.attn.v_proj.weight": Stored(joined, lambda w: w[2 * width :]),
        f"{own}.attn.o_proj.weight": Stored((f"{theirs}.attn.proj.weight",)),
        f"{own}.mlp.gate_proj.weight": Stored(fused, lambda w: w[: c.intermediate_size]),
        f"{own}.mlp.up_proj.weight": Stored(fused, lambda w: w[c.intermediate_size :]),
        f"{own}.mlp.down_proj.weight": Stored((f"{theirs}.mlp.proj.weight",)),
    }
    if c.qk_bias:
        biases = (f"{theirs}.attn.qk_bias",)  # (2, 1, heads, hd)
        for which, name in enumerate("qk"):
            found[f"{own}.attn.{name}_bias"] = Stored(biases, _bias(which, hd))
    return found


def _bias(which: int, hd: int) -> Callable[[Tensor], Tensor]:
    def make(both: Tensor) -> Tensor:
        queries, keys = both.squeeze(1).unbind(0)
        return halves((queries, keys)[which].flatten().unsqueeze(-1), hd).view(-1, hd)

    return make


def halves(rows: Tensor, hd: int) -> Tensor:
    """Rows (H * hd, n) of heads whose neighbours are turned together, as rows whose halves are."""
    return rows.unflatten(0, (-1, hd // 2, 2)).transpose(1, 2).flatten(0, 2)
