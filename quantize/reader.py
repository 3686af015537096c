"""Whole texts and boards through any model, watched: by its architecture's own `Reader`, or as hosts give them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmse_edge.arch.registry import arch_of_model
from rmse_edge.errors import UserError
from rmse_edge.info import TextInfo
from rmse_edge.layers.rope import given_angles
from rmse_edge.loop.contract import Append, LoopModel, LoopSpec, Replace, StateSpec, Tensors, Written
from rmse_edge.loop.course import Course, Reader, Watcher
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.drive import run_loop
from rmse_edge.loop.generator import starts
from rmse_edge.numbers import SLOTS

from .boards import BoardReader, board_of
from .scheme import table_of

LENGTH = 256  # positions of a calibration text, where the model does not say how many it was trained on


def own_dials(model: Any) -> Dials:
    """The settings of the model's own configuration."""
    return arch_of_model(model).parts(model)["dials"]


def text_of(model: Any) -> TextInfo:
    """
    Raises:
        UserError: it is no model of texts.
    """
    text = arch_of_model(model).parts(model).get("text")
    if text is None:
        raise UserError(
            f"model_type {model.config.model_type}: reads no texts; quantise it without one, with method=rtn"
        )
    return text


def text_length(model: Any) -> int:
    """Positions of one calibration text: those of a training sequence, as far as the model attends."""
    spec = model.spec(model.call_sizes()[0])
    length = getattr(model.config, "block_size", None) or LENGTH
    return length if spec.capacity is None else min(length, spec.capacity)


def reader_of(model: Any) -> Reader:
    """What reads whole texts, or boards, with this model.

    Raises:
        UserError: it has a memory and no reader of its own.
    """
    arch = arch_of_model(model)
    if arch.reader is not None:
        return arch.reader(model)
    if board_of(model) is not None:
        return BoardReader(model)
    if model.spec(model.call_sizes()[0]).written:
        raise UserError(
            f"model_type {model.config.model_type}: writes a memory, and its architecture has no reader of its own; "
            "quantise it with method=rtn"
        )
    head = table_of(model).head
    owner = model.get_submodule(head.rpartition(".")[0]) if head else None
    return CallReader(model, own_dials(model), text_of(model), owner)


