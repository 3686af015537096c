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
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rmse_edge.loop.contract import Append, StateSpec, Tensors, TensorSpec
from rmse_edge.numbers import PREFIX, SLOTS, KvDtype

from . import policy as of_policy
from .cache import KeptKeysValues
from .dense import Pair
from .masks import causal_mask, slots_mask
from .policy import KvPolicy


@dataclass(frozen=True)
class Kind:
    """A kind of attention layers: by which angles their heads turn, and how far back they see.

    Layers with a window mask slots of a cache that holds the whole text: what they compute is right, and no memory is saved.
    """

    name: str = ""  # ends the names of its angles and masks, "cos_NAME"; "": they have no ending
    window: int | None = None  # positions that are seen at most, the own one included; None: all

    def __call__(self, tensor: str) -> str:
        """The name of an angle or a mask for these layers."""
        return f"{tensor}_{self.name}" if self.name else tensor


FULL = Kind()
Kinds = tuple[Kind, ...]


def context(
    chunk: int, head_dim: int, capacity: int, kinds: Kinds = (FULL,), prefix: bool = False
) -> tuple[TensorSpec, ...]:
    """What hosts tell a call of a model with turned heads that attends to up to `capacity` positions.

    Args:
        prefix: a text may have a prefix whose positions all see each other.
    """
    angles = (1, chunk, head_dim // 2)
    return (
        *(TensorSpec(kind(name), angles) for kind in kinds for name in ("cos", "sin")),
        TensorSpec("position", (1,), torch.int64),
        TensorSpec("n_valid", (1,), torch.int64),
        TensorSpec(SLOTS, (capacity,), torch.int64, None, slots_axis=0),
        *((TensorSpec(PREFIX, (1,), torch.int64),) if prefix else ()),
    )


def mask_specs(chunk: int, capacity: int, kinds: Kinds = (FULL,)) -> tuple[TensorSpec, ...]:
    """Of `masks_of`."""
    found: list[TensorSpec] = []
    for kind in kinds:
        found.append(TensorSpec(kind("slots_mask"), (1, 1, chunk, capacity), slots_axis=3))
        found.append(TensorSpec(kind("causal_mask"), (1, 1, chunk, chunk)))
    return tuple(found)


def masks_of(tensors: Tensors, count: int, kinds: Kinds = (FULL,)) -> Tensors:
    """The masks of a call of `count` rows, of its `context`: of the slots and of the call, for each kind of layers."""
    found: Tensors = {}
    within = tensors[PREFIX] - tensors["position"] if PREFIX in tensors else None  # rows of this call
    for kind in kinds:
        found[kind("slots_mask")] = slots_mask(tensors["position"], count, tensors[SLOTS], kind.window)
        found[kind("causal_mask")] = causal_mask(tensors["n_valid"], count, kind.window, within)
    return found


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
    """Layers with one cache: (loops, B, L * G, S, hd) of keys and of values, or without the first axis outside a loop.

    With `shared`, all loops read one set of slots, which holds of every position what its last loop gave: they attend to
    that of the positions before the call, and to their own of the call. So it matters how a text is cut into calls, and a
    model that does this has calls of one size.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        n_kv_heads: int,
        head_dim: int,
        max_loops: int | None = None,
        policy: KvPolicy = "all",
        kv_dtype: KvDtype = "float32",
        kinds: Kinds | None = None,
        shared: bool = False,
    ) -> None:
        """
        Args:
            n_kv_heads: G, of each layer.
            max_loops: K; None: the stack is not looped.
            policy: of a stack that is looped.
            kinds: of each layer; None: all see everything.
            shared: the loops have one set of slots, with the policy "repeat".
        """
        super().__init__()
        self.layers: Any = nn.ModuleList(layers)  # of `Layer`s
        self.n_kv_heads, self.head_dim, self.max_loops, self.policy = n_kv_heads, head_dim, max_loops, policy
        self.kinds = kinds or (FULL,) * len(self.layers)
        assert not shared or policy == "repeat"
        self.shared = shared
        self.sets = None if shared else max_loops  # of slots, one for each loop; None: there is one
        # A stopped position supplies to deeper loops what its last one has rounded.
        self.cache = KeptKeysValues(kv_dtype, self.sets or 1, self.heads, shares_scales=policy == "repeat")

    @property
    def own_kinds(self) -> Kinds:
        """Of its layers, each once."""
        return tuple(dict.fromkeys(self.kinds))

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
        loops = () if self.sets is None else (self.sets,)
        shape = (*loops, 1, self.heads, capacity, self.head_dim)
        dtype = getattr(torch, self.cache.kv_dtype)
        return tuple(
            StateSpec(f"past_{name}", shape, dtype, len(loops), Append(name), (reader,), per_loop=bool(loops))
            for name in (f"{prefix}keys", f"{prefix}values")
        )

    def emits(self, chunk: int) -> tuple[TensorSpec, ...]:
        """What an iteration gives."""
        return tuple(TensorSpec(name, self.call(chunk)) for name in ("new_keys", "new_values"))

    def commits(self, chunk: int) -> tuple[TensorSpec, ...]:
        """What `filled` gives."""
        dtype = getattr(torch, self.cache.kv_dtype)
        shape, batch_axis = (self.call(chunk), 0) if self.shared else ((self.max_loops or 1, *self.call(chunk)), 1)
        return tuple(TensorSpec(name, shape, dtype, batch_axis) for name in ("keys", "values"))

    def carried(self, chunk: int, width: int) -> tuple[TensorSpec, ...]:
        """What its policy carries from iteration to iteration, beside h (1, C, width) and active."""
        held = (TensorSpec(name, self.call(chunk)) for name in ("held_keys", "held_values"))
        return of_policy.carried(self.policy, chunk, width, held)

    # ------------------------------------------------------------------------------------------------ the loop's carry

    def first_carry(self, h: Tensor, valid: Tensor) -> Tensors:
        """The first carry: h (B, C, d), active, and what is `carried`.

        Args:
            valid: (B, C) bool, rows that are not padding.
        """
        held = {"held_keys": (nothing := self.nothing_held(h)), "held_values": nothing}
        return of_policy.first_carry(self.policy, h, valid, held)

    def nothing_held(self, like: Tensor) -> Tensor:
        """Keys or values that no position has held yet, (B, L * G, C, hd), for states (B, C, d)."""
        return of_policy.nothing(like, self.heads, self.head_dim)

    def entering(self, carry: Tensors) -> tuple[Tensor, Tensor]:
        """What the iteration begins with, (B, C, d), and which positions have not stopped, (B, C) bool."""
        return of_policy.entering(self.policy, carry)

    def iterate(
        self, x: Tensor, k: int | Tensor, carry: Tensors, past: Tensors, fixed: Tensors, runs: Tensor
    ) -> tuple[Tensor, Pair]:
        """One iteration of `step`: `forward` as the policy has it.

        Args:
            past: row k of `state("", ...)`.
            fixed: what `context` and `masks_of` give and, where the loops share it, the state.
            runs: from `entering`.
        """
        kept = fixed if self.shared else past
        return self(
            x,
            0 if self.shared else k,
            fixed,
            (kept["past_keys"], kept["past_values"]),
            None if self.policy == "all" else runs,
            carry if self.policy == "repeat" else None,
        )

    def next_carry(self, carry: Tensors, h: Tensor, after: Tensor, runs: Tensor, stop: Tensor, pair: Pair) -> Tensors:
        """The carry after an iteration.

        Args:
            h: of every position the state that it has, or stopped with.
            after: what the iteration gave, also of positions that had stopped.
            runs: from `entering`.
            stop: which of them stop now.
            pair: keys and values of the iteration.
        """
        held = {"held_keys": pair[0], "held_values": pair[1]}
        return of_policy.next_carry(self.policy, carry, h, after, runs, stop, held)

    # ------------------------------------------------------------------------------------------------ computation

    def forward(
        self,
        x: Tensor,
        k: int | Tensor,
        fixed: Tensors,
        past: Pair | None,
        active: Tensor | None = None,
        held: Tensors | None = None,
    ) -> tuple[Tensor, Pair]:
        """Through all layers.

        Args:
            x: (B, C, d), of stopped positions what they would enter the loop with.
            k: the loop, from 0; 0 outside loops, and where they share the slots.
            fixed: what `context` and `masks_of` give.
            past: keys and values in slots, (B, L * G, S, hd) each, as the cache keeps them; None: nothing before.
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
        for i, (layer, kind) in enumerate(zip(self.layers, self.kinds)):
            cos, sin = fixed[kind("cos")], fixed[kind("sin")]
            masks = fixed[kind("slots_mask")], fixed[kind("causal_mask")]
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
        """Keys and values of all loops, (K, B, L * G, C, hd) each, as the cache keeps them; of the last alone, without
        the first axis, where the loops share the slots.

        Args:
            tensors: new_keys and new_values (K, B, L * G, C, hd), undefined from row `iterations` on; cos and sin.
            entering: (B, C, d) what positions would enter a loop with that they did not run.
        """
        assert self.max_loops is not None
        new = [tensors[name] for name in ("new_keys", "new_values")]
        if self.shared:
            last = (tensors["iterations"] - 1).reshape(1)
            new = [t.index_select(0, last) for t in new]
            pairs = zip(("keys", "values"), new)
            return {name: self.cache.to_cache(t, which).squeeze(0) for which, (name, t) in enumerate(pairs)}
        if self.policy == "propagate":
            own = [
                layer.keys_values(layer.enter(entering), tensors[kind("cos")], tensors[kind("sin")])
                for layer, kind in zip(self.layers, self.kinds)
            ]
            loops = torch.arange(self.max_loops, device=entering.device)
            ran = (loops < tensors["iterations"]).view(-1, 1, 1, 1, 1)
            rest = [self._rounded_of_all(torch.cat(t, 1), which) for which, t in enumerate(zip(*own))]
            new = [torch.where(ran, t, other) for t, other in zip(new, rest)]
            if self.cache.observer is not None:  # has not heard of loops that did not run
                for which, t in enumerate(new):
                    for k in range(int(tensors["iterations"]), self.max_loops):
                        self.cache.observer(t[k], which, k, None)
        else:
            new = [of_policy.of_all_loops(t, tensors["iterations"], self.max_loops) for t in new]
        return {name: self.cache.to_cache(t, which) for which, (name, t) in enumerate(zip(("keys", "values"), new))}

    def _rounded_of_all(self, x: Tensor, which: int) -> Tensor:
        """Keys or values (B, L * G, C, hd), alike in all loops, rounded as each loop does: (K or 1, B, L * G, C, hd)."""
        if self.cache.kv_dtype != "int8":
            return self.cache.rounded(x, which, None).unsqueeze(0)
        loops = self.max_loops or 1
        return self.cache.rounded(x.expand(loops, *x.shape).flatten(0, 1), which, None).unflatten(0, (loops, -1))
