"""Layers one after the other, looped or not, whose keys and values lie side by side in one cache, as heads of one layer.

A stack that is looped must say what deeper loops find of a position that has stopped: its `KvPolicy`.

| policy      | keys and values of a position in loops that it did not run                                                |
|-------------|-----------------------------------------------------------------------------------------------------------|
| `propagate` | every layer's projection of the state that it stopped with: exact for the first layer of the block (CALM, Schuster et al. 2022, section 3.3) |
| `repeat`    | those of its last loop                                                                                    |
| `all`       | its own: the loops are computed, and of every position the state is kept that it stopped with. Exact, and saves nothing. |

With the first two, a call ends when its last position has stopped, and what the loops after it lack is filled in at its
end (`filled`); both give a text the same numbers however it is cut into calls. That is why an int8 cache with `repeat`
needs scales that all loops share: a number that was rounded once must stay what it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from rmse_edge.loop.contract import Append, StateSpec, Tensors, TensorSpec
from rmse_edge.numbers import KvDtype

from .cache import KeptKeysValues
from .dense import Pair

KvPolicy = Literal["propagate", "repeat", "all"]


class Layer(Protocol):
    """One layer: attention, then an MLP, with norms and residuals where the architecture has them."""

    def enter(self, x: Tensor) -> Tensor:
        """The stream (B, C, d) -> what attention reads."""

    def keys_values(self, entered: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        """(B, C, d) -> two of (B, G, C, hd)."""

    def __call__(
        self, x: Tensor, entered: Tensor, cos: Tensor, sin: Tensor, own: Pair, past: Pair | None, masks: Pair
    ) -> Tensor:
        """The stream behind the layer; the other arguments as in `FullAttention.forward`."""


class Stack(nn.Module):
    """Layers with one cache: (loops, B, L * G, S, hd) of keys and of values, or without the first axis outside a loop."""

    def __init__(
        self,
        layers: Iterable[nn.Module],
        n_kv_heads: int,
        head_dim: int,
        max_loops: int | None = None,
        policy: KvPolicy = "all",
        kv_dtype: KvDtype = "float32",
    ) -> None:
        """
        Args:
            n_kv_heads: G, of each layer.
            max_loops: K; None: the stack is not looped.
            policy: of a stack that is looped.
        """
        super().__init__()
        self.layers: Any = nn.ModuleList(layers)  # of `Layer`s
        self.n_kv_heads, self.head_dim, self.max_loops, self.policy = n_kv_heads, head_dim, max_loops, policy
        self.cache = KeptKeysValues(kv_dtype, max_loops or 1, self.heads)

    @property
    def heads(self) -> int:
        """Of the cache: those of all layers."""
        return len(self.layers) * self.n_kv_heads

    # ------------------------------------------------------------------------------------------------ what hosts see

    def call(self, chunk: int) -> tuple[int, ...]:
        """The shape of the keys of a call."""
        return (1, self.heads, chunk, self.head_dim)

    def state(self, prefix: str, capacity: int, reader: str) -> tuple[StateSpec, ...]:
        """Two appended tensors, past_PREFIXkeys and past_PREFIXvalues, filled from PREFIXkeys and PREFIXvalues."""
        slots = (1, self.heads, capacity, self.head_dim)
        looped = self.max_loops is not None
        shape = slots if self.max_loops is None else (self.max_loops, *slots)
        axis = 1 if looped else 0
        dtype = getattr(torch, self.cache.kv_dtype)
        names = (f"{prefix}keys", f"{prefix}values")
        return tuple(
            StateSpec(f"past_{name}", shape, dtype, axis, Append(name), (reader,), per_loop=looped) for name in names
        )

    def emits(self, chunk: int) -> tuple[TensorSpec, ...]:
        """What an iteration gives."""
        return tuple(TensorSpec(name, self.call(chunk)) for name in ("new_keys", "new_values"))

    def commits(self, chunk: int) -> tuple[TensorSpec, ...]:
        """What `filled` gives."""
        dtype = getattr(torch, self.cache.kv_dtype)
        return tuple(
            TensorSpec(name, (self.max_loops or 1, *self.call(chunk)), dtype, batch_axis=1)
            for name in ("keys", "values")
        )

    def carried(self, chunk: int) -> tuple[TensorSpec, ...]:
        """What its policy carries from iteration to iteration."""
        if self.policy != "repeat":
            return ()
        return tuple(TensorSpec(name, self.call(chunk)) for name in ("held_keys", "held_values"))

    def first_carry(self, like: Tensor) -> Tensors:
        """The first of `carried`, for states (B, C, d)."""
        if self.policy != "repeat":
            return {}
        # Zeros that are computed: a target would store those of a constant shape.
        zero = (like[..., :1] * 0).unsqueeze(1)  # (B, 1, C, 1)
        held = zero.repeat(1, self.heads, 1, self.head_dim)
        return {"held_keys": held, "held_values": held}

    # ------------------------------------------------------------------------------------------------ computation

    def forward(
        self,
        x: Tensor,
        k: int | Tensor,
        cos: Tensor,
        sin: Tensor,
        past: Pair | None,
        masks: Pair,
        active: Tensor | None = None,
        held: Tensors | None = None,
    ) -> tuple[Tensor, Pair]:
        """Through all layers.

        Args:
            x: (B, C, d), of stopped positions what they would enter the loop with.
            k: the loop, from 0; 0 outside loops.
            past: keys and values in slots, (B, L * G, S, hd) each, as the cache keeps them; None: nothing before.
            masks: of the slots and of the call.
            active: (B, C) bool, the positions that have not stopped; None: all. The others' result is not to be read.
            held: the tensors of `carried`, of which stopped positions keep theirs.
        Returns:
            (x behind the last layer, keys and values of the call, (B, L * G, C, hd) each).
        """
        entered_loop, groups = x, self.n_kv_heads
        cached = None if past is None else tuple(self.cache.from_cache(t, i, k, x.dtype) for i, t in enumerate(past))
        sides = [[None] * len(self.layers)] * 2 if cached is None else [t.split(groups, 1) for t in cached]
        kept = [t.split(groups, 1) for t in (held["held_keys"], held["held_values"])] if held else None
        stopped = None if active is None else active[:, :, None]
        found: list[Pair] = []
        for i, layer in enumerate(self.layers):
            if i and stopped is not None and self.policy == "propagate":
                x = torch.where(stopped, x, entered_loop)
            entered = layer.enter(x)
            heads = slice(i * groups, (i + 1) * groups)
            own = [
                self.cache.rounded(t, which, k, heads) for which, t in enumerate(layer.keys_values(entered, cos, sin))
            ]
            if kept is not None and stopped is not None:
                own = [torch.where(stopped.unsqueeze(1), new, old[i]) for new, old in zip(own, kept)]
            pair: Pair = (own[0], own[1])
            before: Any = None if cached is None else (sides[0][i], sides[1][i])
            x = layer(x, entered, cos, sin, pair, before, masks)
            found.append(pair)
        keys, values = (torch.cat(t, 1) for t in zip(*found))
        return x, (keys, values)

    def filled(self, tensors: Tensors, entering: Tensor) -> Tensors:
        """Keys and values of all loops, (K, B, L * G, C, hd) each, as the cache keeps them.

        Args:
            tensors: new_keys and new_values (K, B, L * G, C, hd), undefined from row `iterations` on; cos and sin.
            entering: (B, C, d) what positions would enter a loop with that they did not run.
        """
        assert self.max_loops is not None
        loops = torch.arange(self.max_loops, device=entering.device)
        new = [tensors[name] for name in ("new_keys", "new_values")]
        if self.policy == "propagate":
            own = [layer.keys_values(layer.enter(entering), tensors["cos"], tensors["sin"]) for layer in self.layers]
            ran = (loops < tensors["iterations"]).view(-1, 1, 1, 1, 1)
            rest = [self._rounded_of_all(torch.cat(t, 1), which) for which, t in enumerate(zip(*own))]
            new = [torch.where(ran, t, other) for t, other in zip(new, rest)]
        else:
            last = torch.minimum(loops, tensors["iterations"] - 1)
            new = [t.index_select(0, last) for t in new]
        return {name: self.cache.to_cache(t, which) for which, (name, t) in enumerate(zip(("keys", "values"), new))}

    def _rounded_of_all(self, x: Tensor, which: int) -> Tensor:
        """Keys or values (B, L * G, C, hd), alike in all loops, rounded as each loop does: (K or 1, B, L * G, C, hd)."""
        if self.cache.kv_dtype != "int8":
            return self.cache.rounded(x, which, 0).unsqueeze(0)
        loops = self.max_loops or 1
        return self.cache.rounded(x.expand(loops, *x.shape).flatten(0, 1), which, None).unflatten(0, (loops, -1))
