"""Layers of mixers, one after the other, looped or not: what they keep, what replaces itself, and how a loop absorbs what stopped.

A layer is x + mixer(norm(x)), then x + mlp(norm(x)). With two mixers and `two_hop` (Rodimus+, arXiv 2410.06577, equation 13) what
the second one finds is read by the MLP alone, and is no part of the stream:

    x <- x + first(norm x);  y = x + second(norm x);  x <- x + mlp(norm y)

**In a loop** every iteration has rows and states of its own. A position that has stopped supplies its last rows to all deeper
iterations, those that a call does not run included (`KvPolicy` "repeat", rmse_edge/layers/stack.py): attention finds them as keys and
values, and recurrences absorb them. So every state has taken in every position, however a text is cut into calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rmse_edge.layers.convolution import ring_order
from rmse_edge.layers.experts import SparseExperts
from rmse_edge.layers.masks import causal_mask, ring_slots_mask, slots_mask
from rmse_edge.layers.norm import RMSNorm
from rmse_edge.layers.policy import KvPolicy
from rmse_edge.layers.rows import CallRows, KeptRows
from rmse_edge.layers.stack import Kind, Kinds
from rmse_edge.loop.contract import Replace, StateSpec, Tensors, TensorSpec
from rmse_edge.numbers import SLOTS, KvDtype

from .base import Call, Mixer, StateKind


class MixerRows:
    """`Rows` of one mixer, among those of all layers of a stack."""

    def __init__(self, rows: CallRows, prefix: str) -> None:
        self.rows, self.prefix = rows, prefix

    def add(self, name: str, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.rows.add(f"{self.prefix}{name}", rows)


class MixerLayer(nn.Module):
    """One layer; see the module."""

    def __init__(
        self, d_model: int, mixers: Sequence[Mixer], mlp: nn.Module | None, norm_eps: float, two_hop: bool = False
    ) -> None:
        """
        Args:
            mlp: a `SparseExperts`, or a layer (B, C, d) -> (B, C, d); None: the layer is its mixers.
        """
        super().__init__()
        self.two_hop = two_hop
        self.mixer_norms = nn.ModuleList(RMSNorm(d_model, norm_eps) for _ in mixers)
        self.mixers = nn.ModuleList(mixers)
        self.mlp_norm = None if mlp is None else RMSNorm(d_model, norm_eps)
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        k: int | Tensor,
        rows: Sequence[MixerRows],
        states: Sequence[Tensors],
        call: Call,
        active: Tensor | None,
    ) -> tuple[Tensor, list[Tensors]]:
        """
        Args:
            x: (B, C, d).
            rows, states: of each of its mixers.
            active: (B, C) bool, positions that have not stopped; None: all. What is given for others is not to be read.
        Returns:
            (x behind the layer; of each mixer the state after the call).
        """
        after, read = [], x
        for i, (norm, mixer) in enumerate(zip(self.mixer_norms, self.mixers)):
            y, new = mixer(norm(x), rows[i], states[i], call)
            after.append(new)
            read = x + y
            if not (self.two_hop and i + 1 == len(self.mixers)):
                x = read
        if self.mlp is None or self.mlp_norm is None:
            return x, after
        entering = self.mlp_norm(read)
        if not isinstance(self.mlp, SparseExperts):
            return x + self.mlp(entering), after
        found = self.mlp(entering, k, active)
        # Of rows that are not computed experts may give anything: nothing is added to these.
        return x + (found if active is None else torch.where(active.unsqueeze(-1), found, 0.0)), after


class MixerStack(nn.Module):
    """Layers, which are registered where the model has them, and what they keep."""

    def __init__(
        self,
        layers: Sequence[MixerLayer],
        first: int = 0,
        max_loops: int | None = None,
        policy: KvPolicy = "all",
        kv_dtype: KvDtype = "float32",
    ) -> None:
        """
        Args:
            first: the number of the first layer in the model, for names.
            max_loops: K; None: the stack is not looped.
            policy: "repeat" or "all", of a stack that is looped.
        """
        super().__init__()
        self.layers, self.first, self.max_loops = tuple(layers), first, max_loops  # a tuple is not registered
        named = []
        for prefix, mixer in self._named():
            for kind in mixer.kept:
                cache = None if kind.cache is None else f"{prefix}{kind.cache}"
                named.append(replace(kind, name=f"{prefix}{kind.name}", cache=cache))
        self.rows = KeptRows(tuple(named), max_loops, policy, kv_dtype)

    def _named(self) -> list[tuple[str, Mixer]]:
        """All mixers, and how the names of what each keeps begin."""
        found = []
        for i, layer in enumerate(self.layers, self.first):
            for j, mixer in enumerate(layer.mixers):
                assert isinstance(mixer, Mixer)
                found.append((f"layer{i}_{j}_" if j else f"layer{i}_", mixer))
        return found

    # ------------------------------------------------------------------------------------------------ what hosts see

    @property
    def kinds(self) -> Kinds:
        """Of its attention, each once."""
        found = (mixer.kind for _, mixer in self._named())
        return tuple(dict.fromkeys(kind for kind in found if kind is not None))

    @property
    def ordered(self) -> tuple[int, ...]:
        """The sizes of its rings that are read in the order of their positions."""
        return tuple(dict.fromkeys(kind.ring for kind in self.rows.kinds if kind.ordered and kind.ring))

    def state(self, capacity: int, reader: str) -> tuple[StateSpec, ...]:
        """past_X of every kind of rows and every state, filled from X."""
        first = () if self.max_loops is None else (self.max_loops,)
        by = (reader,) if self.max_loops is None else (reader, "commit")
        replaced = tuple(
            StateSpec(
                f"past_{name}", (*first, 1, *kind.shape), torch.float32, len(first), Replace(name), by, bool(first)
            )
            for name, kind in self._states()
        )
        return (*self.rows.state("", capacity, (reader,)), *replaced)

    def _states(self) -> list[tuple[str, StateKind]]:
        return [(f"{prefix}{kind.name}", kind) for prefix, mixer in self._named() for kind in mixer.states]

    def given(self, chunk: int) -> tuple[TensorSpec, ...]:
        """X of every kind of rows and every state after a call: what the state is filled from."""
        first = () if self.max_loops is None else (self.max_loops,)
        replaced = (TensorSpec(name, (*first, 1, *kind.shape), batch_axis=len(first)) for name, kind in self._states())
        return (*self.rows.kept_specs("", chunk, self.max_loops), *replaced)

    # ------------------------------------------------------------------------------------------------ computation

    def forward(
        self,
        x: Tensor,
        k: int | Tensor,
        past: Tensors | None,
        call: Call,
        active: Tensor | None = None,
        held: Tensors | None = None,
    ) -> tuple[Tensor, Tensors, Tensors]:
        """Through all layers.

        Args:
            x: (B, C, d).
            k: the loop, from 0; 0 outside loops.
            past: past_X of every kind and every state, of loop k; None: nothing before.
            call: with what `of_call` gives; without a past, `of_rows`.
            active: (B, C) bool, positions that have not stopped; None: all.
            held: rows by name, of which stopped positions keep theirs.
        Returns:
            (x behind the last layer; the rows of the call; the states after it, of a loop or without a past none; by name).
        """
        order = {} if past is None else {size: call.fixed[f"ring_order_{size}"] for size in self.ordered}
        before = None
        if past is not None:
            before = {name.removeprefix("past_"): t for name, t in past.items() if name.startswith("past_")}
        rows = self.rows.of_call(k, before, order, active, held)
        leaves = self.max_loops is None and past is not None
        call = call._replace(leaves=leaves)
        every = iter(self._named())
        after: Tensors = {}
        for layer in self.layers:
            own = [next(every) for _ in layer.mixers]
            states = [
                {
                    kind.name: x.new_zeros(len(x), *kind.shape) if before is None else before[f"{prefix}{kind.name}"]
                    for kind in mixer.states
                }
                for prefix, mixer in own
            ]
            x, new = layer(x, k, [MixerRows(rows, prefix) for prefix, _ in own], states, call, active)
            if leaves:
                after |= {f"{prefix}{name}": t for (prefix, _), found in zip(own, new) for name, t in found.items()}
        return x, rows.rows(""), after

    def absorbed(self, rows: Tensors, past: Tensors, call: Call) -> Tensors:
        """The states of all loops after a call, (K, B, ...) by name: every loop absorbs every position.

        Args:
            rows: of all loops, by name, (K, B, heads, C, width): of positions that stopped, and of loops that were not run,
                the last ones.
            past: past_X, (K, B, ...).
            call: with what `of_call` gives.
        """
        assert self.max_loops is not None
        loops = self.max_loops
        found: Tensors = {}
        every = call.of_loops(loops)
        for prefix, mixer in self._named():
            kinds = [kind for kind in mixer.kept if kind.absorbed]
            own = {kind.name: rows[f"{prefix}{kind.name}"].flatten(0, 1) for kind in kinds}
            before: dict[str, Tensor | None] = {}
            for kind in kinds:
                if kind.ring == 0:
                    continue
                slots = past[f"past_{prefix}{kind.name}"].flatten(0, 1)
                if kind.ordered:
                    slots = call.fixed[f"ring_order_{kind.ring}"].repeat(loops, 1, 1).unsqueeze(1) @ slots
                before[kind.name] = slots
            state = {kind.name: past[f"past_{prefix}{kind.name}"].flatten(0, 1) for kind in mixer.states}
            new = mixer.absorb(own, before, state, every)
            found |= {f"{prefix}{name}": t.unflatten(0, (loops, -1)) for name, t in new.items()}
        return found


def call_specs(stacks: Sequence[MixerStack], chunk: int, capacity: int) -> tuple[TensorSpec, ...]:
    """Of `of_call`."""
    found: list[TensorSpec] = []
    for kind in kinds_of(stacks):
        slots, axis = (capacity, 3) if kind.window is None else (kind.window, None)
        found.append(TensorSpec(kind("slots_mask"), (1, 1, chunk, slots), slots_axis=axis))
        found.append(TensorSpec(kind("causal_mask"), (1, 1, chunk, chunk)))
    sizes = dict.fromkeys(size for stack in stacks for size in stack.ordered)
    return (*found, *(TensorSpec(f"ring_order_{size}", (1, size, size)) for size in sizes))


def of_call(stacks: Sequence[MixerStack], tensors: Mapping[str, Tensor], count: int) -> Tensors:
    """What layers are told of a call of `count` rows: masks by kind of attention, and the order of rings."""
    position = tensors["position"]
    found = of_rows(stacks, tensors, count)
    for kind in kinds_of(stacks):
        name = kind("slots_mask")
        if kind.window is None:
            found[name] = slots_mask(position, count, tensors[SLOTS])
        else:
            found[name] = ring_slots_mask(position, count, kind.window, kind.window)
    for size in dict.fromkeys(size for stack in stacks for size in stack.ordered):
        found[f"ring_order_{size}"] = ring_order(position, size)
    return found


def of_rows(stacks: Sequence[MixerStack], tensors: Mapping[str, Tensor], count: int) -> Tensors:
    """What `of_call` says of the call itself: all that layers are told where there is nothing before it."""
    return {kind("causal_mask"): causal_mask(tensors["n_valid"], count, kind.window) for kind in kinds_of(stacks)} | {
        name: tensors[name] for name in ("cos", "sin") if name in tensors
    }


def kinds_of(stacks: Sequence[MixerStack]) -> tuple[Kind, ...]:
    """Of the attention in all of them, each once."""
    return tuple(dict.fromkeys(kind for stack in stacks for kind in stack.kinds))
