"""Gated grouped-query attention over a bounded window: RoPE, QK norm, output gate.

RMSNorm on Q and K follows Henry et al. 2020 (Query-Key Normalization); the sigmoid output gate, per head or per channel,
follows Qiu et al. 2025 (Gated Attention for LLMs).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmse_edge.numbers import KvDtype

from .attend import attend
from .cache import KeptKeysValues, table_row
from .norm import RMSNorm
from .rope import inverse_frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i with channel i + hd/2 by the given angles (the half-rotate layout).

    Args:
        x: (B, H, C, hd) queries or keys.
        cos, sin: (B or 1, 1, C, hd/2).
    """
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@torch.library.custom_op("rmse_edge::rotary", mutates_args=())
def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` as one operator, which targets lower to their own: in a graph it is eight small nodes otherwise."""
    return rotate(x, cos, sin)


@rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.empty_like(x)


# Keys or values: of all positions, or of those before a call, if there are any, and of the call.
Seen = Any  # Tensor | tuple[Tensor | None, Tensor]


class Attention(KeptKeysValues):
    """Projects, turns, attends and gates. Keys and values are returned so that the caller owns the cache."""

    step_cos: Tensor  # (K, step_dims / 2), with step_dims
    step_sin: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        max_loops: int,
        gate: str = "headwise",
        step_dims: int = 0,
        kv_dtype: KvDtype = "float32",
        norm_eps: float = 1e-6,
    ) -> None:
        """
        Args:
            n_kv_heads: a divisor of n_heads.
            max_loops: K, the trained depth.
            gate: the output gate: one sigmoid per head ("headwise") or per channel ("elementwise").
            step_dims: channels of each head that turn with the loop index, even; 0: none.
            kv_dtype: keys and values are rounded to it before any use: "float32", "float16" or "int8".
        """
        super().__init__(kv_dtype, max_loops, n_kv_heads)
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.gate, self.step_dims = gate, step_dims
        self.rotary_operator = True  # in graphs; a target that has none of its own sets it to False
        self.attention_operator = False  # in graphs; a target that has one of its own sets it to True
        self.q_proj = nn.Linear(d_model, n_heads * head_dim, bias=False)
        self.kv_proj = nn.Linear(d_model, 2 * n_kv_heads * head_dim, bias=False)
        self.gate_proj = nn.Linear(d_model, n_heads * (head_dim if gate == "elementwise" else 1), bias=False)
        self.o_proj = nn.Linear(n_heads * head_dim, d_model, bias=False)
        self.q_norm = RMSNorm(head_dim, norm_eps)
        self.k_norm = RMSNorm(head_dim, norm_eps)
        for name, table in self.tables().items():
            self.register_buffer(name, table, persistent=False)

    def tables(self) -> dict[str, Tensor]:
        """The buffers that follow from the numbers alone, and that no checkpoint holds: (K, step_dims / 2) each."""
        if not self.step_dims:
            return {}
        # Loop k turns the reserved channels by k * frequency, fastest one radian per loop. Q and K of one loop meet
        # only each other, so turning both the same way would cancel in q.k: K turns the opposite way.
        loops = torch.arange(self.max_loops, dtype=torch.float64, device="cpu")[:, None]  # as NumPy's
        angle = loops * torch.from_numpy(inverse_frequencies(self.step_dims, float(self.max_loops)))
        return {"step_cos": angle.cos().float(), "step_sin": angle.sin().float()}

    def angles(self, k: int | Tensor | None, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        """Position angles (B, C, rotary/2), completed by loop k's own where channels are reserved for them.

        With k None, the angles of all loops: (K * B, 1, C, hd/2), loops outermost.
        """
        if self.step_dims:
            tables = (self.step_cos, sign * self.step_sin)
            if k is None:
                loops = self.max_loops
                cos, sin = (a.expand(loops, *a.shape) for a in (cos, sin))  # (K, B, C, rotary/2)
                steps = [t.view(loops, 1, 1, -1).expand(*cos.shape[:-1], -1) for t in tables]
            else:
                steps = [table_row(t, k).expand(*cos.shape[:-1], -1) for t in tables]
            cos, sin = (torch.cat(pair, -1).flatten(0, -3) for pair in ((cos, steps[0]), (sin, steps[1])))
        elif k is None:
            loops = self.max_loops
            cos, sin = (a.expand(loops, *a.shape).flatten(0, 1) for a in (cos, sin))
        return cos.unsqueeze(1), sin.unsqueeze(1)  # (B, 1, C, hd/2)

    def keys_values(self, x: Tensor, k: int | Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of loop k for normed states x (B, C, d), each (B, G, C, hd), rounded to the cache's type.

        With k None, x is (K * B, C, d): every loop's own states, loops outermost.
        """
        batch, count, _ = x.shape
        kv = self.kv_proj(x).view(batch, count, 2, self.n_kv_heads, self.head_dim)
        keys, values = (t.transpose(1, 2) for t in kv.unbind(2))  # (B, G, C, hd)
        keys = self.turn(self.k_norm(keys), *self.angles(k, cos, sin, -1.0))
        return self.rounded(keys, 0, k), self.rounded(values, 1, k)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`rotate`, in a graph as one operator."""
        return (rotary if torch.compiler.is_exporting() and self.rotary_operator else rotate)(x, cos, sin)

    def seen(self, past: tuple[Tensor, Tensor] | None, own: tuple[Tensor, Tensor]) -> tuple[Seen, ...]:
        """Keys and values of what was before a call and of the call itself, as `forward` takes them."""
        if torch.compiler.is_exporting() and self.attention_operator:
            return tuple((None if past is None else past[i], own[i]) for i in range(2))
        return own if past is None else tuple(torch.cat([p, n], 2) for p, n in zip(past, own))

    def forward(
        self, x: Tensor, k: int | Tensor, cos: Tensor, sin: Tensor, keys: Seen, values: Seen, mask: Tensor
    ) -> Tensor:
        """Attend from x.

        Args:
            x: (B, C, d) normed states.
            keys, values: (B, G, S, hd), every position that may be seen; or in two parts, for the operator.
            mask: (B or 1, 1, C, S), 0 where seen and `MASKED` elsewhere.
        Returns:
            (B, C, d).
        """
        batch, count, _ = x.shape
        groups, hd = self.n_kv_heads, self.head_dim
        query = self.q_norm(self.q_proj(x).view(batch, count, -1, hd)).transpose(1, 2)  # (B, H, C, hd)
        query = self.turn(query, *self.angles(k, cos, sin, 1.0))
        if isinstance(keys, tuple):
            past = None if keys[0] is None else (keys[0], values[0])
            slots = mask.shape[-1] - count
            out = attend(query, (keys[1], values[1]), past, (mask[..., :slots], mask[..., slots:]), operator=True)
        elif torch.compiler.is_exporting():
            # Heads of a group share their keys: fold them into the rows of one plain matmul instead of repeating K and V.
            rows = query.reshape(batch, groups, -1, hd)  # (B, G, H/G * C, hd)
            scores = torch.matmul(rows, keys.transpose(2, 3)) * hd**-0.5
            scores = scores.view(batch, groups, -1, count, keys.shape[2]) + mask.unsqueeze(2)
            weights = torch.softmax(scores, -1).view(batch, groups, -1, keys.shape[2])
            out = torch.matmul(weights, values).view(batch, -1, count, hd)
        else:
            repeat = self.n_heads // groups
            keys, values = (t.repeat_interleave(repeat, 1) for t in (keys, values))
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask.to(query.dtype))
        gate = torch.sigmoid(self.gate_proj(x))
        if self.gate == "headwise":
            out = out * gate.transpose(1, 2).unsqueeze(-1)  # (B, H, C, 1)
        out = out.transpose(1, 2).reshape(batch, count, -1)  # (B, C, H * hd)
        if self.gate == "elementwise":
            out = out * gate
        return self.o_proj(out)
