"""How published checkpoints of BD3-LM hold its tensors: queries, keys and values joined, and modulations beside the layers.

Published layers are modulated ("adaLN", Peebles & Xie 2022, arXiv 2212.09748, section 3.2) by a vector that is made of the noise
level. With time conditioning off, as in all published models, that level is always given as 0: the vector is the same for
every input, and so are the shift, the scale and the gate that each branch gets of it. They are multiplied into the norm
before the branch and the matrix behind it when a checkpoint is read, and nothing is left of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rmse_edge.arch.registry import Stored

from .config import Bd3lmConfig

if TYPE_CHECKING:
    from torch import Tensor

FREQUENCIES = 256  # of the embedding of a noise level
CONDITION = tuple(f"sigma_map.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias"))


def stored(c: Bd3lmConfig) -> list[Mapping[str, Stored]]:
    """The model's tensors that published checkpoints hold otherwise: as trained, and as released with transformers."""
    return [_named(c, ""), _named(c, "backbone.")]


def _named(c: Bd3lmConfig, prefix: str) -> Mapping[str, Stored]:
    condition = tuple(prefix + name for name in CONDITION)

    def modulated(layer: str, which: int, of: tuple[str, ...], make: Callable[..., Tensor]) -> Stored:
        """What `make` gives of a modulation (d,), number `which` of those of a layer, and the tensors `of`."""
        joined = tuple(f"{prefix}{layer}.adaLN_modulation.{kind}" for kind in ("weight", "bias"))

        def made(*tensors: Tensor) -> Tensor:
            vector = condition_of(*tensors[:4])
            weight, bias = (t.unflatten(0, (-1, c.hidden_dim))[which].double() for t in tensors[4:6])
            return make((weight @ vector + bias).float(), *tensors[6:])

        return Stored((*condition, *joined, *(prefix + name for name in of)), made)

    def norm(own: str, layer: str, name: str, first: int) -> dict[str, Stored]:
        """norm(x) * (1 + scale) + shift."""
        weight = (f"{layer}.{name}.weight",)
        return {
            f"{own}.weight": modulated(layer, first + 1, weight, lambda scale, w: w * (1 + scale)),
            f"{own}.bias": modulated(layer, first, (), lambda shift: shift),
        }

    found = {"embed_tokens.weight": Stored((f"{prefix}vocab_embed.embedding",))}
    for i in range(c.n_blocks):
        own, theirs = f"stack.layers.{i}", f"blocks.{i}"
        for n, name in enumerate("qkv"):
            found[f"{own}.attn.{name}_proj.weight"] = Stored((f"{prefix}{theirs}.attn_qkv.weight",), _third(n))
        found |= norm(f"{own}.attn_norm", theirs, "norm1", 0)
        found |= norm(f"{own}.mlp_norm", theirs, "norm2", 3)
        scaled: Callable[[Tensor, Tensor], Tensor] = lambda gate, w: gate.view(-1, *[1] * (w.dim() - 1)) * w  # noqa: E731
        found[f"{own}.attn.o_proj.weight"] = modulated(theirs, 2, (f"{theirs}.attn_out.weight",), scaled)
        for kind in ("weight", "bias"):
            found[f"{own}.mlp.up_proj.{kind}"] = Stored((f"{prefix}{theirs}.mlp.0.{kind}",))
            found[f"{own}.mlp.down_proj.{kind}"] = modulated(theirs, 5, (f"{theirs}.mlp.2.{kind}",), scaled)
    for kind in ("weight", "bias"):
        found[f"lm_head.{kind}"] = Stored((f"{prefix}output_layer.linear.{kind}",))
    return found | norm("norm", "output_layer", "norm_final", 0)


def _third(n: int) -> Callable[[Tensor], Tensor]:
    return lambda w: w.chunk(3)[n]


def condition_of(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The vector (cond_dim,) that the noise level 0 becomes: of its embedding, cosines are 1 and sines 0.

    In float64, so that the weights which are made of it do not hang on the order in which a machine adds.
    """
    import torch
    from torch.nn.functional import silu

    w1, b1, w2, b2 = (t.double() for t in (w1, b1, w2, b2))
    embedding = torch.cat([w1.new_ones(FREQUENCIES // 2), w1.new_zeros(FREQUENCIES // 2)])
    return silu(w2 @ silu(w1 @ embedding + b1) + b2)
