"""How published checkpoints of Qwen3-Next hold its tensors.

- `in_proj_qkvz` and `in_proj_ba` have, for each key head, its query, its key, and the values and gates of its value heads.
- `q_proj` has, for each head, its query and its gate.
- Norms are held as w of 1 + w, but for the one behind the delta rule.
- Experts are one tensor each, as published and as transformers writes them; within itself transformers 5.24.0 has one tensor of
  all, gates before ups. Both are read.
- `mtp.*`, which predicts a second token ahead, is passed over, as transformers does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rmse_edge.arch.common.hybrid import EMBEDDING, HEAD
from rmse_edge.arch.registry import Stored

from .config import Qwen3NextConfig

if TYPE_CHECKING:
    from torch import Tensor

UNREAD = ("mtp.*",)


def one_more(w: Tensor) -> Tensor:
    """The factor of a norm that is held as w."""
    return w + 1


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """(..., f, d) each -> gate and up by turns, (..., 2f, d)."""
    import torch

    return torch.stack([gate, up], -2).flatten(-3, -2)


def stored(c: Qwen3NextConfig) -> list[Mapping[str, Stored]]:
    """As published, and as within transformers."""
    return [_of(c, packed=False), _of(c, packed=True)]


def _of(c: Qwen3NextConfig, packed: bool) -> Mapping[str, Stored]:
    found = {
        EMBEDDING: Stored(("model.embed_tokens.weight",)),
        HEAD: Stored(("lm_head.weight",)),
        "norm.weight": Stored(("model.norm.weight",), one_more),
    }
    for i, kind in enumerate(c.layer_types or ()):
        own, theirs = f"layers.{i}", f"model.layers.{i}"
        found[f"{own}.mixer_norms.0.weight"] = Stored((f"{theirs}.input_layernorm.weight",), one_more)
        found[f"{own}.mlp_norm.weight"] = Stored((f"{theirs}.post_attention_layernorm.weight",), one_more)
        of_mixer = _deltanet if kind == "linear_attention" else _attention
        found |= of_mixer(c, f"{own}.mixers.0", theirs)
        if c.is_sparse(i):
            found |= _experts(c, f"{own}.mlp", f"{theirs}.mlp", packed)
        else:
            names = (f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
            found |= {f"{own}.{name}": Stored((f"{theirs}.{name}",)) for name in names}
    return found


def _deltanet(c: Qwen3NextConfig, own: str, layer: str) -> dict[str, Stored]:
    theirs = f"{layer}.linear_attn"
    joined, gates = (f"{theirs}.in_proj_qkvz.weight",), (f"{theirs}.in_proj_ba.weight",)
    heads, dk = c.linear_num_key_heads, c.linear_key_head_dim
    shared = c.linear_num_value_heads // heads
    sizes = [dk, dk, shared * c.linear_value_head_dim, shared * c.linear_value_head_dim]

    def part(w: Tensor, sizes: list[int], which: int) -> Tensor:
        """Rows of all key heads, of one of the parts that each has."""
        return w.unflatten(0, (heads, -1)).split(sizes, 1)[which].flatten(0, 1)

    def qkv(w: Tensor) -> Tensor:
        import torch

        return torch.cat([part(w, sizes, which) for which in range(3)])

    def both(w: Tensor) -> Tensor:
        import torch

        return torch.cat([part(w, [shared, shared], which) for which in range(2)])

    found = {
        f"{own}.qkv_proj.weight": Stored(joined, qkv),
        f"{own}.z_proj.weight": Stored(joined, lambda w: part(w, sizes, 3)),
        f"{own}.gates_proj.weight": Stored(gates, both),
    }
    same = ("conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight")
    return found | {f"{own}.{name}": Stored((f"{theirs}.{name}",)) for name in same}


def _attention(c: Qwen3NextConfig, own: str, layer: str) -> dict[str, Stored]:
    theirs = f"{layer}.self_attn"

    def half(which: int) -> Callable[[Tensor], Tensor]:
        return lambda w: w.unflatten(0, (c.num_attention_heads, 2, -1))[:, which].flatten(0, 1)

    joined = (f"{theirs}.q_proj.weight",)
    found = {f"{own}.q_proj.weight": Stored(joined, half(0)), f"{own}.gate_proj.weight": Stored(joined, half(1))}
    found |= {f"{own}.{n}_proj.weight": Stored((f"{theirs}.{n}_proj.weight",)) for n in "kvo"}
    return found | {f"{own}.{n}_norm.weight": Stored((f"{theirs}.{n}_norm.weight",), one_more) for n in "qk"}


def _experts(c: Qwen3NextConfig, own: str, theirs: str, packed: bool) -> dict[str, Stored]:
    def together(*parts: Tensor) -> Tensor:
        """Gates of all experts, then their ups."""
        import torch

        return interleaved(torch.stack(parts[: c.num_experts]), torch.stack(parts[c.num_experts :]))

    def stacked(*parts: Tensor) -> Tensor:
        import torch

        return torch.stack(parts)

    def none_said() -> Tensor:
        """Nothing is added for balance."""
        import torch

        return torch.zeros(c.num_experts)

    shared = tuple(f"{theirs}.shared_expert.{name}_proj.weight" for name in ("gate", "up"))
    found = {
        f"{own}.router.weight": Stored((f"{theirs}.gate.weight",)),
        f"{own}.balance_bias": Stored((), none_said),
        f"{own}.shared_gate_up_proj.weight": Stored(shared, interleaved),
        f"{own}.shared_down_proj.weight": Stored((f"{theirs}.shared_expert.down_proj.weight",)),
        f"{own}.shared_gate_proj.weight": Stored((f"{theirs}.shared_expert_gate.weight",)),
    }
    if packed:
        found[f"{own}.gate_up_proj"] = Stored(
            (f"{theirs}.experts.gate_up_proj",), lambda w: interleaved(*w.chunk(2, 1))
        )
        return found | {f"{own}.down_proj": Stored((f"{theirs}.experts.down_proj",))}

    def each(name: str) -> tuple[str, ...]:
        return tuple(f"{theirs}.experts.{e}.{name}_proj.weight" for e in range(c.num_experts))

    found[f"{own}.gate_up_proj"] = Stored((*each("gate"), *each("up")), together)
    return found | {f"{own}.down_proj": Stored(each("down"), stacked)}
