"""Recurrent depth: a prelude of layers, a core of layers that is applied up to K times, a coda of layers, and a head.

    x0 = prelude(embed(tokens))
    s = the first state
    for k = 1..K:
        s = core(inject(s, x0))
        stop a position by one of its exit rules
    logits = head(coda(s))

Source: Geiping et al. 2025, Scaling up Test-Time Compute with Latent Reasoning, arXiv 2502.05171, section 3. An architecture
gives its layers, the first state, the injection and the norms around the coda.

**Exit rules** are those of rmse_edge/arch/common/exits.py. Those that read predictions evaluate the coda and the head in every loop.
There the coda of loop k reads, of all positions, the coda's keys and values of loop k, which are kept per loop like those of
the core; a position that has stopped supplies those of its last loop. So a text gives the same numbers however it is cut into
calls. The coda behind the loop has a cache of its own. Where the loops of the core share one set of slots, the coda's do,
too: it is that behind the loop.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rmse_edge.errors import ConfigError
from rmse_edge.layers.dense import Pair
from rmse_edge.layers.policy import of_all_loops
from rmse_edge.layers.stack import Kinds, Stack, context, mask_specs, masks_of
from rmse_edge.layers.trajectory import of_one_text, trajectory, whole_masks
from rmse_edge.loop.contract import Append, InjectedHits, LoopSpec, StateSpec, Tensors, TensorSpec, WholeText
from rmse_edge.loop.course import Stop, Watcher
from rmse_edge.loop.generator import starts
from rmse_edge.loop.predictions import carried
from rmse_edge.loop.whole import in_one_call
from rmse_edge.numbers import SEGMENT

from .exits import ExitRules

EXITS = ("exit_keys", "exit_values")  # of the coda in every loop
HELD = ("held_keys", "held_values")


class Stacks(NamedTuple):
    """The layers of a model."""

    prelude: Stack
    core: Stack
    coda: Stack


class RecurrentDepth(ExitRules, ABC):
    """The model, as a `TextModel` for runtimes and exporters and as a trajectory of states for training."""

    # Inputs of noise that the first state is made of: their standard deviation.
    noise: Mapping[str, float] = {}

    def __init__(self, config: Any, width: int, capacity: int) -> None:
        """
        Args:
            config: a `RecurrentConfig` that is a `DenseConfig` as well.
            width: channels of a state, d.
            capacity: positions of a text, at most.
        """
        super().__init__(config, width)
        self.capacity = capacity

    # ------------------------------------------------------------------------------------ what an architecture gives

    @property
    @abstractmethod
    def stacks(self) -> Stacks: ...

    @abstractmethod
    def angles(self, positions: np.ndarray) -> Mapping[str, np.ndarray]:
        """What a host tells a call of these positions, (C,): cos and sin of each kind of attention, (C, hd/2)."""

    @abstractmethod
    def embedded(self, tokens: Tensor) -> Tensor:
        """(B, C) int64 -> what the prelude reads, (B, C, d)."""

    def drawn(self, tensors: Tensors) -> Tensors:
        """`first_state` (B, C, d), of a model that begins from noise."""
        return {}

    @abstractmethod
    def first_state(self, tensors: Tensors) -> Tensor:
        """What the loop begins from, (B, C, d), of what `prelude` gave."""

    @abstractmethod
    def injected(self, state: Tensor, x0: Tensor) -> Tensor:
        """What a loop enters the core with, (B, C, d)."""

    def into_coda(self, h: Tensor) -> Tensor:
        """(B, C, d) -> what the coda's layers read."""
        return h

    def out_of_coda(self, y: Tensor) -> Tensor:
        """(B, C, d) -> what the head reads."""
        return y

    @abstractmethod
    def logits(self, y: Tensor) -> Tensor:
        """(B, C, d) -> (B, C, V)."""

    # -------------------------------------------------------------------------------------------------------- caches

    @property
    def kinds(self) -> Kinds:
        """Of the attention in all layers, each once."""
        return tuple(dict.fromkeys(kind for stack in self.stacks for kind in stack.own_kinds))

    # ----------------------------------------------------------------------------------------------------- LoopModel

    def call_sizes(self) -> tuple[int, ...]:
        if self.stacks.core.shared:
            return (1,)
        return tuple(dict.fromkeys((1, min(SEGMENT, self.capacity))))

    def spec(self, chunk: int) -> LoopSpec:
        c, stacks, capacity = self.config, self.stacks, self.capacity
        most = 1 if stacks.core.shared else capacity
        if not 1 <= chunk <= most:
            raise ConfigError(f"chunk: got {chunk}, expected 1..{most}, the positions of a call")
        vector, where = (1, chunk, self.width), context(chunk, c.head_width, capacity, self.kinds)
        dtype, of_coda = getattr(torch, c.kv_dtype), stacks.coda.call(chunk)
        exits = EXITS if self.compares and not stacks.core.shared else ()
        (of_slots, _), coda_state = stacks.coda.state("coda_", capacity, "coda"), self._coda_state(capacity)
        return LoopSpec(
            chunk=chunk,
            max_loops=c.max_loops,
            inputs=(
                TensorSpec("tokens", (1, chunk), torch.int64),
                *(TensorSpec(name, vector) for name in self.noise),
                *where,
            ),
            prelude=(
                TensorSpec("x0", vector),
                *(TensorSpec("first_state", vector) for _ in self.noise),
                *(TensorSpec(f"prelude_{name}", stacks.prelude.call(chunk), dtype) for name in ("keys", "values")),
            ),
            context=where,
            state=(
                *stacks.prelude.state("prelude_", capacity, "prelude"),
                *stacks.core.state("", capacity, "loop"),
                *(StateSpec(f"past_{n}", (c.max_loops, *of_slots.shape), dtype, 1, Append(n)) for n in exits),
                *coda_state,
            ),
            h=TensorSpec("h", vector),
            active=TensorSpec("active", (1, chunk), torch.bool),
            carry=(
                *((TensorSpec("log_survival", (1, chunk)),) if c.gated else ()),
                *stacks.core.carried(chunk, self.width),
                *(() if c.kv_policy == "all" else (TensorSpec(f"held_{n}", of_coda) for n in exits)),
                *carried(c.rules, chunk, c.vocab_size),
            ),
            invariants=mask_specs(chunk, capacity, self.kinds),
            emits=(*stacks.core.emits(chunk), *(TensorSpec(f"new_{n}", of_coda) for n in exits)),
            coda=(
                TensorSpec("y", vector),
                *(TensorSpec(f"coda_{name}", of_coda, dtype) for name in ("keys", "values")),
            ),
            head=(TensorSpec("logits", (1, chunk, c.vocab_size)),),
            commit=(
                *stacks.core.commits(chunk),
                *(TensorSpec(n, (c.max_loops, *of_coda), dtype, batch_axis=1) for n in exits),
            ),
            dials=("max_loops", "min_loops", *c.rules),
            noise=self.noise,
            ids={"tokens": c.vocab_size},
            examples={"position": [min(40, capacity - chunk)], "n_valid": [max(1, chunk - 3)]},
        )

    def _coda_state(self, capacity: int) -> tuple[StateSpec, ...]:
        found = self.stacks.coda.state("coda_", capacity, "coda")
        if not (self.compares and self.stacks.core.shared):
            return found
        return tuple(dataclasses.replace(s, read_by=("loop", "coda")) for s in found)

    def prelude(self, tensors: Tensors) -> Tensors:
        stack = self.stacks.prelude
        x = self.embedded(tensors["tokens"])
        past = tensors["past_prelude_keys"], tensors["past_prelude_values"]
        x, pair = stack(x, 0, tensors | masks_of(tensors, x.shape[1], stack.own_kinds), past)
        return {"x0": x} | kept(stack, pair, "prelude_") | self.drawn(tensors)

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        x0, (_, core, coda) = tensors["x0"], self.stacks
        count = x0.shape[1]
        valid = torch.arange(count, device=x0.device) < tensors["n_valid"][:, None]  # (B, C)
        carry = core.first_carry(self.first_state(tensors), valid)
        if self.compares and not core.shared and self.config.kv_policy != "all":
            held = coda.nothing_held(x0)
            carry |= {"held_exit_keys": held, "held_exit_values": held}
        carry |= self.first_of_rules(x0, self.config.vocab_size)
        return carry, masks_of(tensors, count, self.kinds)

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        core = self.stacks.core
        before, runs = core.entering(carry)
        after, pair = core.iterate(self.injected(before, fixed["x0"]), k, carry, past, fixed, runs)
        h = torch.where(runs.unsqueeze(-1), after, carry["h"])
        new: Tensors = {}
        emitted = {"new_keys": pair[0], "new_values": pair[1]}
        logits = None
        if self.compares:
            y, of_coda = self._coda_in_loop(after, h, carry, past, fixed, runs)
            logits = self.logits(self.out_of_coda(y))
            if not core.shared:
                for name, t in zip(EXITS, of_coda):
                    emitted[f"new_{name}"] = t
                    new |= {} if self.config.kv_policy == "all" else {f"held_{name}": t}
        stop, of_rules = self.judged(k, carry, before, after, runs, dials, logits)
        return new | of_rules | core.next_carry(carry, h, after, runs, stop, pair), emitted

    def _coda_in_loop(
        self, after: Tensor, h: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, runs: Tensor
    ) -> tuple[Tensor, Pair]:
        """The coda of one loop, for rules that read its prediction. Where every loop runs, so does its coda."""
        core, coda = self.stacks.core, self.stacks.coda
        if core.shared:  # nothing that it gives is kept, so what it makes of stopped positions is read by none
            return coda(self.into_coda(h), 0, fixed, (fixed["past_coda_keys"], fixed["past_coda_values"]))
        every = self.config.kv_policy == "all"
        return coda(
            self.into_coda(after if every else h),
            0,
            fixed,
            (past["past_exit_keys"], past["past_exit_values"]),
            None if every else runs,
            None if every else {name: carry[f"held_exit_{name.removeprefix('held_')}"] for name in HELD},
        )

    def coda(self, tensors: Tensors) -> Tensors:
        stack, h = self.stacks.coda, tensors["h"]
        past = tensors["past_coda_keys"], tensors["past_coda_values"]
        y, pair = stack(self.into_coda(h), 0, tensors | masks_of(tensors, h.shape[1], stack.own_kinds), past)
        return {"y": self.out_of_coda(y)} | kept(stack, pair, "coda_")

    def head(self, h: Tensor) -> Tensors:
        return {"logits": self.logits(h)}

    def commit(self, tensors: Tensors) -> Tensors:
        _, core, coda = self.stacks
        h = tensors["h"]  # what a loop is entered with is read by "propagate" alone
        entering = self.injected(h, tensors["x0"]) if core.policy == "propagate" else h
        found = core.filled(tensors, entering)
        if self.compares and not core.shared:
            for which, name in enumerate(EXITS):
                rows = of_all_loops(tensors[f"new_{name}"], tensors["iterations"], self.config.max_loops)
                found[name] = coda.cache.to_cache(rows, which)
        return found

    # ------------------------------------------------------------------------------------------------------ TextModel

    def whole_text(self, tokens: Tensor, dials: Tensors, hits: InjectedHits | None = None) -> WholeText:
        return in_one_call(self, tokens, self.told(len(tokens)), dials, hits)

    def told(self, count: int) -> Tensors:
        """What a host tells a call of the first `count` positions of a text, (1, count, ...) each: angles and noise."""
        return self.angles_of(count) | of_one_text(starts(self.noise, 0, range(count), self.width))

    def angles_of(self, count: int) -> Tensors:
        """Of the first `count` positions of a text, (1, count, hd/2) each."""
        return of_one_text(self.angles(np.arange(count)))

    # ------------------------------------------------------------------------------------------------------- training

    def trajectory(
        self,
        tokens: Tensor,
        loops: int | None = None,
        stop: Stop | None = None,
        every: bool = True,
        watcher: Watcher | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """All states of whole sequences from an empty past; arguments and result as of `HasTrajectory` and, in detail, of
        `Ouro.trajectory`. In training mode each sequence begins from noise of its own, otherwise all from a text's own.

        A model whose loops share one set of keys and values is read as one call.
        """
        batch, count = tokens.shape
        if self.training:
            noise = {n: torch.randn(batch, count, self.width) * deviation for n, deviation in self.noise.items()}
            kept = self.angles_of(count) | noise
        else:
            kept = self.told(count)
        fixed = {name: t.to(tokens.device) for name, t in kept.items()} | whole_masks(count, tokens.device, self.kinds)
        x0 = self.stacks.prelude(self.embedded(tokens), 0, fixed, None)[0]
        first = self.first_state({"x0": x0} | self.drawn(fixed))
        return trajectory(
            self.stacks.core,
            first.expand_as(x0),
            fixed,
            self.config.trained_loops if loops is None else loops,
            enter=lambda h: self.injected(h, x0),
            leave=lambda x: x,
            gate=self.gate if self.config.gated else None,
            stop=stop,
            every=every,
            watcher=watcher,
        )

    def read_out(self, state: Tensor) -> Tensor:
        """Logits (B, T, V) of states (B, T, d) of a trajectory."""
        count = state.shape[1]
        fixed = {name: t.to(state.device) for name, t in self.angles_of(count).items()}
        fixed |= whole_masks(count, state.device, self.kinds)
        return self.logits(self.out_of_coda(self.stacks.coda(self.into_coda(state), 0, fixed, None)[0]))


def kept(stack: Stack, pair: Pair, prefix: str) -> Tensors:
    """Keys and values of a call of a stack that is not looped, as its cache keeps them: what its state is filled from."""
    return {
        f"{prefix}{name}": stack.cache.to_cache(t.unsqueeze(0), which).squeeze(0)
        for which, (name, t) in enumerate(zip(("keys", "values"), pair))
    }
