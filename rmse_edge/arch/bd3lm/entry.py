"""What the rest of the project asks BD3-LM. Hosts of packages ask too, so PyTorch is imported where a model is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rmse_edge.arch.registry import Arch
from rmse_edge.info import BlocksInfo, TextInfo
from rmse_edge.numbers import token_ids

from .config import THETA, Bd3lmConfig
from .stored import stored

if TYPE_CHECKING:
    from .model import Bd3lm


def loop_weights(c: Bd3lmConfig) -> int:
    """Weights of products in one iteration, for each position of a block."""
    return c.n_blocks * 12 * c.hidden_dim**2 + c.vocab_size * c.hidden_dim


def once_weights(c: Bd3lmConfig) -> int:
    """Weights of products around the loop: a finished block goes through all layers once more, for its keys and values."""
    return c.n_blocks * 12 * c.hidden_dim**2


def parameters(c: Bd3lmConfig) -> int:
    """Trained numbers of the model that `c` describes."""
    layer = 12 * c.hidden_dim**2 + (4 + 4 + 1) * c.hidden_dim  # two norms; the biases of the MLP
    return c.n_blocks * layer + 2 * c.hidden_dim + (2 * c.hidden_dim + 1) * c.vocab_size


def blocks_info(c: Bd3lmConfig) -> BlocksInfo:
    ends = token_ids(c.eos_token_id, "eos_token_id")
    return BlocksInfo(c.block_size, c.mask_token_id, TextInfo(c.vocab_size, c.head_width, THETA, eos_token_ids=ends))


def parts(model: Bd3lm) -> dict[str, Any]:
    c = model.config
    found = {"loop_weights": loop_weights(c), "once_weights": once_weights(c)}
    return {"dials": c.dials, "blocks": blocks_info(c), **found}


def stated(c: Bd3lmConfig) -> dict[str, Any]:
    found: dict[str, Any] = {
        "max_loops": c.max_loops,
        "width": c.hidden_dim,
        "parameters": parameters(c),
        "chunks": (c.block_size,),
        "blocks.size": c.block_size,
        "blocks.mask_token_id": c.mask_token_id,
        "blocks.text.vocab_size": c.vocab_size,
        "blocks.text.rotary_dims": c.head_width,
        "blocks.text.rope_theta": THETA,
    }
    for name in ("keys", "values"):
        kept = {"dtype": c.kv_dtype, "kind": "append", "source": name, "per_loop": False}
        found |= {f"state.past_{name}.{field}": value for field, value in kept.items()}
    return found | {f"dials.{name}": getattr(c.dials, name) for name in ("max_loops", "min_loops", "exit_threshold")}


def build(config: Bd3lmConfig) -> Bd3lm:
    from .model import Bd3lm

    return Bd3lm(config)


ARCH = Arch(
    Bd3lmConfig,
    build,
    parts,
    settings=("exit_", "min_loops"),
    stored=stored,
    unread=("*rotary_emb.inv_freq",),
    by_blocks=True,
    trains=True,
    stated=stated,
)