class CallReader:
    """`Reader` of any model of texts, through the calls that hosts make: their context, their state, their sizes."""

    def __init__(self, model: Any, dials: Dials, text: TextInfo, head: nn.Module | None) -> None:
        """
        Args:
            dials: the model's own.
            head: the module with the weight that gives the logits, a part of `model`; None: nobody asks what it reads.
        """
        self.model, self.dials, self.text, self.head = model, dials, text, head
        self.exits = dials.exits

    def read(
        self,
        tokens: Tensor,
        stop: bool = False,
        loops: int | None = None,
        every: bool = True,
        watcher: Watcher | None = None,
    ) -> Course:
        batch, count = tokens.shape
        sizes = self.model.call_sizes()
        specs = {chunk: self.model.spec(chunk) for chunk in sizes}
        first = specs[sizes[0]]
        depth = first.max_loops if loops is None else loops
        chosen = self.dials if stop else Dials(first.max_loops)
        dials = {n: torch.from_numpy(a).to(tokens.device) for n, a in chosen.arrays().items() if n in first.dials}
        dials["max_loops"] = torch.tensor(min(depth, int(chosen.max_loops)), device=tokens.device)
        # Slots for this text, not for the longest there may be.
        kept = [cast(StateSpec, s.of_slots(count)) for s in first.state]
        state = {s.name: torch.zeros(s.of_batch(batch), dtype=s.dtype, device=tokens.device) for s in kept}
        parts, depths = [], []
        for position, chunk, n in _calls(count, sizes, first.segment):
            padded = F.pad(tokens[:, position : position + n], (0, chunk - n))
            given = {"tokens": padded, SLOTS: torch.arange(count, device=tokens.device)}
            given |= self._context(position, n, chunk, batch, tokens.device)
            states, ran, state = self._call(specs[chunk], given, state, dials, position, n, every, watcher)
            parts.append([h[:, :n] for h in states])
            depths.append(ran[:, :n])
        # Where all stop sooner, their states stay what they are.
        most = max(map(len, parts))
        full = [states + states[-1:] * (most - len(states)) for states in parts]
        return Course([torch.cat(of_loop, 1) for of_loop in zip(*full)], torch.cat(depths, 1), None)

    def _call(
        self,
        spec: LoopSpec,
        given: Tensors,
        state: Tensors,
        dials: Tensors,
        position: int,
        n: int,
        every: bool,
        watcher: Watcher | None,
    ) -> tuple[list[Tensor], Tensor, Tensors]:
        """One call: the states that the head reads, the depths (B, C), and the state after it."""
        model, tokens = self.model, given["tokens"]
        valid = (torch.arange(tokens.shape[1], device=tokens.device) < n).expand_as(tokens)
        if watcher is not None:
            watcher.begins(valid)
        tensors = given | state | model.prelude(given | state)
        watched = _Watched(model, valid, watcher)
        found = tensors | run_loop(cast(LoopModel, watched), spec, tensors, dials)
        if watcher is not None:
            watcher.ends()
        states = watched.states or [found["h"]]
        if spec.coda:
            found |= model.coda(found)
            states = [found[spec.final.name]]
        if spec.commit:
            found |= model.commit(found)
        kept = {s.name: _updated(s, state[s.name], found, position, n) for s in spec.state}
        depth = found["depth"]
        return (
            states if every else states[-1:],
            depth.view(*depth.shape, *[1] * (2 - depth.dim())).expand_as(tokens),
            kept,
        )

    def _context(self, position: int, n: int, chunk: int, batch: int, device: torch.device) -> Tensors:
        text = self.text
        found = {"position": torch.tensor([position] * batch), "n_valid": torch.tensor([n] * batch)}
        places = position + np.arange(chunk)
        angles = given_angles(places, text.rotary_dims, text.rope_theta, text.further_thetas)
        found |= {name: torch.from_numpy(a).expand(batch, -1, -1) for name, a in angles.items()}
        spec = self.model.spec(chunk)
        noise = starts(spec.noise, 0, range(position, position + chunk), spec.h.shape[-1])
        found |= {name: torch.from_numpy(rows).expand(batch, -1, -1) for name, rows in noise.items()}
        return {name: tensor.to(device) for name, tensor in found.items()}

    def logits(self, state: Tensor) -> Tensor:
        return next(iter(self.model.head(state).values()))

    def read_by_head(self, state: Tensor) -> Tensor:
        assert self.head is not None
        heard: list[Tensor] = []
        handle = self.head.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
        try:
            self.model.head(state)
        finally:
            handle.remove()
        return heard[-1]


class _Watched:
    """What `run_loop` asks of a model, whose iterations are told of, and their states kept."""

    def __init__(self, model: LoopModel, valid: Tensor, watcher: Watcher | None) -> None:
        self.model, self.valid, self.watcher = model, valid, watcher
        self.states: list[Tensor] = []

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        return self.model.begin(tensors)

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        active = carry["active"]
        active = active.view(*active.shape, *[1] * (2 - active.dim())).expand_as(self.valid) & self.valid
        if self.watcher is not None:
            self.watcher.iterates(active, None, None, int(k))
        new, emitted = self.model.step(k, carry, past, fixed, dials)
        self.states.append(new["h"])
        return new, emitted


def _calls(count: int, sizes: tuple[int, ...], segment: int | None) -> Iterator[tuple[int, int, int]]:
    """Calls (position, rows, valid ones) for `count` tokens: as large as there are, the last one padded."""
    position = 0
    while position < count:
        n = min(count - position, sizes[-1], sizes[-1] if segment is None else segment - position % segment)
        yield position, min(size for size in sizes if size >= n), n
        position += n


def _updated(spec: StateSpec, state: Tensor, found: Tensors, position: int, n: int) -> Tensor:
    """A tensor of the state after a call of `n` tokens, as its update says; gradients pass."""
    update = spec.update
    assert not isinstance(update, Written)
    given = found[update.source]
    if isinstance(update, Replace):
        return given
    size = state.shape[-2]
    if isinstance(update, Append) and position + n > size:
        raise ValueError(f"{spec.name}: has room for {size} positions, not for {position + n}")
    kept = min(n, size)
    slots = torch.arange(position + n - kept, position + n, device=state.device) % size
    return state.index_copy(state.dim() - 2, slots, given[..., n - kept : n, :].to(state.dtype))
